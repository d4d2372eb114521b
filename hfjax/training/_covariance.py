"""How uncertain fitted parameters are: σ² (JᵀJ)⁻¹, from a factor of J and not of its square.

With the lengths of its columns on the diagonal of D, J D⁻¹ = U S Vᵀ, and

    (JᵀJ)⁻¹ = D⁻¹ V S⁻² Vᵀ D⁻¹.

The units of the parameters are in D alone, so a singular value that is zero beside the
others means parameters that the data cannot tell apart, in any units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hfjax._core import trees
from hfjax._core.types import Params, Tree
from hfjax._tracing import linalg

_SHOWN = 0.1
"""A parameter is named if a direction without information has at least this share of it."""


class Spread(NamedTuple):
    """What the data say about the parameters.

    Attributes:
      covariance: (JᵀJ)⁻¹, shape `[parameters, parameters]`; infinite where J is deficient.
      share: how much each parameter takes part in the directions that change no residual,
        shape `[parameters]`: 0 if there are none.
    """

    covariance: jax.Array
    share: jax.Array


def spread(rows: Tree) -> Spread:
    """Compute (JᵀJ)⁻¹ from the rows of J, a tree like the parameters."""
    matrix = as_matrix(rows)
    lengths = column_lengths(matrix)
    known = lengths > 0
    unit = jnp.where(known, lengths, 1)
    values, vectors = _right_singular(matrix / unit)
    limit = max(matrix.shape) * jnp.finfo(matrix.dtype).eps * jnp.max(values)
    seen = values > limit
    inverse = jnp.where(seen, 1 / jnp.where(seen, values, 1), 0)
    half = (vectors * inverse) / unit[:, None]
    share = jnp.sqrt(jnp.sum(jnp.square(vectors) * ~seen, axis=1))
    found = jnp.matmul(half, half.T, precision=trees.EXACT)
    unknown = share > _SHOWN
    infinite = unknown[:, None] | unknown[None, :]
    return Spread(jnp.where(infinite, jnp.inf, found), jnp.where(unknown, share, 0))


@linalg._one_by_one
def _right_singular(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return S and V of a matrix U S Vᵀ with no more columns than rows."""
    _, values, transposed = jnp.linalg.svd(jnp.linalg.qr(matrix, mode="r"))
    return values, transposed.T


def as_matrix(rows: Tree) -> jax.Array:
    """Return the rows of J as one matrix, in the order of `ravel_pytree`."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.vmap(lambda row: ravel_pytree(row)[0])(rows)


def column_lengths(matrix: jax.Array) -> jax.Array:
    """Return the norm of each column, without overflow or underflow."""
    largest = jnp.max(jnp.abs(matrix), axis=0)
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(matrix / unit), axis=0))


def check_known(share: jax.Array, params: Params) -> None:
    """Raise a `ValueError` that names the parameters the data do not determine."""
    unknown = np.flatnonzero(np.asarray(share))
    if not unknown.size:
        return
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"params{jax.tree_util.keystr(path)}"
        index = np.ndindex(np.shape(leaf))
        names += [where + (f"{list(k)}" if k else "") for k in index]
    which = ", ".join(names[k] for k in unknown[:8]) + ", …" * (unknown.size > 8)
    msg = (
        f"The residuals do not determine {which}: a change of these parameters, or of "
        "some of them together, changes no residual. Hold one of them fixed, or add "
        "residuals that know of them."
    )
    raise ValueError(msg)
