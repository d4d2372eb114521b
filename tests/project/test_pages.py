"""Examples of the pages run as they stand, and do what the pages say."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import assert_close, quick_jit

import hfjax

pytest.importorskip("flax.nnx")

DOCS = pathlib.Path(__file__).parents[2] / "docs"
TRAINERS = re.compile(r"^from (levanter|tunix|kauldron|easydel|maxtext)", re.MULTILINE)


def blocks(page):
    """Return the examples of a page."""
    text = (DOCS / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


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
        exec(block, names)
        step = names["train_step"]
        step = getattr(step, "jitted_fn", step)
        assert step._cache_size() == 1, block
        steps.append(step)
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
