"""Derivatives through what solves: right, or refused with one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, quick_jit

import hfjax
from hfjax import cg, krylov, spectrum, trust_region
from hfjax._core.types import Approximate

N = 6
RNG = np.random.default_rng(0)
ROOT = RNG.standard_normal((N, N))
A = jnp.asarray(ROOT @ ROOT.T + np.eye(N))
CHANGE = jnp.asarray(RNG.standard_normal((N, N)))
CHANGE = CHANGE + CHANGE.T
B = jnp.asarray(RNG.standard_normal(N))
DB = jnp.asarray(RNG.standard_normal(N))
STARTS = {"generic": B, "zero": jnp.zeros(N), "eigenvector": jnp.linalg.eigh(A)[1][0]}


def split(x):
    """Return a tree with a hole, of two arrays."""
    return {"a": (x[:2], None), "b": x[2:].reshape(2, 2)}


def joined(tree):
    return jnp.concatenate([tree["a"][0], tree["b"].reshape(-1)])


def by_trees(a, damping, b):
    """Solve (A + λI) x = b by a preconditioned run on trees."""
    inverse = cg.inverse(
        lambda v: split(a @ joined(v)),
        damping=damping,
        preconditioner=lambda r: split(joined(r) / (jnp.diag(a) + damping)),
        tolerance=1e-13,
    )
    return joined(inverse(split(b)))


def densely(a, damping, b):
    return jnp.linalg.solve(a + damping * jnp.eye(N), b)


def weighed(solve):
    return lambda *args: jnp.sum(jnp.sin(jnp.arange(1.0, N + 1) * solve(*args)))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_inverse_is_differentiated_by_b_lambda_and_what_the_product_holds(
    mode, start
):
    here, along = (A, jnp.asarray(0.3), STARTS[start]), (CHANGE, jnp.asarray(0.7), DB)
    if mode == "forward":
        found, truth = (
            quick_jit(lambda f=f: jax.jvp(f, here, along)[1])()
            for f in (by_trees, densely)
        )
    else:
        found, truth = (
            quick_jit(jax.grad(weighed(f), argnums=(0, 1, 2)))(*here)
            for f in (by_trees, densely)
        )
        found, truth = ((x[0] + x[0].T, *x[1:]) for x in (found, truth))
    assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_inverse_has_second_derivatives_and_batches_of_right_hand_sides():
    def curved(solve):
        return quick_jit(jax.hessian(lambda s, b: weighed(solve)(s * A, 0.1, b)))

    np.testing.assert_allclose(
        curved(by_trees)(1.5, B), curved(densely)(1.5, B), rtol=1e-8
    )
    many = jnp.stack([B, DB, jnp.zeros(N)])

    def sloped(solve):
        return quick_jit(
            jax.vmap(jax.grad(lambda b: weighed(solve)(A, 0.1, b)), in_axes=0)
        )

    np.testing.assert_allclose(
        sloped(by_trees)(many), sloped(densely)(many), rtol=1e-8, atol=1e-10
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_short_floats_keep_their_dtype_in_derivatives(dtype):
    d = jnp.array([1.0, 2.0, 4.0], dtype)
    slope = jax.grad(lambda b: jnp.sum(cg.inverse(lambda v: d * v)(b)))(
        jnp.ones_like(d)
    )
    assert slope.dtype == dtype
    np.testing.assert_allclose(slope.astype(float), [1, 0.5, 0.25], rtol=1e-2)


@pytest.mark.slow
def test_of_an_approximate_product_the_exact_one_is_differentiated():
    def solved(scale):
        product = Approximate(lambda v: 2 * v, lambda v: scale * v)
        return cg.inverse(product)(jnp.ones(2))

    # d(x / s) = −x / s, with A = 2 in the run and its derivative of `scale`.
    np.testing.assert_allclose(jax.jacfwd(solved)(2.0), -0.25, rtol=1e-6)


@pytest.mark.slow
def test_a_bilevel_problem_is_solved_by_differentiating_the_inverse():
    x, t = jnp.asarray(RNG.standard_normal((9, 3))), jnp.asarray(RNG.standard_normal(9))
    f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())

    def fitted(weights):
        product = hfjax.curvature.ggn(f, jnp.zeros(3), (x, t, weights))
        gradient = f.value_and_grad(jnp.zeros(3), (x, t, weights))[1]
        return cg.inverse(product, damping=0.1, tolerance=1e-12)(-gradient)

    def truth(weights):
        share = weights / jnp.sum(weights)
        g = x.T @ (share[:, None] * x) + 0.1 * jnp.eye(3)
        return jnp.linalg.solve(g, x.T @ (share * t))

    weights = jnp.linspace(0.5, 1.5, 9)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(
            quick_jit(mode(fitted))(weights),
            mode(truth)(weights),
            rtol=1e-8,
            atol=1e-10,
        )


def update_by(solver, damping=None):
    f = hfjax.Objective(lambda p, x: jnp.tanh(x @ p), hfjax.losses.squared_error())
    batch = (jnp.eye(N)[:3], jnp.ones(3))
    tx = hfjax.hessian_free(
        f,
        solver=solver,
        damping=damping or hfjax.damping.constant(0.1),
        preconditioner=None,
        backtracking=None,
        line_search=None,
    )

    def update(a):
        params = a[0] / 10
        grads = f.value_and_grad(params, batch)[1]
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    return update


REFUSED = {
    "cg.solve": lambda a: cg.solve(lambda v: a @ v, B).x,
    "cg.solve's M": lambda a: cg.solve(lambda v: a @ v, B).model_values,
    "trust_region.solve": lambda a: trust_region.solve(lambda v: a @ v, B, 1.0).x,
    "krylov.basis": lambda a: krylov.basis(lambda v: a @ v, B, 3).matrix,
    "spectrum.density": lambda a: (
        spectrum.density(
            lambda v: a @ v, B, key=jax.random.key(0), num_probes=1, num_iterations=3
        ).nodes
    ),
    "an update": update_by(cg.conjugate_gradient(max_iterations=3)),
    "an update in a region": update_by(
        trust_region.steihaug_toint(max_iterations=3), trust_region.radius()
    ),
    "an exact update": update_by(hfjax.sample_space.cholesky(corrections=0)),
}


MODES = {
    "forward": lambda f: lambda a: jax.jvp(f, (a,), (a,))[1],
    "reverse": lambda f: jax.grad(lambda a: jnp.sum(f(a))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("result", REFUSED)
def test_a_run_that_stops_early_refuses_to_be_differentiated(result, mode):
    derivative = jax.jit(MODES[mode](REFUSED[result]))
    with pytest.raises(TypeError, match=r"no derivative: it stops early.*cg\.inverse"):
        derivative.lower(A)


@pytest.mark.slow
def test_a_run_whose_derivative_nobody_uses_is_not_refused():
    stop = jax.lax.stop_gradient

    def by(stopped):
        return quick_jit(jax.value_and_grad(lambda a: jnp.sum(a[0] * stopped(a))))(A)[1]

    solve = REFUSED["cg.solve"]
    expected = jnp.zeros_like(A).at[0].set(solve(A))
    np.testing.assert_allclose(by(lambda a: solve(stop(a))), expected, rtol=1e-12)
    np.testing.assert_allclose(by(lambda a: stop(solve(a))), expected, rtol=1e-12)
    # What does not depend on anything differentiated has no derivative to be refused.
    slope = jax.jvp(lambda b: b * solve(A), (B,), (DB,))[1]
    np.testing.assert_allclose(slope, DB * solve(A), rtol=1e-12)


@pytest.mark.slow
def test_eigenvalues_have_first_derivatives_in_both_modes_and_their_vectors_none():
    def found(a):
        return spectrum.eigenvalues(
            lambda v: a @ v, B, key=jax.random.key(0), num=2, which="largest"
        )

    def largest(a):
        return found(a).values

    values, vectors = np.linalg.eigh(A)
    truth = [vectors[:, k] @ CHANGE @ vectors[:, k] for k in (-1, -2)]
    slope = quick_jit(lambda: jax.jvp(largest, (A,), (CHANGE,))[1])()
    np.testing.assert_allclose(slope, truth, rtol=1e-9)
    np.testing.assert_allclose(largest(A), values[::-1][:2], rtol=1e-12)
    gradient = quick_jit(jax.grad(lambda a: largest(a)[0]))(A)
    np.testing.assert_allclose(
        gradient, np.outer(vectors[:, -1], vectors[:, -1]), atol=1e-9
    )
    bent = jax.jvp(lambda a: found(a).vectors, (A,), (CHANGE,))[1]
    assert np.all(np.isnan(bent))
    curved = jax.jvp(jax.grad(lambda a: largest(a)[0]), (A,), (CHANGE,))[1]
    assert np.all(np.isnan(curved))


def test_the_derivative_of_the_trace_is_the_trace_of_the_derivative():
    d = jnp.arange(1.0, 4.0)

    def trace(d):
        return spectrum.trace(lambda v: d * v, d, key=jax.random.key(0)).value

    np.testing.assert_allclose(jax.grad(trace)(d), np.ones(3), rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(trace, (d,), (d,))[1], 6, rtol=1e-12)
