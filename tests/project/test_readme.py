"""The README's code runs as it stands, and says what is true."""

import contextlib
import io
import pathlib
import re
import runpy
import tomllib

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_example_trains_to_what_the_text_promises_and_parts_swap():
    pytest.importorskip("flax.nnx")
    example, swap, recurrent, devices = BLOCKS
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example, names)
    values = [float(line.split()[1]) for line in printed.getvalue().splitlines()]
    assert len(values) == 100
    assert values[-1] < 1e-5 < values[0]
    exec(swap, names)
    state = names["tx"].init(names["params"])
    names["state"] = state
    _, state = names["train_step"](names["params"], state, names["batch"])
    assert state.info.accepted
    if 500 % jax.device_count() == 0:
        exec(devices, names)
        assert len(names["batch"][0].sharding.device_set) == jax.device_count()
        params, state = names["train_step"](names["params"], state, names["batch"])
        assert state.info.accepted
    exec(recurrent, names)
    objective, params, tx = (names[name] for name in ("objective", "params", "tx"))
    batch = (jnp.ones((4, 6, 2)), jnp.ones((4, 1)))
    value, grads = objective.value_and_grad(params, batch)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params, batch=batch)
    assert state.info.accepted
    assert state.info.value_after < value


def test_versions_named_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Python 3.11 or newer, jax 0.10.1 or newer" in README
    assert project["requires-python"] == ">=3.11"
    assert "jax>=0.10.1" in project["dependencies"]


def test_every_public_module_is_in_the_table():
    import hfjax

    named = set(
        re.findall(r"`(\w+)`", README.split("## Modules")[1].split("## Dev")[0])
    )
    site = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))
    public = {site["public_module"](path) for path in site["public_modules"]()}
    assert public <= named
    assert hfjax.__version__


def test_every_make_target_named_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\$ make (\w+)", README)) <= targets


def test_every_test_that_the_table_of_faults_names_exists():
    page = (ROOT / "docs" / "faults.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 30
    assert named <= set(re.findall(r"def (test_\w+)\(", written))


def test_every_fault_that_is_tested_is_in_the_table():
    page = (ROOT / "docs" / "faults.md").read_text()
    folder = ROOT / "tests" / "faults"
    for name in ("test_numbers.py", "test_arguments.py"):
        tests = re.findall(r"def (test_\w+)\(", (folder / name).read_text())
        assert not [test for test in tests if f"`{test}`" not in page]
