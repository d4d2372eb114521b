"""Sums of very many terms in float32, beside float64: digits are not lost one by one."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mapped import needs_devices
from reference import quick_jit

import hfjax
from hfjax import curvature, diagonals
from hfjax._core import sums, trees

N = 100_000
SQUARED = hfjax.losses.squared_error()
RNG = np.random.default_rng(0)


def worst(found, truth):
    """Return the largest relative error, over all entries of a tree."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    return max(np.max(np.abs(np.asarray(x, float) - y) / np.abs(y)) for x, y in pairs)


def model_fn(params, x):
    return jnp.exp(x @ params["w"])


PARAMS = {"w": jnp.asarray([[0.7], [-0.2]], jnp.float32)}
V = {"w": jnp.asarray([[1.0], [2.0]], jnp.float32)}
# Rounding is worst, and all to one side, where the terms hardly differ.
X = (0.3 + 1e-3 * RNG.random((N, 2))).astype(np.float32)
T = np.full((N, 1), 0.3, np.float32)
WEIGHTS = np.where(RNG.random(N) < 0.3, 0, 0.1).astype(np.float32)


def truth(weights):
    """Compute f, ∇f, G v, H v and both diagonals in NumPy, in float64."""
    x, t, w, v = (np.asarray(a, float) for a in (X, T, PARAMS["w"], V["w"]))
    share = (weights.astype(float) / weights.astype(float).sum())[:, None]
    z = np.exp(x @ w)
    r = z - t
    g = x.T @ (share * z * r)
    ggn = x.T @ (share * z**2 * (x @ v))
    hessian = ggn + x.T @ (share * z * r * (x @ v))
    fisher = (x**2).T @ (share * (z * r) ** 2)
    diagonal = (x**2).T @ (share * z**2)
    return np.sum(share * r**2) / 2, g, ggn, hessian, fisher, diagonal


@pytest.mark.parametrize("once", [False, True], ids=["anew", "linearize_once"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_sums_over_very_many_microbatches_are_as_precise_as_over_one(weighted, once):
    f = hfjax.Objective(model_fn, SQUARED, microbatch_size=1, linearize_once=once)
    weights = WEIGHTS if weighted else np.ones(N, np.float32)
    batch = (X, T, weights)

    @quick_jit
    def everything(params):
        value, gradient = f.value_and_grad(params, batch)
        return (
            value,
            gradient["w"],
            curvature.ggn(f, params, batch)(V)["w"],
            curvature.hessian(f, params, batch)(V)["w"],
            diagonals.empirical_fisher(f, params, batch)["w"],
            diagonals.ggn_exact(f, params, batch)["w"],
        )

    found = everything(PARAMS)
    assert all(x.dtype == jnp.float32 for x in found)
    assert worst(found, truth(weights)) < 1e-6


@pytest.mark.parametrize("count", [sums.FEW, sums.FEW + 1, 3000, N])
def test_a_sum_of_many_terms_is_that_of_float64(count):
    terms = (0.1 + 1e-4 * RNG.standard_normal((count, 2))).astype(np.float32)
    terms[:, 1] *= np.where(np.arange(count) % 2, 1, -1)
    total = quick_jit(
        lambda terms: sums.summed(lambda k: terms[k], count, jnp.zeros(2, jnp.float32))
    )(terms)
    size = np.sum(np.abs(terms.astype(float)), axis=0)
    error = np.abs(np.asarray(total, float) - terms.astype(float).sum(axis=0))
    assert np.all(error <= 1e-6 * size)


def test_a_sum_that_overflows_is_infinite_and_one_of_nan_is_nan():
    def total(at, what):
        terms = jnp.full(N, 1.0, jnp.float32).at[at].set(what)
        return quick_jit(
            lambda terms: sums.summed(lambda k: terms[k], N, jnp.zeros((), terms.dtype))
        )(terms)

    for at in (0, N // 2, N - 1):
        assert total(at, jnp.inf) == jnp.inf
        assert total(at, -jnp.inf) == -jnp.inf
        assert jnp.isnan(total(at, jnp.nan))
    largest = jnp.finfo(jnp.float32).max
    zero = jnp.zeros((), jnp.float32)
    beyond = quick_jit(lambda: sums.summed(lambda k: largest, N, zero))()
    assert beyond == jnp.inf


def test_the_tangent_of_a_sum_is_as_precise():
    # A product with the Hessian differentiates the sum of the gradients.
    terms = (0.1 + 1e-4 * RNG.standard_normal(N)).astype(np.float32)

    def total(a):
        return sums.summed(lambda k: a * terms[k], N, jnp.zeros((), jnp.float32))

    one = jnp.ones((), jnp.float32)
    terms = jnp.asarray(terms)
    _, forward = quick_jit(lambda a: jax.jvp(total, (a,), (one,)))(one)
    expected = np.asarray(terms, float).sum()
    assert worst(forward, expected) < 2e-7


@pytest.mark.parametrize("once", [False, True], ids=["anew", "linearize_once"])
def test_the_model_is_in_the_program_as_often_as_with_few_microbatches(once):
    f = hfjax.Objective(model_fn, SQUARED, microbatch_size=1, linearize_once=once)
    tx = hfjax.hessian_free(f, sampling=None)

    def exponentials(cases):
        batch = (X[:cases], T[:cases])

        def step(params):
            grads = f.value_and_grad(params, batch)[1]
            return tx.update(grads, tx.init(params), params, batch=batch)

        return str(jax.make_jaxpr(step)(PARAMS)).count("= exp ")

    # Of more than 4,000 cases rules look at a part, and at all of them in the end.
    assert exponentials(1500) == exponentials(5) > 0


def test_a_batch_that_is_closed_over_is_not_copied_in_every_block():
    # It then takes a hundred times as long; ten is far from both.
    f = hfjax.Objective(model_fn, SQUARED, microbatch_size=1)
    batch = jnp.tile(X, (5, 1)), jnp.tile(T, (5, 1))

    def seconds(fn, *args):
        program = jax.jit(fn).lower(*args).compile()
        taken = []
        for _ in range(3):
            start = time.process_time()
            jax.block_until_ready(program(*args))
            taken.append(time.process_time() - start)
        return min(taken)

    passed = seconds(f.value, PARAMS, batch)
    assert seconds(lambda params: f.value(params, batch), PARAMS) < 10 * passed


def test_random_keys_may_be_among_very_many_inputs():
    f = hfjax.Objective(
        lambda p, x: (
            jnp.exp(x[0] @ p["w"])
            * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (1,)))(x[1])
        ),
        SQUARED,
        microbatch_size=1,
    )
    keys = jax.random.split(jax.random.key(0), 200)
    batch = ((jnp.asarray(X[:200]), keys), jnp.asarray(T[:200]))
    one = quick_jit(f.value)(PARAMS, batch)
    whole = quick_jit(hfjax.Objective(f.model_fn, SQUARED).value)(PARAMS, batch)
    np.testing.assert_allclose(one, whole, rtol=1e-6)


@needs_devices
@pytest.mark.parametrize("once", [False, True], ids=["anew", "linearize_once"])
def test_devices_with_very_many_microbatches_agree_with_one(once):
    f = hfjax.Objective(
        model_fn, SQUARED, microbatch_size=1, linearize_once=once, axis_name="d"
    )
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec  # noqa: N806

    def compute(params, batch):
        value, gradient = f.value_and_grad(params, batch)
        return value, gradient["w"], curvature.ggn(f, params, batch)(V)["w"]

    for check_vma in (True, False):
        found = quick_jit(
            jax.shard_map(
                compute,
                mesh=mesh,
                in_specs=(P(), P("d")),
                out_specs=P(),
                check_vma=check_vma,
            )
        )(PARAMS, (X, T, WEIGHTS))
        assert worst(found, truth(WEIGHTS)[:3]) < 1e-6


def test_a_sum_over_many_leaves_goes_by_pairs():
    leaves = [np.float32(0.1)] * 4097
    total = trees.sum_leaves([jnp.asarray(x) for x in leaves], jnp.float32)
    assert worst(total, float(np.float32(0.1)) * 4097) < 1e-7
    tree = [jnp.full(1, 0.1, jnp.float32)] * 1025
    square = quick_jit(lambda: trees.dot(tree, tree))()
    assert worst(square, float(np.float32(0.1)) ** 2 * 1025) < 2e-7


def test_a_diagonal_over_very_many_outputs_is_that_of_float64():
    outputs = 3000
    f = hfjax.Objective(lambda p, x: x * p[None], SQUARED)
    x = np.full((1, outputs), 0.1, np.float32)
    p = jnp.ones(1, jnp.float32)
    found = quick_jit(
        lambda p: diagonals.ggn_exact(f, p, (x, jnp.zeros((1, outputs), jnp.float32)))
    )(p)
    assert worst(found, outputs * float(np.float32(0.1)) ** 2) < 3e-7
