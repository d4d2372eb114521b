"""Covariance and last steps from a factor of J, against exact fractions and NumPy."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

import hfjax
from hfjax.training import _factors
from hfjax.training._descent import Problem
from hfjax.training._run import empty_history
from hfjax.training.least_squares import LeastSquaresFit

NEAR = 2.0**-30
"""Beside 1 it is seen by J, and its square is not seen by JᵀJ."""
NARROW = np.array([[1, 1], [1, 1 + NEAR], [1, 1 - NEAR], [1, 1 + 3 * NEAR]])


def exact(matrix):
    """Return (JᵀJ)⁻¹ of two columns, by fractions."""
    (a, b), (_, d) = [
        [
            sum(Fraction(x) * Fraction(y) for x, y in zip(p, q, strict=True))
            for q in matrix.T
        ]
        for p in matrix.T
    ]
    det = a * d - b * b
    return np.array([[d, -b], [-b, a]], dtype=object) / det


def test_a_covariance_keeps_its_digits_where_the_square_of_j_has_none():
    # In other units the parameters are as far apart as they were.
    for units in ([1.0, 1.0], [2.0**60, 2.0**-90]):
        matrix = NARROW * np.array(units)
        found = quick_jit(_factors.spread)(jnp.asarray(matrix), jnp.zeros(4))
        truth = exact(matrix).astype(float)
        np.testing.assert_allclose(found.covariance, truth, rtol=1e-6)
        np.testing.assert_array_equal(found.share, [0, 0])
    assert np.linalg.cond(NARROW.T @ NARROW) > 1e15


def test_a_last_step_is_the_shortest_with_the_least_residual():
    rows = np.random.default_rng(0).normal(size=(6, 3))
    r = np.arange(6.0) - 2
    tree = {"a": jnp.asarray(rows[:, 0]), "b": jnp.asarray(rows[:, 1:])}
    params = {"a": jnp.zeros(()), "b": jnp.zeros(2)}
    step = quick_jit(_factors.gauss_newton)(tree, jnp.asarray(r), params)
    truth = np.linalg.lstsq(rows, -r)[0]
    np.testing.assert_allclose([step["a"], *step["b"]], truth, rtol=1e-12)
    # A parameter that no residual knows of stays, and so does the difference of two that
    # only their sum decides.
    bare = np.stack([rows[:, 0], 0 * rows[:, 0], rows[:, 0]], axis=1)
    step = quick_jit(_factors.gauss_newton)(
        jnp.asarray(bare), jnp.asarray(r), jnp.zeros(3)
    )
    np.testing.assert_allclose(
        step, np.linalg.lstsq(bare, -r)[0], rtol=1e-12, atol=1e-15
    )


def linear(params, a):
    return (
        a[:, 0] * params["x"] + a[:, 1] * params["y"][0] + a[:, 2] * params["y"][1] - 1
    )


def covariance(a, **options):
    """Return the covariance at parameters of 0, as if a fit had ended there."""
    rule, solver = hfjax.damping.searched(), hfjax.sample_space.cholesky()
    problem = Problem(linear, "linear", 1.0, "auto", solver, rule, 1)
    params = {"x": jnp.zeros(()), "y": jnp.zeros(2)}
    value, history = jnp.asarray(0.5 * len(a)), empty_history(1, float)
    fit = LeastSquaresFit(params, None, value, history, 5, (jnp.asarray(a),), problem)
    return fit.covariance(**options)


def test_parameters_that_no_residual_determines_are_named():
    a = np.random.default_rng(1).normal(size=(5, 3))
    a[:, 2] = 0
    with pytest.raises(
        ValueError, match=r"do not determine params\['y'\]\[1\]: a change"
    ):
        covariance(a)
    a[:, 2] = 3 * a[:, 0]
    with pytest.raises(
        ValueError, match=r"params\['x'\], params\['y'\]\[1\]: a change"
    ):
        covariance(a)
    found = jax.jit(covariance)(a)
    assert np.isfinite(found[1, 1])
    assert np.all(np.isinf(found[[0, 0, 2, 2], [0, 1, 2, 1]]))


def test_too_few_residuals_have_no_covariance():
    a = np.random.default_rng(2).normal(size=(3, 3))
    with pytest.raises(
        ValueError, match=r"3 residuals are too few .* 3 parameters, and to"
    ):
        covariance(a)
    found = covariance(a, scale=False)
    np.testing.assert_allclose(found, np.linalg.inv(a.T @ a), rtol=1e-8)
    with pytest.raises(
        ValueError, match=r"2 residuals are too few .* of 3 parameters$"
    ):
        covariance(a[:2], scale=False)
