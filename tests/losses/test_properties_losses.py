"""L″ and S of any logits, against closed forms in NumPy and autodiff of the value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import quick_jit
from strategies import arrays, eighths, scales

from hfjax import losses

CASES, UNITS = 2, 3
INTEGER = "softmax_cross_entropy_with_integer_labels"
BUILD = {
    "squared_error": losses.squared_error,
    "sigmoid_cross_entropy": losses.sigmoid_cross_entropy,
    "softmax_cross_entropy": losses.softmax_cross_entropy,
    INTEGER: losses.softmax_cross_entropy_with_integer_labels,
    "wrapped_sigmoid": lambda: losses.from_function(optax.sigmoid_binary_cross_entropy),
    "wrapped_softmax": lambda: losses.from_function(optax.softmax_cross_entropy),
}
every_loss = pytest.mark.parametrize("name", list(BUILD))
every_dtype = pytest.mark.parametrize("dtype", [np.float64, np.float32])

logits = st.one_of(
    eighths,
    st.builds(lambda x, scale: x * scale, eighths, scales(0, 3)),
    st.sampled_from([1e4, -1e4, 100.0, -100.0, 30.0, -30.0]),
)
shares = st.integers(0, 8).map(lambda k: k / 8)


@functools.cache
def program(name):
    loss = BUILD[name]()

    def everything(z, t):
        def total(z):
            return jnp.sum(loss.value(z, t))

        def columns(product):
            units = jnp.eye(UNITS, dtype=z.dtype)
            basis = [jnp.broadcast_to(unit[None], z.shape) for unit in units]
            return jnp.stack([product(v) for v in basis], axis=-1)

        return {
            "value": loss.value(z, t),
            "gradient": jax.grad(total)(z),
            "autodiff": columns(jax.linearize(jax.grad(total), z)[1]),
            "hessian": columns(loss.hessian(z, t)),
            "factor": columns(loss.factor(z, t)),
        }

    return quick_jit(everything)


def row(name, z, t):
    """Return the gradient and L″ of one case, and the mass of its target."""
    if name == "squared_error":
        return z - t, np.eye(UNITS), 1.0
    if "sigmoid" in name:
        small = np.exp(-np.abs(z))
        p = np.where(z >= 0, 1, small) / (1 + small)
        return p - t, np.diag(small / (1 + small) ** 2), 1.0
    p = np.exp(z - np.max(z))
    p, mass = p / np.sum(p), np.sum(t)
    off = np.outer(p, p) * (1 - np.eye(UNITS))
    return mass * p - t, mass * (np.diag(np.sum(off, axis=1)) - off), mass


def draw(data, name, dtype):
    z = data.draw(arrays(CASES, UNITS, elements=logits)).astype(dtype)
    if name == INTEGER:
        labels = data.draw(arrays(CASES, elements=st.integers(0, UNITS - 1)))
        labels = labels.astype(np.int32)
        return z, labels, np.eye(UNITS)[labels]
    t = data.draw(arrays(CASES, UNITS, elements=shares)).astype(dtype)
    return z, t, t.astype(float)


@every_dtype
@every_loss
@given(data=st.data())
def test_curvature_and_factor_are_those_of_the_value(name, dtype, data):
    z, t, masses = draw(data, name, dtype)
    got = jax.device_get(program(name)(z, t))
    assert all(np.all(np.isfinite(x)) and x.dtype == dtype for x in got.values())
    assert np.all(got["value"] >= 0)
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    for i in range(CASES):
        gradient, hessian, mass = row(name, z[i].astype(float), masses[i])
        # A rounding or two for each unit, of probabilities, targets and masses.
        slack = 16 * UNITS * eps * max(mass, 1)
        size = np.max(np.abs(gradient)) if name == "squared_error" else 1
        np.testing.assert_allclose(
            got["gradient"][i], gradient, rtol=0, atol=slack * max(size, 1)
        )
        factor = got["factor"][i].astype(float)
        for matrix in (got["hessian"][i], got["autodiff"][i], factor @ factor.T):
            np.testing.assert_allclose(matrix, hessian, rtol=0, atol=slack)
        curved = got["hessian"][i].astype(float)
        assert np.min(np.linalg.eigvalsh((curved + curved.T) / 2)) >= -slack
        if name == "sigmoid_cross_entropy":  # Saturated ones keep their digits, too.
            np.testing.assert_allclose(curved, hessian, rtol=16 * eps, atol=4 * tiny)
