"""Microbatches whose weights are all 0 are passed over: they cost nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mapped import needs_devices
from reference import assert_close, flat, quick_jit

import hfjax
from hfjax import curvature
from hfjax.objectives.cases import as_cases, subsample
from hfjax.objectives.means import Means
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import value_on_part

COUNT, CASES = 4, 12
RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.standard_normal((CASES, 3)))
T = jnp.asarray(RNG.standard_normal((CASES, 2)))
W = jnp.asarray(RNG.standard_normal((3, 2)))
# Microbatch k holds the cases k, k + 4, k + 8: only 1 and 2 count.
WEIGHTS = jnp.where(jnp.isin(jnp.arange(CASES) % COUNT, jnp.array([1, 2])), 1.5, 0.0)


def watched(runs, **options):
    """Return an objective that notes the first input of every run of its model."""

    def model_fn(w, x):
        jax.debug.callback(lambda first: runs.append(float(first)), x[0, 0])
        return jnp.tanh(x @ w)

    loss = hfjax.losses.squared_error()
    return hfjax.Objective(model_fn, loss, microbatch_size=CASES // COUNT, **options)


def runs_of(call, **options):
    """Return which microbatches a computation runs the model on."""
    runs = []
    fn = quick_jit(functools.partial(call, watched(runs, **options)))
    jax.block_until_ready(fn(W, (X, T, WEIGHTS)))
    jax.effects_barrier()
    firsts = np.asarray(X[:COUNT, 0])
    return sorted(int(np.flatnonzero(firsts == first)[0]) for first in runs)


@pytest.mark.parametrize(
    "call",
    [
        lambda f, w, batch: f.value(w, batch),
        lambda f, w, batch: f.value_and_grad(w, batch),
        lambda f, w, batch: jax.grad(f.value)(w, batch),
        lambda f, w, batch: curvature.ggn(f, w, batch)(w),
        lambda f, w, batch: curvature.hessian(f, w, batch)(w),
    ],
    ids=["value", "value_and_grad", "grad of value", "ggn", "hessian"],
)
@pytest.mark.parametrize("once", [False, True], ids=["anew", "linearize_once"])
def test_the_model_runs_on_microbatches_with_weight_alone(call, once):
    assert set(runs_of(call, linearize_once=once)) == {1, 2}


def test_three_products_with_kept_microbatches_run_the_model_once_on_each():
    def call(f, w, batch):
        product = curvature.ggn(f, w, batch)
        return jax.lax.fori_loop(0, 3, lambda _, v: product(v), w)

    assert runs_of(call, linearize_once=True) == [1, 2]


def test_the_gradient_of_the_value_is_that_of_the_cases_with_weight():
    f = watched([])
    kept = np.flatnonzero(WEIGHTS)
    x, t, w = (np.asarray(a) for a in (X[kept], T[kept], W))
    z = np.tanh(x @ w)
    truth = x.T @ ((z - t) * (1 - z**2)) / len(kept)
    found = quick_jit(jax.grad(f.value))(W, (X, T, WEIGHTS))
    np.testing.assert_allclose(found, truth, rtol=1e-12)


def test_more_microbatches_than_a_block_are_summed_as_well():
    # Of 200 terms, blocks of at most 64 are summed one by one.
    count = 200
    x = jnp.asarray(RNG.standard_normal((count, 3)))
    t = jnp.asarray(RNG.standard_normal((count, 2)))
    weights = jnp.where(jnp.arange(count) % 3 == 0, 0.0, jnp.linspace(0.5, 2, count))
    loss = hfjax.losses.squared_error()
    f = hfjax.Objective(
        lambda w, x: jnp.tanh(x @ w), loss, microbatch_size=1, linearize_once=True
    )
    value, gradient = quick_jit(f.value_and_grad)(W, (x, t, weights))
    product = quick_jit(lambda w, b: curvature.ggn(f, w, b)(jnp.cos(w)))(
        W, (x, t, weights)
    )
    share = np.asarray(weights / weights.sum())[:, None]
    z = np.tanh(x @ W)
    slope = 1 - z**2
    np.testing.assert_allclose(value, np.sum(share * (z - t) ** 2) / 2, rtol=1e-12)
    np.testing.assert_allclose(gradient, x.T @ (share * (z - t) * slope), rtol=1e-10)
    truth = x.T @ (share * slope**2 * (x @ np.cos(W)))
    np.testing.assert_allclose(product, truth, rtol=1e-10)


def test_keys_that_a_kept_product_needs_are_kept_with_its_microbatch():
    # A checkpointed model is run again in each product, and so draws its mask again.
    @jax.checkpoint
    def model_fn(w, x):
        inputs, keys = x
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (2,)))(keys)
        return jnp.tanh(inputs @ w) * mask

    keys = jax.random.split(jax.random.key(0), CASES)
    batch = ((X, keys), T, WEIGHTS)
    own = np.flatnonzero(WEIGHTS)
    alone = jax.tree.map(lambda leaf: leaf[own], ((X, keys), T))

    def product(f, batch):
        return quick_jit(lambda w, b: curvature.ggn(f, w, b)(jnp.cos(w)))(W, batch)

    loss = hfjax.losses.squared_error()
    found = product(
        hfjax.Objective(model_fn, loss, microbatch_size=3, linearize_once=True), batch
    )
    truth = product(hfjax.Objective(model_fn, loss), alone)
    np.testing.assert_allclose(found, truth, rtol=1e-12)


def test_a_part_of_a_weighted_batch_is_one_of_its_microbatches_with_weight():
    # Every fourth case would be microbatch 0, which has no weight.
    assert not np.any(np.asarray(WEIGHTS)[::4])
    inputs, _, weights = subsample((X, T, WEIGHTS), 3, 3)
    assert inputs is X
    np.testing.assert_array_equal(np.flatnonzero(weights), [1, 5, 9])
    np.testing.assert_array_equal(weights[1::4], WEIGHTS[1::4])
    # Two are needed for four cases.
    *_, weights = subsample((X, T, WEIGHTS), 4, 3)
    np.testing.assert_array_equal(weights, WEIGHTS)
    batch = (X, T, WEIGHTS)
    assert subsample(batch, 12, 3) is batch


def test_factors_of_a_weighted_batch_are_of_its_microbatches_with_weight():
    loss = hfjax.losses.squared_error()
    rule = hfjax.preconditioners.kronecker(cases=3)

    def inverse(f, batch):
        build = quick_jit(
            lambda w, b: rule.build(f, w, b, jnp.asarray(1e-3), jax.random.key(0))(w)
        )
        return flat(build(W, batch))

    # Of a linear model with ½‖z − t‖², Ḡ is the mean of random signs, and Ā that of x xᵀ.
    found = inverse(
        hfjax.Objective(lambda w, x: x @ w, loss, microbatch_size=3),
        (X, T, WEIGHTS),
    )
    nothing = inverse(
        hfjax.Objective(lambda w, x: x @ w, loss, microbatch_size=3),
        (X, T, jnp.zeros(CASES)),
    )
    assert np.linalg.norm(found) < 1e-2 * np.linalg.norm(nothing)


def test_f_on_a_part_is_that_of_the_cases_that_a_walk_is_on():
    # Of 11 cases, every fifth is taken to have two: three of them.
    f = hfjax.Objective(lambda w, x: jnp.tanh(x @ w), hfjax.losses.squared_error())
    for cases in (2, 3, 5, 11):
        batch = X[:11], T[:11]
        some = subsample(batch, cases)
        whole, part = terms_of(f, batch), terms_of(f, some)
        found = value_on_part(whole, part, W, cases)
        np.testing.assert_allclose(found, f.value(W, some), rtol=1e-12)


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_with_unequal_weights_agree_with_one(check_vma):
    # The first half of the cases alone has weight: all of it on one device.
    P = jax.sharding.PartitionSpec  # noqa: N806
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), kind, devices=jax.devices()[:2])
    weights = jnp.where(jnp.arange(CASES) < CASES // 2, 1.5, 0.0)
    loss = hfjax.losses.squared_error()

    def objective(**options):
        return hfjax.Objective(lambda w, x: jnp.tanh(x @ w), loss, **options)

    def results(f, w, batch):
        product = curvature.ggn(f, w, batch)
        slope = jax.grad(f.value)(w, batch) if f.axis_name is None or check_vma else w
        return f.value_and_grad(w, batch), product(jnp.cos(w)), slope

    own = objective(microbatch_size=2, linearize_once=True, axis_name="d")
    found = quick_jit(
        jax.shard_map(
            functools.partial(results, own),
            mesh=mesh,
            in_specs=(P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )(W, (X, T, weights))
    truth = quick_jit(functools.partial(results, objective()))(W, (X, T, weights))
    if not check_vma:
        found, truth = found[:2], truth[:2]
    assert_close(found, truth, rtol=1e-10, atol=1e-14)


def test_what_products_need_is_kept_under_shard_map(monkeypatch):
    P = jax.sharding.PartitionSpec  # noqa: N806
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("d",), kind, devices=jax.devices()[:1])
    runs = []
    f = watched(runs, linearize_once=True, axis_name="d")

    def call(w, batch):
        product = curvature.ggn(f, w, batch)
        return jax.lax.fori_loop(0, 3, lambda _, v: product(v), w)

    fn = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    jax.block_until_ready(quick_jit(fn)(W, (X, T, WEIGHTS)))
    jax.effects_barrier()
    assert len(runs) == 2


@needs_devices
def test_all_devices_go_through_the_same_microbatches():
    # A model may exchange something between the devices in each of them.
    P = jax.sharding.PartitionSpec  # noqa: N806
    kind = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), kind, devices=jax.devices()[:2])
    means = Means(2, "d", skips=True)
    weights = jnp.where(jnp.arange(CASES) < CASES // 2, 1.5, 0.0)

    def used(batch):
        return means.in_use(means.parts(as_cases(batch)))[1][None]

    fn = jax.shard_map(used, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    assert quick_jit(fn)((X, T, weights)).tolist() == [3, 3]
