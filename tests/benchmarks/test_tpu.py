"""Updates that are compiled for devices which need not be there."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import hfjax
from benchmarks.__main__ import main
from benchmarks.micro import cost_problems, tpu
from benchmarks.micro.costs import Option

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks are an application: float32, and JAX's own defaults."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_each_set_up_is_compiled_in_each_layout(tmp_path, monkeypatch, capsys):
    def impossible(objective, **options):
        msg = "no such update\nand more"
        raise ValueError(msg)

    bare = {"preconditioner": None, "backtracking": None, "line_search": None}
    options = {
        "bare": Option(functools.partial(hfjax.hessian_free, **bare)),
        "impossible": Option(impossible),
    }
    monkeypatch.setattr(tpu, "OPTIONS", options)
    monkeypatch.setattr(tpu, "topology", lambda name: jax.devices())
    monkeypatch.setattr(tpu, "_SMALL", 16)
    path = tmp_path / "tpu.json"
    words = ("--cases", "13", "--only", "", "--layout", "replicated,fsdp")
    assert main(["tpu", *words, "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    named = [(row["name"], row["layout"]) for row in rows]
    assert named == [(name, layout) for layout in tpu.LAYOUTS for name in options]
    for row in rows:
        if row["name"] == "impossible":
            assert row["why"] == "ValueError: no such update"
            continue
        assert row["xla_seconds"] > 0 < row["jax_seconds"]
        assert row["flops"] > 13 * 2 * (2 * 16 + 16)  # A forward pass of the model.
        if jax.device_count() > 1:
            once, loops = row["collectives"]["all-reduce"]
            assert once > 0 < loops  # The gradient; and a product in each iteration.
            # Each sums at least the 65 parameters.
            assert min(row["collective_bytes"]) >= 4 * 65
    printed = capsys.readouterr().out
    # Every device has as many examples as any other.
    padded = 13 + -13 % jax.device_count()
    assert f"the README's example, {padded} points" in printed
    assert "ValueError" in printed


def test_arrays_are_divided_along_their_longest_axis_that_fits():
    count = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("cases",))
    params = {
        "large": jax.ShapeDtypeStruct((8 * count, 2**14), jnp.float32),
        "odd": jax.ShapeDtypeStruct((8 * count, 2**14 + 1), jnp.float32),
        "small": jax.ShapeDtypeStruct((count,), jnp.float32),
    }

    def specs(layout):
        placed = tpu._placed(params, mesh, layout)
        return {name: tuple(leaf.sharding.spec) for name, leaf in placed.items()}

    assert set(specs("replicated").values()) == {()}
    odd = ("cases",) if count > 1 else (None, "cases")
    assert specs("fsdp") == {"large": (None, "cases"), "odd": odd, "small": ()}
    assert set(specs("examples").values()) == {("cases",)}


def test_a_wrong_layout_set_up_or_topology_is_one_line(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["tpu", "--layout", "pipeline"])
    assert "must be one of replicated, fsdp, got 'pipeline'" in capsys.readouterr().err

    def unknown(**_):
        msg = "no platform\nthat is so called"
        raise RuntimeError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(tpu.topologies, "get_topology_desc", unknown)
        assert main(["tpu", "--topology", "v9:1x1"]) == 2
    message = capsys.readouterr().err
    assert "--topology v9:1x1: no platform (it needs `pip install libtpu`)" in message
    monkeypatch.setattr(tpu, "topology", lambda name: jax.devices())
    out = str(tmp_path / "x.json")
    assert main(["tpu", "--only", "adagrad", "--out", out]) == 2
    assert "no set-up of this problem has 'adagrad'" in capsys.readouterr().err


def test_every_set_up_is_an_optimizer():
    problem = cost_problems.readme(None)
    for option in tpu.OPTIONS.values():
        tx = option.build(problem.objective)
        assert isinstance(tx, optax.GradientTransformation)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize("only", ["default", "preconditioner=None", "ten microbatches"])
def test_an_update_compiles_for_four_chips(only, tmp_path):
    path = tmp_path / "tpu.json"
    words = ("--layout", "replicated,fsdp", "--only", only, "--out", str(path))
    command = [sys.executable, "-m", "benchmarks", "tpu", *words]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) >= 2
    for row in rows:
        assert "why" not in row
        assert row["program_bytes"] > 0
        assert "all-reduce" in row["collectives"]
