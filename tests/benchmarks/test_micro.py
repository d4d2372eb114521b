"""The small benchmarks: what they measure, what they leave, and how they fail."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import hfjax
from benchmarks.__main__ import main
from benchmarks.harness.history import write_json
from benchmarks.harness.race import Carry, Racer
from benchmarks.micro import (
    accelerator,
    constants,
    cost_problems,
    costs,
    least_squares,
    preconditioners,
    product,
    rows,
    shares,
)
from benchmarks.suites import images


@pytest.fixture(autouse=True)
def _as_users_run_it():
    """Benchmarks are an application: float32, and JAX's own defaults."""
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling is the cost.
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def command(path, *words):
    """Run a command with a file to write, and return what that holds."""
    assert main([*words, "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_what_json_lacks_becomes_null(tmp_path):
    write_json(tmp_path / "x.json", {"x": [float("nan"), 1.5, float("inf")]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"x": [None, 1.5, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_costs_are_those_of_the_compiled_update(tmp_path, monkeypatch, capsys):
    # As few kernels as there may be: they are what compiling takes its time for.
    bare = {"preconditioner": None, "backtracking": None, "line_search": None}
    usual = costs.Option(functools.partial(hfjax.hessian_free, **bare))
    undonated = usual._replace(donated=False)
    monkeypatch.setattr(costs, "OPTIONS", {"usual": usual, "undonated": undonated})
    small = functools.partial(cost_problems.curves, encoder=(784, 4, 2))
    monkeypatch.setitem(cost_problems.PROBLEMS, "autoencoder", small)
    path = tmp_path / "new" / "costs.json"
    words = ("--cases", "3", "--only", "", "--out", str(path))
    assert main(["costs", *words]) == 0
    usual, undonated = json.loads(path.read_text())["rows"]
    numbers = 2 * (784 * 4 + 4 * 2) + (4 + 2 + 4 + 784)  # Four kernels and biases.
    assert usual["vector_bytes"] == 4 * numbers
    # Besides the direction there are scalars, and the record of 250 iterations.
    scalars = usual["state_bytes"] - usual["vector_bytes"]
    assert 0 < scalars - 4 * (251 + 2 * 250) < 100
    # Parameters and some scalars give their place to what replaces them; a direction
    # that no run starts from is not read at all.
    assert undonated["saved_bytes"] == 0
    saved = usual["saved_bytes"] - usual["vector_bytes"]
    assert 0 < saved <= scalars
    for row in (usual, undonated):
        # Some of conjugate gradients' own; of kept iterates none, as nobody chooses.
        assert 4 < row["temporary_bytes"] / row["vector_bytes"] < 12
        assert row["instructions"] > row["kernels"] == sum(row["places"].values())
        assert any("images.model_fn" in function for _, function, _ in row["origins"])
        assert row["places"]["once"] > row["places"]["pcg.run"] > row["kinds"]["dot"]
        # Once for gradient and linearisation together, and once for f at the step.
        assert row["models"] == {"once": 2}
        assert row["jax_seconds"] > 0 < row["xla_seconds"]
        told = accelerator._of_costs({"rows": [row]})
        assert told["kernels, once"] == f"{row['places']['once']}"
        assert told["kernels, an iteration of CG"] == f"{row['places']['pcg.run']}"
    printed = capsys.readouterr().out
    assert "usual" in printed
    assert "784-4-2, 3 images" in printed
    assert "pcg.run" in printed


def test_costs_of_a_checkpointed_scan_are_told(tmp_path, monkeypatch, capsys):
    bare = {"preconditioner": None, "backtracking": None, "line_search": None}
    plain = costs.Option(functools.partial(hfjax.hessian_free, **bare))
    kept = plain._replace(checkpointed=True)
    monkeypatch.setattr(costs, "OPTIONS", {"plain": plain, "kept": kept})
    words = ("costs", "--problem", "recurrent", "--cases", "20", "--only", "")
    plain, kept = command(tmp_path / "costs.json", *words)["rows"]
    # The states of all 256 steps, beside those of every sixteenth.
    assert plain["temporary_bytes"] > 2 * kept["temporary_bytes"]
    assert sum(kept["models"].values()) > sum(plain["models"].values())
    # Of other problems there is no such set-up.
    monkeypatch.setattr(costs, "OPTIONS", {"kept": costs.OPTIONS["kept"]})
    assert main(["costs", "--only", "kept"]) == 2
    assert "no set-up" in capsys.readouterr().err


def test_shares_of_an_update_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shares, "CURVES", (784, 5))
    monkeypatch.setattr(shares, "_BEFORE", 1)
    monkeypatch.setattr(shares, "_UPDATES", 2)
    words = ("costs", "--shares", "--cases", "20", "--rounds", "1")
    found = command(tmp_path / "shares.json", *words)
    assert len(found["runs"]) == 2
    parts = found["shares"].values()
    assert sum(part["share"] for part in parts) == pytest.approx(1.0)
    assert accelerator._of_shares(found).keys() == found["shares"].keys()
    assert "2 updates" in capsys.readouterr().out
    assert main([*words, "--problem", "readme"]) == 2
    assert "--shares is for the autoencoder" in capsys.readouterr().err


def test_costs_of_nothing_are_an_error(tmp_path, capsys):
    assert main(["costs", "--only", "adam"]) == 2
    assert "no set-up of this problem has 'adam'" in capsys.readouterr().err
    words = ("--gpu", str(tmp_path / "none"), "--out", str(tmp_path / "costs.json"))
    assert main(["costs", *words]) == 2
    assert "none" in capsys.readouterr().err


def test_problems_whose_costs_are_told_are_those_they_say():
    shapes = {name: build(None) for name, build in cost_problems.PROBLEMS.items()}
    assert len(jax.tree.leaves(shapes["autoencoder"].params)) == 24
    for problem in shapes.values():
        value = jax.eval_shape(problem.objective.value, problem.params, problem.batch)
        assert value.shape == ()


@pytest.mark.parametrize("network", ["autoencoder", "convolutions"])
def test_products_are_timed(network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(product, "DIGITS", (784, 4))
    monkeypatch.setattr(product, "_CHANNELS", (2, 3, 4))
    monkeypatch.setattr(product, "_ITERATIONS", 3)
    words = ("product", "--network", network, "--cases", "4", "--rounds", "1")
    found = command(tmp_path / "product.json", *words)
    assert set(found["seconds"]) == set(found["in_gradients"])
    assert found["in_gradients"]["gradient"] == 1
    assert 0 < found["cg_iterations"] <= 3
    over = accelerator._of_product(found)["an update, over its products"]
    assert float(over) == pytest.approx(found["update_over_its_products"], abs=0.01)
    assert "JAX\N{NO-BREAK SPACE}alone" in capsys.readouterr().out


def test_m_is_that_of_the_textbook_with_each_diagonal():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 9)) * np.arange(1, 10), generator.normal(size=40)
    objective = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)[:, None]
    setting = preconditioners.Setting(
        objective, None, lambda key: batch, optax.identity(), exact=True
    )
    solve = preconditioners._solver(setting, 6)
    at = preconditioners.At(jnp.zeros((9, 1)), jnp.float32(0.1), jax.random.key(0))
    a, b = x.T @ x / 40 + 0.1 * np.eye(9), x.T @ y / 40
    inverses = {
        "none": np.ones(9),
        "empirical Fisher, ξ = 0.75": np.mean((x * y[:, None]) ** 2, 0) + 0.1,
        "exact diag(G), ξ = 1": np.diag(a),
    }
    inverses["empirical Fisher, ξ = 0.75"] **= 0.75
    for name, diagonal in inverses.items():
        _, truth = reference.pcg(a, b, inverse=np.diag(1 / diagonal), iterations=6)
        value, models = solve(at, *preconditioners.rules(exact=True)[name])
        np.testing.assert_allclose(models, truth, rtol=1e-4)
        assert float(value) == pytest.approx(np.mean(y**2) / 2, rel=1e-5)


def test_where_a_rule_stops_is_read_off_m():
    j, rule = jnp.arange(100), hfjax.stopping.martens2010()
    # The docstring of `martens2010` has it: of −j / (j + 1), the last 10 of j iterations
    # gained 10 / ((j − 9)(j + 1)) of 1, of which j / (j + 1) is M: 10 / (j (j − 9)) < 5e-3.
    assert preconditioners.stop(-j / (j + 1.0), rule) == 50
    assert preconditioners.stop(-1.0 * j, rule) == 99


@pytest.mark.parametrize(
    ("problem", "updates"),
    [("autoencoder", 2), ("addition", 2), ("attention", 1), ("experts", 1)],
)
def test_preconditioners_are_compared(problem, updates, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preconditioners, "CURVES", (784, 4))
    words = ("--problem", problem, "--updates", str(updates), "--only", "none,Fisher")
    sizes = ("--cases", "12", "--every", "1", "--limit", "20")
    found = command(tmp_path / "p.json", "preconditioners", *words, *sizes)
    assert [row["update"] for row in found["rows"]] == list(range(updates))
    names = ["none", *(f"empirical Fisher, ξ = {power}" for power in ("0.75", "1"))]
    for row in found["rows"]:
        assert list(row["iterations"]) == names
        assert all(0 < count <= 20 for count in row["iterations"].values())
    assert "mean iterations" in capsys.readouterr().out


def test_constants_are_compared_by_units_of_work(tmp_path, monkeypatch, capsys):
    # Four iterations an update: 10 units. The values after each are 9, 4, 5, 1.
    values = iter([9.0, 4.0, 5.0, 1.0])
    racer = Racer(
        lambda params: Carry(params, None, 0),
        lambda carry: carry,
        None,
        lambda _: {"cg_iterations": 4},
    )
    summary = images.PROBLEMS["curves1000"].build("")
    measured = dataclasses.replace(
        summary, measurer=lambda *_: lambda *_: (0.0, next(values))
    )
    kind = images.PROBLEMS["curves1000"]._replace(build=lambda _: measured)
    monkeypatch.setitem(images.PROBLEMS, "curves1000", kind)
    monkeypatch.setattr(constants, "ours", lambda *_: racer)
    words = ("--problem", "curves1000", "--units", "25,10,40", "--only", "window=8")
    found = command(tmp_path / "constants.json", "constants", *words)
    row = {"problem": "curves1000", "change": "window=8", "lowest": [[9.0, 4.0, 1.0]]}
    assert found["rows"] == [row]
    assert "25 units" in capsys.readouterr().out


def test_every_change_of_a_constant_is_a_set_up():
    objective = hfjax.Objective(lambda params, x: x, hfjax.losses.squared_error())
    for changes in constants.CHANGES.values():
        for options in changes.values():
            constants.optimizer(objective, options)


def test_an_update_is_no_longer_than_its_bound():
    objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
    batch = (jnp.eye(2), jnp.array([3.0, 4.0]))
    found = []
    for bound in (0.25, jnp.inf):
        options = constants.CHANGES["equations"]["fixed, momentum=0.9"]
        tx = constants.optimizer(objective, {**options, "bound": bound})
        params = jnp.zeros(2)
        grads = objective.value_and_grad(params, batch)[1]
        updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
        found.append(updates)
    # A tenth of the step to the targets, which is as good as undamped.
    np.testing.assert_allclose(found[1], [0.3, 0.4], rtol=1e-5)
    np.testing.assert_allclose(found[0], [0.15, 0.2], rtol=1e-5)


def test_curve_fits_are_compared_by_their_digits(tmp_path, monkeypatch, capsys):
    names = "hfjax,leastsq,jaxopt-lm"
    words = ("least_squares", "--problem", "Misra1a", "--solvers", names)

    def missing(*_):
        raise ImportError

    monkeypatch.setitem(least_squares.SOLVERS, "jaxopt-lm", missing)
    found = command(tmp_path / "l.json", *words)
    assert list(found["rows"]) == ["hfjax", "leastsq"]
    for first, second in found["rows"].values():
        assert (first["start"], second["start"]) == (1, 2)
        assert first["first"] > first["again"] > 0
        assert second["first"] is None
        for row in (first, second):
            assert 7 < row["digits"] <= 11
            assert 1 < row["updates"] < row["evaluations"]
    printed = capsys.readouterr().out
    assert "jaxopt-lm is left out" in printed
    assert printed.count("is not right in: none") == 2


@pytest.mark.slow
def test_rows_for_classes_and_for_labels_start_alike_and_learn(
    tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(rows.mnist, "images", lambda _: rng.random((40, 784)))
    monkeypatch.setattr(
        rows.mnist, "labels", lambda _: np.arange(40, dtype=np.int32) % 10
    )
    monkeypatch.setattr(rows, "_SIZES", (196, 3, 10))
    monkeypatch.setattr(rows, "_DIGITS", 40)
    words = ("--cases", "20", "--updates", "1,3")
    found = command(tmp_path / "rows.json", "rows", *words)["rows"]
    assert [row["way"] for row in found] == ["each class", "each label"]
    assert all(len(row["losses"]) == 3 and row["seconds"] > 0 for row in found)
    spent = [row["updates"] * row["seconds"] for row in found]
    assert found[0]["updates"] == 3 <= found[1]["updates"]
    assert spent[1] > 0.999 * spent[0]
    assert all(row["losses"][1] < row["losses"][0] for row in found)
    assert "f on all digits" in capsys.readouterr().out


def test_halved_images_are_means_of_four_pixels():
    image = np.arange(784.0).reshape(1, 784)
    assert rows.halved(image).shape == (1, 196)
    assert rows.halved(image)[0, 15] == np.mean([58, 59, 86, 87])


def test_m_in_float32_is_held_against_float64(tmp_path, capsys):
    words = ("precision", "--size", "60", "--iterations", "20")
    found = command(tmp_path / "precision.json", *words)
    assert set(found["rows"]) == {"1e2", "1e4", "1e6", "1e8"}
    for row in found["rows"].values():
        assert 0 < row["gains"]["value"] < 1e-4
        assert row["gains"]["decrease"] > 0
    assert "summed gains" in capsys.readouterr().out
    assert main(["precision", "--iterations", "3"]) == 2
    assert "more than 10, got 3" in capsys.readouterr().err


COMMANDS = ["product", "costs", "preconditioners", "precision", "constants", "rows"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_option_or_file_is_one_line_and_status_2(name, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words in (["--cases", "0"], ["--out", str(tmp_path / "file" / "x.json")]):
        if words[0] == "--cases":
            words = [
                {"precision": "--size", "constants": "--units"}.get(name, words[0]),
                "0",
            ]
        try:
            status = main([name, *words])
        except SystemExit as stop:
            status = stop.code
        assert status == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_product_of_one_layer_is_no_dearer_than_its_gradient():
    # No layer below: F tangents, F transposes; gradient F forward, F weights.
    assert product.flop_limits((784, 30))["product"] == 1
    assert product.flop_limits((784, 30))["empirical_fisher"] == 1


@pytest.mark.slow
def test_an_exact_update_is_divided_into_its_parts(tmp_path, capsys):
    path = tmp_path / "exact.json"
    words = ["--exact", "poisson2d", "--updates", "1", "--rounds", "1"]
    words += ["--stored", "100000", "--out", str(path)]
    assert main(["costs", *words]) == 0
    found = json.loads(path.read_text())
    assert (found["rows"], found["columns"], found["stored"]) == (1020, 257, 100_000)
    assert found["limits"].keys() < found["seconds"].keys()
    limited = {k for k, x in accelerator._of_exact(found).items() if "by flops" in x}
    assert limited == found["limits"].keys()
    assert found["seconds"]["an update"] > found["seconds"]["J"] > 0
    n, limit = 257, found["limits"]
    assert limit["its square"] == pytest.approx(1020 * n**2 / found["speed"])
    assert "Gflops" in capsys.readouterr().out
