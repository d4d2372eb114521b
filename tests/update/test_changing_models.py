"""Models that change between updates: objective and optimizer are made in the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from reference import assert_close, counted_jit, quick_jit

import hfjax
from hfjax._tracing import compiled


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


PARAMS = {"in": normal(0, 3, 4), "out": normal(1, 4, 2)}
BATCH = (normal(2, 6, 3), normal(3, 6, 2))
VALUES = [
    {"mean": normal(n, 3), "temperature": jnp.float64(1 / n), "scale": jnp.float64(n)}
    for n in (1, 2, 3)
]
LEVENBERG = hfjax.damping.levenberg_marquardt(init=0.1)
OPTIONS = {
    "default": {},
    "exact": {"solver": "auto", "damping": LEVENBERG},
    "remembered": {
        "damping": LEVENBERG,
        "preconditioner": hfjax.preconditioners.nystrom(rank=3, interval=5),
    },
}


def objective_at(values):
    """Return an objective whose model and loss close over arrays."""

    def model_fn(params, x):
        hidden = jnp.tanh((x - values["mean"][None]) @ params["in"])
        return hidden @ params["out"] / values["temperature"]

    def loss(outputs, targets):
        return values["scale"] * (outputs - targets) ** 2

    return hfjax.Objective(model_fn, loss)


def one_update(kind, params, state, values):
    objective = objective_at(values)
    tx = hfjax.hessian_free(objective, **OPTIONS[kind])
    return training.train_step(objective, tx, params, state, BATCH)


def start(kind):
    return hfjax.hessian_free(objective_at(VALUES[0]), **OPTIONS[kind]).init(PARAMS)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_step_of_traced_values_compiles_once_and_is_the_step_of_constants(kind):
    step, traced = counted_jit(functools.partial(one_update, kind))
    params, state = PARAMS, start(kind)
    for values in VALUES:
        before = params, state
        params, state = step(params, state, values)
        assert state.info.accepted
    assert len(traced) == 1
    constant = quick_jit(functools.partial(one_update, kind, values=VALUES[-1]))
    assert_close(params, constant(*before)[0], rtol=1e-7)


def test_a_rejected_step_says_so_to_what_comes_after_it():
    def step(params, statistics, batch):
        objective = objective_at({**VALUES[0], "mean": statistics})
        tx = hfjax.hessian_free(objective, damping=LEVENBERG, preconditioner=None)
        params, state = training.train_step(
            objective, tx, params, tx.init(params), batch
        )
        new = 0.5 * statistics + 0.5 * jnp.mean(batch[0], axis=0)
        return params, jnp.where(state.info.accepted, new, statistics), state.info

    step, statistics = quick_jit(step), normal(1, 3)
    params, after, info = step(PARAMS, statistics, BATCH)
    assert info.accepted
    np.testing.assert_allclose(after, (statistics + jnp.mean(BATCH[0], axis=0)) / 2)
    spoilt = BATCH[0].at[0].set(jnp.nan), BATCH[1]
    last, kept, info = step(params, after, spoilt)
    assert info.rejection == hfjax.Rejection.NONFINITE_GRADIENT
    np.testing.assert_array_equal(kept, after)
    jax.tree.map(np.testing.assert_array_equal, last, params)


def of_linen(x):
    """Return a linen network in training mode: run it, its parameters, its statistics."""
    nn = pytest.importorskip("flax.linen")

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.8)(nn.Dense(4)(x))
            return nn.Dense(1)(jnp.tanh(x))

    variables = Network().init(jax.random.key(0), x)

    def run(params, statistics, x):
        given = {"params": params, "batch_stats": statistics}
        outputs, after = Network().apply(given, x, mutable=["batch_stats"])
        return outputs, after["batch_stats"]

    start = variables["batch_stats"]
    return lambda p, x: run(p, start, x)[0], variables["params"], start, run


def of_nnx(x):
    nnx = pytest.importorskip("flax.nnx")
    flax = pytest.importorskip("hfjax.flax")
    rngs, tanh = nnx.Rngs(0), jnp.tanh
    norm = nnx.BatchNorm(4, momentum=0.8, rngs=rngs)
    layers = nnx.Linear(x.shape[1], 4, rngs=rngs), norm, tanh
    model = nnx.Sequential(*layers, nnx.Linear(4, 1, rngs=rngs))
    graph, params, start = nnx.split(model, nnx.Param, ...)

    def run(params, statistics, x):
        module = nnx.merge(graph, params, statistics, copy=True)
        outputs = module(x)
        return outputs, nnx.state(module, nnx.BatchStat)

    return flax.nnx_model_fn(model, whole_batch=True), params, start, run


@pytest.mark.parametrize("make", [of_linen, of_nnx])
def test_batch_normalisation_in_training_mode_trains_and_moves_its_statistics(make):
    x, t = jax.tree.map(jnp.float32, (BATCH[0], BATCH[1][:, :1]))
    with jax.numpy_rank_promotion("allow"):
        model_fn, params, statistics, run = make(x)
        squared = hfjax.losses.squared_error()
        objective = hfjax.Objective(model_fn, squared, whole_batch=True)
        tx = hfjax.hessian_free(objective, damping=LEVENBERG, preconditioner=None)

        def mean(params):
            return jnp.mean((run(params, statistics, x)[0] - t) ** 2) / 2

        def step(params, state):
            found = objective.value_and_grad(params, (x, t))
            after, state = training.train_step(objective, tx, params, state, (x, t))
            truth = jax.value_and_grad(mean)(params)
            return found, truth, mean(after), state.info, run(after, statistics, x)[1]

        found, truth, after, info, moved = quick_jit(step)(params, tx.init(params))
    assert_close(found, truth, rtol=1e-4, atol=1e-6)
    assert info.accepted
    np.testing.assert_allclose(info.value_after, after, rtol=1e-4)
    assert after < truth[0]
    for old, new in zip(*map(jax.tree.leaves, (statistics, moved)), strict=True):
        assert np.all(np.asarray(old) != np.asarray(new))


@pytest.mark.slow
def test_outside_of_jit_a_new_optimizer_compiles_nothing_for_another_array():
    def update(values):
        objective = objective_at(values)
        tx = hfjax.hessian_free(objective, damping=LEVENBERG, preconditioner=None)
        grads = objective.value_and_grad(PARAMS, BATCH)[1]
        return tx.update(grads, tx.init(PARAMS), PARAMS, batch=BATCH)[0]

    update(VALUES[0])
    compiled_before = compiled._compiled.cache_info().misses
    found = update(VALUES[1])
    assert compiled._compiled.cache_info().misses == compiled_before
    assert_close(found, quick_jit(update)(VALUES[1]), rtol=1e-6)
    assert optax.tree.norm(found) > 0
