"""Derivatives by central differences, as reference values for `hfjax.verify`."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core.types import Params
from hfjax.inspection._setup import walk

Function: TypeAlias = Callable[[jax.Array], jax.Array]


def along(fn: Function, x: jax.Array, v: jax.Array, epsilon: float) -> jax.Array:
    """Return (fn(x + ε v) − fn(x − ε v)) / 2ε."""
    return (fn(x + epsilon * v) - fn(x - epsilon * v)) / (2 * epsilon)


def columns(fn: Function, x: jax.Array, tried: jax.Array, epsilon: float) -> jax.Array:
    """Return the derivatives of `fn` by the given entries of `x`, stacked on axis 0."""
    zeros = jnp.zeros_like(x)
    return jax.lax.map(lambda j: along(fn, x, zeros.at[j].set(1), epsilon), tried)


def hessians(fn: Function, x: jax.Array, epsilon: float) -> jax.Array:
    """Return the Hessian of each row's value, from values alone, shape `[cases, m, m]`.

    Args:
      fn: `[cases, m] -> [cases]`; each value depends only on its own row.
      x: shape `[cases, m]`.
      epsilon: the step ε in both differences.
    """
    # The truncation error is of order ε², the rounding error of order 1/ε².
    size = x.shape[1]

    def entry(pair: jax.Array) -> jax.Array:
        first, second = epsilon * jax.nn.one_hot(pair, size, dtype=x.dtype)[:, None]
        plus = fn(x + first + second) - fn(x + first - second)
        minus = fn(x - first + second) - fn(x - first - second)
        return (plus - minus) / (4 * epsilon**2)

    entries = jax.lax.map(entry, jnp.indices((size, size)).reshape(2, -1).T)
    return entries.T.reshape(-1, size, size)


def slopes(
    value: Callable[[Params], float], at: Params, direction: Params, rounding: float
) -> Iterator[tuple[float, float]]:
    """Yield slopes of f for three step sizes, each with a bound on its rounding error."""
    # A step of rounding^(1/3) balances truncation and rounding errors if f and its
    # derivatives are of order 1. Their scale is unknown, so try other steps as well.
    for size in (10.0, 1.0, 0.1):
        step = size * rounding ** (1 / 3)
        ahead = value(walk(at, direction, step))
        behind = value(walk(at, direction, -step))
        slope = (ahead - behind) / (2 * step)
        if np.isfinite(slope):
            yield slope, 100 * rounding * (abs(ahead) + abs(behind)) / step
