"""BFGS, step by step, beside the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import quick_jit

from hfjax.solvers import _bfgs

N = 4
MOST = 6
A = np.diag([1.0, 2.0, 5.0, 0.5]) + 0.1
START = np.array([0.9, -0.7, 0.8, -0.4])


def bent(x, numpy=jnp):
    return 0.5 * x @ A @ x + numpy.sum(x**4) + numpy.sum(x)


def slope(x):
    return A @ x + 4 * x**3 + 1


def textbook(max_iterations):
    """Run algorithm 6.1 of Nocedal & Wright with Armijo's condition, by halving."""
    x, inverse = START.copy(), np.eye(N)
    for _ in range(max_iterations):
        gradient, alpha = slope(x), 1.0
        p = -inverse @ gradient
        while bent(x + alpha * p, np) > bent(x, np) + 1e-4 * alpha * gradient @ p:
            alpha /= 2
        s = alpha * p
        y = slope(x + s) - gradient
        rho = 1 / (s @ y)
        w = np.eye(N) - rho * np.outer(s, y)
        inverse = w @ inverse @ w.T + rho * np.outer(s, s)
        x = x + s
    return x


@pytest.mark.parametrize("max_iterations", [1, 2, 3, MOST])
def test_each_iteration_is_that_of_the_textbook(max_iterations):
    found = quick_jit(lambda x: _bfgs.minimise(bent, x, max_iterations))(
        jnp.asarray(START)
    )
    np.testing.assert_allclose(found, textbook(max_iterations), rtol=1e-9)
    # Each of them moves, so that none can be left out or counted twice.
    moved = textbook(max_iterations) - textbook(max_iterations - 1)
    assert np.linalg.norm(moved) > 1e-4


def test_a_step_that_is_too_long_is_halved_and_one_beyond_the_finite_too():
    def steep(x):
        return jnp.where(x[0] < -0.3, jnp.inf, jnp.sum(jnp.cosh(3 * x)))

    found = quick_jit(lambda x: _bfgs.minimise(steep, x, 1))(jnp.array([0.5]))
    slope = 3 * np.sinh(1.5)  # 6.4: whole and halved thrice it leads too far.
    np.testing.assert_allclose(found, 0.5 - slope / 8, rtol=1e-12)
    assert jax.grad(steep)(jnp.array([0.5])) > 0
