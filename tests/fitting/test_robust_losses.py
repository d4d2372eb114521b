"""Robust losses against the definitions of SciPy's `least_squares`, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hfjax.training._residuals import robust

SCALE = 0.7
Z = np.array([[0.0, 1e-9, -0.3, 0.69, 0.71, -2.0, 1e3]])


def rho(name, u):
    """Return ρ, ρ′ and ρ″."""
    if name == "linear":
        return u, 1 + 0 * u, 0 * u
    if name == "soft_l1":
        t = 1 + u
        return 2 * (t**0.5 - 1), t**-0.5, -0.5 * t**-1.5
    if name == "huber":
        far = u > 1
        u_far = np.where(far, u, 1)
        value = np.where(far, 2 * u_far**0.5 - 1, u)
        return value, u_far**-0.5, np.where(far, -0.5 * u_far**-1.5, 0)
    t = 1 + u if name == "cauchy" else 1 + u**2
    if name == "cauchy":
        return np.log1p(u), 1 / t, -1 / t**2
    return np.arctan(u), 1 / t, -2 * u / t**2


@pytest.mark.parametrize("name", ["linear", "soft_l1", "huber", "cauchy", "arctan"])
@pytest.mark.every
def test_a_loss_is_that_of_its_definition_and_its_curvature_positive(name):
    loss, u = robust(name, SCALE), (Z / SCALE) ** 2
    value, first, second = rho(name, u)
    targets = jnp.zeros_like(Z)

    def total(z):
        return jnp.sum(loss.value(z, targets))

    np.testing.assert_allclose(total(Z), 0.5 * SCALE**2 * value.sum(), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(total)(Z), first * Z, rtol=1e-12)
    ones = jnp.ones_like(Z)
    curvature = np.asarray(loss.hessian(Z, targets)(ones))
    truth = first + 2 * u * second
    np.testing.assert_allclose(curvature, np.maximum(truth, 0.1 * first), rtol=1e-9)
    assert np.all(curvature > 0)
    convex = truth > 0.1 * first
    assert convex[0, :3].all()
    assert name in {"linear", "soft_l1"} or not convex.all()
    second_order = jax.jvp(jax.grad(total), (Z,), (ones,))[1]
    np.testing.assert_allclose(curvature[convex], second_order[convex], rtol=1e-9)
    root = loss.factor(Z, targets)(ones)
    np.testing.assert_allclose(root**2, curvature, rtol=1e-13)
