"""Search for negative curvature of L″, case by case."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hfjax import _tree
from hfjax._setup import rows, unrows
from hfjax._types import Tree

_DENSE = 64
"""Most outputs of a case whose L″ is written out (heuristic)."""
_POWER_ITERATIONS = 30
"""Products of each half of the search where it is not (heuristic)."""


def extreme_curvature(
    product: Callable[[Tree], Tree], outputs: Tree
) -> tuple[np.ndarray, np.ndarray]:
    """Return about the least and the largest |eigenvalue| of L″ in each case.

    Exact for few outputs; for many by power iterations, the least never too small.
    """
    z = rows(outputs)
    to_tree = unrows(outputs)

    def by_rows(v: jax.Array) -> jax.Array:
        return rows(product(_tree.cast_like(to_tree(v), outputs)))

    size = z.shape[1]
    if size <= _DENSE:
        basis = jnp.broadcast_to(
            jnp.eye(size, dtype=z.dtype)[:, None], (size, *z.shape)
        )
        matrices = np.asarray(jnp.swapaxes(jax.lax.map(by_rows, basis), 0, 1))
        values = np.linalg.eigvalsh(matrices.astype(np.float64))
        return values[:, 0], np.max(np.abs(values), axis=1)

    def power(multiply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def step(_: int, v: jax.Array) -> jax.Array:
            v = multiply(v)
            length = jnp.linalg.norm(v, axis=1, keepdims=True)
            return v / jnp.where(length == 0, 1, length)

        start = jnp.broadcast_to(jnp.cos(jnp.arange(size, dtype=z.dtype)), z.shape)
        v = jax.lax.fori_loop(0, _POWER_ITERATIONS, step, start)
        square = jnp.sum(v * v, axis=1)
        return jnp.sum(v * by_rows(v), axis=1) / jnp.where(square == 0, 1, square)

    largest = jnp.abs(power(by_rows))
    least = power(lambda v: 2 * largest[:, None] * v - by_rows(v))
    return np.asarray(least), np.asarray(largest)
