"""Examples of the pages run as they stand, and do what the pages say."""

import ast
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from reference import assert_close, programs, quick_jit

import hfjax

pytest.importorskip("flax.nnx")

DOCS = pathlib.Path(__file__).parents[2] / "docs"
TRAINERS = re.compile(r"^from (levanter|tunix|kauldron|easydel|maxtext)", re.MULTILINE)


def blocks(page):
    """Return the examples of a page."""
    return blocks_of((DOCS / page).read_text())


def blocks_of(text):
    """Return the examples in a text."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


@pytest.fixture(autouse=True)
def quick_parts(monkeypatch):
    """Give the optimizer parts that compile quickly, and let Flax promote ranks."""
    parts = {
        "damping": hfjax.damping.levenberg_marquardt(init=0.1),
        "preconditioner": None,
        "solver": hfjax.cg.conjugate_gradient(max_iterations=5),
    }

    def hessian_free(objective, **options):
        return build(objective, **{**parts, **options})

    build = hfjax.hessian_free
    monkeypatch.setattr(hfjax, "hessian_free", hessian_free)
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.slow
def test_models_that_change_are_compiled_once_and_trained():
    # In float32, as users run it: Flax would widen statistics of float64 inputs.
    with jax.enable_x64(False):
        run_page_of_changing_models()


def run_page_of_changing_models():
    names, steps = {}, []
    for block in blocks("changing.md"):
        with programs("jaxpr_trace") as traced:
            exec(block, names)
        assert traced.count("train_step") == 1, block
        steps.append(names["train_step"])
        states = names["states"] if "forger" in block else [names["state"]]
        for state in states:
            assert state.count == 5
            assert state.info.update_norm > 0
        if "nn.BatchNorm" in block or "whole_batch" in block:
            check_statistics(names)
        if "nnx.BatchNorm" in block:
            assert np.all(np.asarray(names["model"].layers[1].mean[...]) != 0)
    assert len(steps) == len(set(steps)) == 7


def check_statistics(names):
    """Train on a batch with NaN: parameters and statistics stay as they are."""
    x, t = names["batch"]
    kept = names["params"], names["statistics"]
    *found, state = names["train_step"](*kept, names["state"], (x * jnp.nan, t))
    assert not state.info.accepted
    jax.tree.map(np.testing.assert_array_equal, tuple(found), kept)
    assert jnp.all(kept[1]["BatchNorm_0"]["var"] != 1)


@pytest.mark.slow
def test_curves_are_fitted_with_their_errors(capsys):
    names = {}
    for block in blocks("least_squares.md"):
        exec(block, names)
    *found, end, lifetimes = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in found] == list(names["start"])
    for line, truth in zip(found, (200, 1.5, 20), strict=True):
        value, error = map(float, line.split(" = ")[1].split(" ± "))
        assert 0 < error < 0.1 * truth
        assert abs(value - truth) < error
    assert end.startswith("Any further progress is hidden by rounding. χ² = ")
    assert lifetimes == "[1.  1.5 2. ]"


def helpers():
    """Return what the page of trainers defines without any trainer."""
    names = {}
    for block in blocks("trainers.md"):
        ast.parse(block)
        if not TRAINERS.search(block):
            exec(block, names)
    return names


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def model_fn(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


PARAMS = {"in": normal(0, 3, 4), "out": normal(1, 4, 2)}
BATCH = (normal(2, 6, 3), normal(3, 6, 2))
OBJECTIVE = hfjax.Objective(model_fn, hfjax.losses.squared_error())


def updates_of(tx, **extra):
    grads = OBJECTIVE.value_and_grad(PARAMS, BATCH)[1]
    return tx.update(grads, tx.init(PARAMS), PARAMS, **extra)[0]


def test_a_bound_optimizer_takes_the_step_for_a_caller_that_passes_nothing():
    bound, by_objective = helpers()["bound"], helpers()["by_objective"]

    @quick_jit
    def both():
        plain = updates_of(hfjax.hessian_free(OBJECTIVE), batch=BATCH)
        tx = bound(by_objective(), objective=OBJECTIVE, batch=BATCH)
        # Kauldron asks for the name of the function, and EasyDeL names its arguments.
        update = jax.named_call(tx.update)
        grads = OBJECTIVE.value_and_grad(PARAMS, BATCH)[1]
        return plain, update(updates=grads, state=tx.init(PARAMS), params=PARAMS)[0]

    plain, found = both()
    assert_close(found, plain)
    assert optax.tree.norm(found) > 0


@pytest.mark.slow
def test_an_optimizer_by_obj_fn_takes_the_step_of_the_hessian():
    curvature = hfjax.curvature.hessian

    def passed_on(params):
        return OBJECTIVE.value(params, BATCH)

    @quick_jit
    def both():
        plain = updates_of(
            hfjax.hessian_free(OBJECTIVE, curvature=curvature), batch=BATCH
        )
        tx = helpers()["by_obj_fn"]()
        return plain, updates_of(tx, obj_fn=passed_on, loss=1.0, grams=None)

    plain, found = both()
    assert_close(found, plain, rtol=1e-6)
    assert optax.tree.norm(found) > 0


@pytest.mark.slow
def test_a_step_of_nnx_like_that_of_tunix_trains_a_part_of_a_model():
    from flax import nnx

    from hfjax.flax import nnx_model_fn

    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 2, rngs=rngs)]
    model = nnx.Sequential(*layers)
    last = nnx.All(nnx.Param, nnx.PathContains(2))
    tx = helpers()["by_objective"]()
    optimizer = nnx.Optimizer(model, tx, wrt=last)
    loss = hfjax.losses.squared_error()
    batch = jax.tree.map(jnp.float32, BATCH)

    @nnx.jit
    def train_step(model, optimizer, batch):
        objective = hfjax.Objective(nnx_model_fn(model, optimizer.wrt), loss)
        params = nnx.state(model, optimizer.wrt)
        value, grads = objective.value_and_grad(params, batch)
        optimizer.update(model, grads, batch=batch, objective=objective)
        return value

    frozen = np.asarray(model.layers[0].kernel[...])
    before, after = (train_step(model, optimizer, batch) for _ in range(2))
    assert after < before
    np.testing.assert_array_equal(model.layers[0].kernel[...], frozen)


def sections(page):
    """Return the examples of each section of a page, by its heading."""
    parts = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    return {part.split("\n")[0]: blocks_of(part) for part in parts}


def run(examples):
    """Run examples one after another, as one program; return its names."""
    names = {}
    for example in examples:
        exec(example, names)
    return names


@pytest.mark.slow
def test_the_tutorial_of_residuals_fits_a_curve_and_solves_an_equation(
    capsys, monkeypatch
):
    monkeypatch.undo()  # With the parts that users have.
    names = run(sections("start.md")["A residual function"])
    *found, end, equation = capsys.readouterr().out.splitlines()
    for line, truth in zip(found, (1.5, 0.3, 2.0), strict=True):
        value, error = map(float, line.split(" = ")[1].split(" ± "))
        assert 0 < error < 0.02
        assert abs(value - truth) < 2 * error
    assert end == "Any further progress is hidden by rounding."
    assert equation.startswith("f = ")
    assert names["error"] < 1e-10  # As the page says.


@pytest.mark.slow
def test_the_tutorial_of_flax_trains_a_model_by_fit_and_by_a_loop(capsys, monkeypatch):
    monkeypatch.undo()
    with jax.enable_x64(False):
        names = run(sections("start.md")["A model of Flax"])
        value = names["objective"].value(names["params"], names["batch"])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert names["fit"].value < 1e-3 * names["fit"].history.value[0]
    assert value <= names["fit"].value
    assert first.startswith("f: ")
    assert len(lines) == 5
    assert all(line.startswith("f ") for line in lines)
    assert last == "Nothing is wrong with this set-up."


@pytest.mark.slow
def test_the_tutorial_of_parts_multiplies_solves_and_stops():
    names = run(sections("start.md")["A part on its own"])
    product, run_of_cg = names["product"], names["run"]
    flat, unravel = ravel_pytree(names["params"])
    x, _ = names["batch"]
    j = jax.jacfwd(lambda p: names["model_fn"](unravel(p), x))(flat)
    dense = np.einsum("iam,ian->mn", j, j) / len(x)
    v = normal(4, flat.size)
    assert_close(ravel_pytree(product(unravel(v)))[0], dense @ v)
    # The rule of the page: ‖A x − b‖ < 1e-3 ‖b‖, and not before.
    b = -ravel_pytree(names["grads"])[0]
    damped = dense + 0.1 * np.eye(flat.size)
    left = np.linalg.norm(damped @ ravel_pytree(run_of_cg.x)[0] - b)
    assert 1e-5 < left / np.linalg.norm(b) < 1e-3
    assert names["state"].info.accepted


@pytest.mark.slow
def test_components_of_the_page_pass_the_tests_of_the_page():
    names = run(blocks("adding.md"))
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 3
    for test in tests:
        test()


def test_a_component_of_the_page_is_as_short_as_is_said():
    found = sections("adding.md")
    lines = {name: code[0].count("\n") for name, code in found.items() if code}
    assert lines["A preconditioner"] < 35
    assert lines["A solver"] < 55
    assert lines["A loss"] < 15


@pytest.mark.slow
def test_the_examples_of_symptoms_run(capsys):
    names = run(blocks("symptoms.md"))
    fault, *lines = capsys.readouterr().out.splitlines()
    summed = (
        "`grads` is 100 times the gradient of this objective: a sum over the cases,"
    )
    assert fault.startswith(summed)
    assert [line.split()[0] for line in lines[:6]] == ["update", *"12345"]
    assert "none" in lines
    assert names["fit"].value < names["start"].value < names["value"]


def test_faults_are_seen_where_the_page_of_symptoms_looks():
    tx = hfjax.hessian_free(
        OBJECTIVE, solver=hfjax.cg.conjugate_gradient(max_iterations=2, stopping=None)
    )
    grads = OBJECTIVE.value_and_grad(PARAMS, BATCH)[1]

    def run_with(change, updates=3):
        state = tx.init(PARAMS)
        for _ in range(updates):
            spoilt = jax.tree.map(change, grads)
            _, state = tx.update(spoilt, state, PARAMS, batch=BATCH)
        return hfjax.diagnostics.scalars(state)

    healthy = run_with(lambda g: g)
    assert healthy["cg_reason"] == "max iterations"
    assert healthy["damping"] < 0.1
    assert healthy["rejection"] == "none"
    summed = run_with(lambda g: 100 * g)
    assert summed["rejection"] == "no decrease"
    assert summed["damping"] > 0.3
    clipped = run_with(lambda g: g / 100)
    assert clipped["reduction_ratio"] > 10
    assert clipped["damping"] < 0.1
    assert run_with(lambda g: -g)["rejection"] == "no decrease"
    assert run_with(lambda g: 0 * g)["rejection"] == "zero gradient"
    assert run_with(lambda g: jnp.nan * g)["rejection"] == "nonfinite gradient"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["choosing.md", "damping.md", "solvers.md"])
def test_the_examples_of_pages_of_advice_run(page):
    assert run(blocks(page))


@pytest.mark.slow
def test_terms_and_parameters_are_minimised_as_the_page_says():
    names = run(blocks("terms.md"))
    f, params, objective = (names[name] for name in ("f", "params", "objective"))
    (x, t), w = names["batch"][0], params["w"]
    # The terms of the sum, by hand: ½ mean e², its weight decay without biases, the penalty.
    data = 0.5 * np.mean(np.sum((names["model_fn"](params, x) - t) ** 2, axis=1))
    data += 0.5 * 1e-4 * np.sum(w**2)
    assert_close(objective.value(params, (x, t)), data)
    smooth = np.sum(np.sqrt(w**2 + 1e-6))
    both = f.at(0, jnp.ones(2)).value(params, names["batch"])
    assert_close(both, data + smooth)
    # Adam's share of the last example moves the bias by its rate, hfjax the kernel.
    assert_close(jnp.abs(names["updates"]["b"]), jnp.full(1, 1e-3), rtol=1e-4)
    assert jnp.all(names["updates"]["w"] != 0)


@pytest.mark.slow
def test_the_page_of_equations_solves_its_example(capsys, monkeypatch):
    monkeypatch.undo()
    names = run(blocks("equations.md"))
    assert names["error"] < 1e-6
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("relative error ")
    assert printed[2] == "(400, 2)"
    assert printed[3] == "[-1.]"  # −sin πx at x = ½, whatever the network is.


def test_an_update_reports_what_the_page_of_maths_computes():
    names = run(blocks("maths.md"))
    predicted = names["state"].info.predicted_change
    assert predicted < 0
    assert_close(names["M"], predicted)


def test_the_example_of_scaling_counts_what_a_compiled_update_holds(capsys):
    names = run(blocks("scaling.md"))
    # On one device nothing is sent. Thirty iterates and more are kept.
    assert capsys.readouterr().out.endswith(" vectors, 0 all-reduces\n")
    assert names["held"] > 5


@pytest.mark.slow
def test_the_example_of_devices_takes_the_step_of_one_device():
    names = run(blocks("devices.md"))
    assert names["count"] == 4
    assert len(names["batch"][0].sharding.device_set) == 4
    batch = tuple(np.asarray(leaf) for leaf in names["batch"])
    objective, start = names["objective"], jnp.ones((3, 1))
    grads = objective.value_and_grad(start, batch)[1]
    tx = names["tx"]
    step = tx.update(grads, tx.init(start), start, batch=batch)[0]
    assert_close(names["params"], start + step, rtol=1e-9)
