"""Eigenvalues, densities, traces and Ritz values, beside dense float64 truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import flat, quick_jit

import hfjax
from hfjax import spectrum
from hfjax.inspection._eigenvalues import _random

LIKE = {"a": jnp.zeros((2, 4)), "b": jnp.zeros(5)}
SIZE = 13


def symmetric(values, seed=0):
    """Return a dense matrix of these eigenvalues, and its product on trees."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))
    dense = q @ np.diag(values) @ q.T
    _, unravel = ravel_pytree(LIKE)
    return dense, lambda v: unravel(jnp.asarray(dense) @ ravel_pytree(v)[0])


@pytest.mark.slow
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_a_few_eigenvalues_of_a_spread_spectrum_are_those_of_the_matrix(which):
    ends = [-30.0, -12.0, -5.0, 8.0, 20.0, 50.0]
    values = np.concatenate([ends, np.linspace(-0.1, 0.1, 7)])
    dense, matvec = symmetric(values)
    find = functools.partial(
        spectrum.eigenvalues, matvec, LIKE, num=3, which=which, num_iterations=10
    )
    found = quick_jit(lambda key: find(key=key))(jax.random.key(0))
    expected = {
        "largest": np.sort(values)[::-1],
        "smallest": np.sort(values),
        "magnitude": values[np.argsort(-np.abs(values))],
    }[which][:3]
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)
    # The residual bounds the error, and the vectors are those of the values.
    errors = np.abs(found.values - expected)
    assert np.all(errors <= found.residuals + 1e-12)
    rows = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(found.vectors))
    assert rows.shape == (3, SIZE)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-10)
    residuals = np.linalg.norm(dense @ rows.T - rows.T @ np.diag(found.values), axis=0)
    np.testing.assert_allclose(residuals, found.residuals, atol=1e-10)
    assert found.residuals.max() > 1e-12  # Ten products are not all of thirteen.


@pytest.mark.slow
def test_all_copies_of_a_multiple_eigenvalue_are_found():
    values = np.array([5.0] * 3 + [1.0] * 10)
    _, matvec = symmetric(values)
    found = spectrum.eigenvalues(matvec, LIKE, key=jax.random.key(0), num=5)
    np.testing.assert_allclose(found.values, [5, 5, 5, 1, 1], rtol=1e-10)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-10)


def test_more_eigenvalues_than_there_are_are_refused():
    with pytest.raises(ValueError, match="13 here, got 14"):
        spectrum.eigenvalues(lambda v: v, LIKE, key=jax.random.key(0), num=14)
    with pytest.raises(ValueError, match="largest"):
        spectrum.eigenvalues(lambda v: v, LIKE, key=jax.random.key(0), which="top")


@pytest.mark.slow
def test_a_probe_integrates_polynomials_of_degree_2k_minus_1_exactly():
    values = np.linspace(-1, 2, SIZE)
    dense, matvec = symmetric(values)
    key = jax.random.key(3)
    found = spectrum.density(matvec, LIKE, key=key, num_probes=2, num_iterations=4)
    np.testing.assert_allclose(np.sum(found.weights, axis=1), 1)
    for k, probe in enumerate(jax.random.split(key, 2)):
        v = flat(spectrum._signs(probe, LIKE))
        for degree in range(8):
            power = np.linalg.matrix_power(dense, degree)
            quadrature = np.sum(found.weights[k] * found.nodes[k] ** degree)
            np.testing.assert_allclose(quadrature, v @ power @ v / SIZE, rtol=1e-9)
        exact = v @ np.linalg.matrix_power(dense, 8) @ v / SIZE
        quadrature = np.sum(found.weights[k] * found.nodes[k] ** 8)
        assert abs(quadrature - exact) > 1e-6


@pytest.mark.slow
def test_a_density_integrates_to_one_and_has_its_mass_where_eigenvalues_are():
    values = np.array([0.0] * 10 + [4.0] * 3)
    _, matvec = symmetric(values)
    found = spectrum.density(
        matvec, LIKE, key=jax.random.key(0), num_probes=200, num_iterations=3
    )
    points = np.linspace(-2, 6, 801)
    heights = found.at(points, 0.1)
    np.testing.assert_allclose(np.trapezoid(heights, points), 1, rtol=1e-6)
    upper = np.trapezoid(heights[points > 2], points[points > 2])
    # A probe's share has variance 2 (Σ P²ᵢⱼ, i ≠ j) / n², at most 2 · 3 / 169.
    assert abs(upper - 3 / 13) < 4 * np.sqrt(2 * 3 / 169 / 200)


def test_trace_is_unbiased_and_knows_its_error():
    values = np.linspace(0, 3, SIZE)
    dense, matvec = symmetric(values)
    find = quick_jit(
        jax.vmap(lambda key: spectrum.trace(matvec, LIKE, key=key, num_probes=8))
    )
    found = find(jax.random.split(jax.random.key(0), 500))
    truth = np.sqrt(2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / 8)
    assert abs(found.value.mean() - np.trace(dense)) < 4 * truth / np.sqrt(500)
    np.testing.assert_allclose(found.value.std(), truth, rtol=0.15)
    np.testing.assert_allclose(np.mean(found.standard_error**2), truth**2, rtol=0.15)


def test_trace_of_a_diagonal_matrix_is_exact():
    diagonal = jax.tree.map(lambda x: 1.0 + jnp.arange(x.size).reshape(x.shape), LIKE)
    found = spectrum.trace(
        lambda v: jax.tree.map(jnp.multiply, diagonal, v), LIKE, key=jax.random.key(0)
    )
    np.testing.assert_allclose(found.value, 36 + 15, rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, 0, atol=1e-12)


def test_ritz_values_of_a_whole_run_are_the_eigenvalues_of_the_preconditioned_matrix():
    values = 1.3 ** np.arange(SIZE)
    dense, matvec = symmetric(values)
    b = jax.tree.map(lambda x: 1e3 * (1 + jnp.arange(x.size)).reshape(x.shape), LIKE)
    scales = jax.tree.map(lambda x: 1e-3 * (2 + jnp.cos(x)), b)
    run = quick_jit(
        lambda b: hfjax.cg.solve(
            matvec,
            b,
            preconditioner=lambda r: jax.tree.map(jnp.multiply, scales, r),
            stopping=None,
            max_iterations=SIZE,
        )
    )(b)
    root = np.sqrt(flat(scales))
    expected = np.linalg.eigvalsh(root[:, None] * dense * root[None])[::-1]
    found = spectrum.ritz_values(run.coefficients)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ritz_values_of_a_short_run_are_those_of_its_krylov_space():
    dense, matvec = symmetric(np.linspace(1, 9, SIZE))
    b = _random(jax.random.key(1), LIKE)
    run = hfjax.cg.solve(matvec, b, stopping=None, max_iterations=5)
    powers = [flat(b)]
    for _ in range(4):
        powers.append(dense @ powers[-1])
    q, _ = np.linalg.qr(np.stack(powers).T)
    expected = np.linalg.eigvalsh(q.T @ dense @ q)[::-1]
    found = spectrum.ritz_values(run.coefficients)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert run.coefficients.shape == (5, 2)


def test_copies_that_rounding_makes_of_a_ritz_value_are_merged():
    d = 1000 * 0.7 ** np.arange(30)
    scale = jnp.asarray(d, jnp.float32)
    run = quick_jit(
        lambda b: hfjax.cg.solve(
            lambda v: scale * v, b, stopping=None, max_iterations=60
        )
    )(jnp.ones(30, jnp.float32))
    everything = spectrum.ritz_values(run.coefficients, tolerance=0.0)
    assert np.sum(np.abs(everything - 1000) < 1) > 1  # Orthogonality is lost.
    found = spectrum.ritz_values(run.coefficients)
    np.testing.assert_allclose(found[:5], d[:5], rtol=1e-5)
    assert len(found) < len(everything)


@pytest.mark.parametrize("radius", [None, 0.05])
def test_ritz_values_end_where_the_run_meets_negative_curvature(radius):
    values = np.linspace(-1, 9, SIZE)
    _, matvec = symmetric(values)
    b = _random(jax.random.key(1), LIKE)
    if radius is None:
        run = hfjax.cg.solve(matvec, b, stopping=None, max_iterations=SIZE)
        coefficients = run.coefficients
        assert run.reason == hfjax.cg.Reason.NONPOSITIVE_CURVATURE
        found = spectrum.ritz_values(coefficients)
        assert len(found) == run.num_iterations
    else:
        solver = hfjax.trust_region.steihaug_toint(max_iterations=SIZE, stopping=None)
        system = hfjax.cg.System(
            matvec, b, jnp.asarray(radius), jnp.int32(0), None, None, None
        )
        found = spectrum.ritz_values(solver.solve(system, None).stats.coefficients)
        assert len(found) >= 1
    assert np.all((found > 0) & (found <= 9 + 1e-9))


@pytest.mark.parametrize("why", ["curvature", "product"])
def test_the_coefficients_of_a_stopped_iteration_are_zero_and_those_before_lanczos(why):
    # α and β of the textbook up to the last step that was taken; nothing of what ended it.
    diagonal, b = np.array([1.0, 3.0, 7.0, 20.0]), np.array([1.0, 1.0, 1.0, 0.1])
    if why == "curvature":
        diagonal[3], b[3] = -50.0, 1e-3
    expected, r, p = [], -b, b.copy()
    while p @ (diagonal * p) > 0 and len(expected) < 2:
        alpha = (r @ r) / (p @ (diagonal * p))
        after = r + alpha * diagonal * p
        beta = (after @ after) / (r @ r)
        expected.append((alpha, beta))
        r, p = after, -after + beta * p

    def matvec(v):
        # The cosines of the directions with b are 1, 0.58 and 0.47: break the third.
        cosine = jnp.sum(v * b) / jnp.linalg.norm(v) / np.linalg.norm(b)
        bad = (jnp.abs(cosine) < 0.52) & (why == "product")
        return jnp.where(bad, jnp.nan, jnp.asarray(diagonal) * v)

    run = hfjax.cg.solve(matvec, jnp.asarray(b), stopping=None, max_iterations=12)
    reasons = hfjax.cg.Reason
    ended = {"curvature": reasons.NONPOSITIVE_CURVATURE, "product": reasons.NONFINITE}
    assert run.reason == ended[why]
    count = int(run.num_iterations)
    assert count == len(expected) == 2
    np.testing.assert_allclose(run.coefficients[:count], expected[:count], rtol=1e-6)
    np.testing.assert_array_equal(run.coefficients[count:], 0)


def test_a_run_without_iterations_has_no_ritz_values():
    run = hfjax.cg.solve(lambda v: v, jnp.zeros(3))
    assert spectrum.ritz_values(run.coefficients).shape == (0,)


@pytest.mark.slow
def test_the_last_run_is_in_the_state():
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p), hfjax.losses.squared_error()
    )
    x = jax.random.normal(jax.random.key(0), (20, 3))
    batch, params = (x, jnp.sin(x)), jnp.zeros((3, 3))
    tx = hfjax.hessian_free(
        objective,
        solver=hfjax.cg.conjugate_gradient(max_iterations=6),
        preconditioner=None,
    )
    update = quick_jit(tx.update)
    state = tx.init(params)
    for _ in range(2):
        _, grads = objective.value_and_grad(params, batch)
        before = jax.tree.structure(state), jax.tree.map(jnp.shape, state)
        _, state = update(grads, state, params, batch=batch)
        assert before == (jax.tree.structure(state), jax.tree.map(jnp.shape, state))
    exact = hfjax.hessian_free(objective, solver=hfjax.sample_space.cholesky())
    assert exact.init(params).record is None
    product = hfjax.curvature.ggn(objective, params, batch)
    dense = jax.vmap(product)(jnp.eye(9).reshape(9, 3, 3)).reshape(9, 9)
    # Both updates were at the same parameters, the second with another λ.
    found = spectrum.ritz_values(state.record.coefficients)
    eigenvalues = np.linalg.eigvalsh(dense)
    assert len(found) == state.info.cg_iterations
    assert found[0] <= eigenvalues[-1] + 1 + 1e-6
    assert found[-1] >= eigenvalues[0]
    assert state.record.model_values[-1] == pytest.approx(
        state.record.model_values[state.info.cg_iterations]
    )


def test_inverse_solves_to_its_tolerance():
    dense, matvec = symmetric(np.linspace(0, 3, SIZE))
    solve = quick_jit(hfjax.cg.inverse(matvec, damping=0.1, tolerance=1e-9))
    v = _random(jax.random.key(0), LIKE)
    damped, b = dense + 0.1 * np.eye(SIZE), flat(v)
    np.testing.assert_allclose(flat(solve(v)), np.linalg.solve(damped, b), rtol=1e-6)
    rough = hfjax.cg.inverse(matvec, damping=0.1, tolerance=0.1)(v)
    error = np.linalg.norm(damped @ flat(rough) - b) / np.linalg.norm(b)
    assert 1e-4 < error <= 0.1


@pytest.mark.slow
def test_float32_keeps_its_dtype():
    like = jnp.zeros(6, jnp.float32)
    d = jnp.arange(1.0, 7.0, dtype=jnp.float32)
    found = spectrum.eigenvalues(lambda v: d * v, like, key=jax.random.key(0))
    assert found.values.dtype == found.vectors.dtype == jnp.float32
    np.testing.assert_allclose(found.values, 6, rtol=1e-5)
    estimate = spectrum.trace(lambda v: d * v, like, key=jax.random.key(0))
    assert estimate.value.dtype == estimate.standard_error.dtype == jnp.float32
    density = spectrum.density(lambda v: d * v, like, key=jax.random.key(0))
    assert density.nodes.dtype == jnp.float32
