"""J by a factor of itself and not of its square: how uncertain parameters are, last steps.

With the lengths of its columns on the diagonal of D, J D⁻¹ = U S Vᵀ. So

    (JᵀJ)⁻¹ = D⁻¹ V S⁻² Vᵀ D⁻¹,        δ = −D⁻¹ V S⁻¹ Uᵀ r

are the covariance for σ = 1 and the Gauss-Newton step. The units of the parameters are in
D alone, and a singular value that is zero beside the others means parameters that the
residuals cannot tell apart, in any units.
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


class Factors(NamedTuple):
    """J D⁻¹ = U S Vᵀ.

    Attributes:
      lengths: the diagonal of D; 1 in place of 0.
      inverse: S⁻¹; 0 in place of what rounding hides, singular values below ε times the
        number of residuals times the largest.
      vectors: V.
      along: Uᵀr.
    """

    lengths: jax.Array
    inverse: jax.Array
    vectors: jax.Array
    along: jax.Array


def factors(rows: Tree, residuals: jax.Array) -> Factors:
    """Decompose J, a tree like the parameters whose leaves lead with the residuals."""
    matrix = as_matrix(rows)
    lengths = column_lengths(matrix)
    lengths = jnp.where(lengths > 0, lengths, 1)
    r = residuals.astype(matrix.dtype)[:, None]
    both = jnp.hstack([matrix / lengths[None], r])
    values, vectors, along = linalg.svd_and_side(both)
    limit = max(matrix.shape) * jnp.finfo(matrix.dtype).eps * jnp.max(values)
    seen = values > limit
    inverse = jnp.where(seen, 1 / jnp.where(seen, values, 1), 0)
    return Factors(lengths, inverse, vectors, along)


def gauss_newton(rows: Tree, residuals: jax.Array, params: Params) -> Params:
    """Return the shortest step to the least ‖J δ + r‖, in the units that D makes."""
    found = factors(rows, residuals)
    step = jnp.matmul(found.vectors, found.inverse * found.along, precision=trees.EXACT)
    with jax.numpy_dtype_promotion("standard"):
        flat, unravel = ravel_pytree(params)
        return unravel((-step / found.lengths).astype(flat.dtype))


class Spread(NamedTuple):
    """What the residuals say about the parameters.

    Attributes:
      covariance: (JᵀJ)⁻¹, shape `[parameters, parameters]`; infinite for parameters that
        the residuals do not determine.
      share: how much each parameter takes part in the directions that change no residual,
        shape `[parameters]`; 0 if that is little.
    """

    covariance: jax.Array
    share: jax.Array


def spread(rows: Tree, residuals: jax.Array) -> Spread:
    """Compute (JᵀJ)⁻¹."""
    lengths, inverse, vectors, _ = factors(rows, residuals)
    half = (vectors * inverse[None]) / lengths[:, None]
    covariance = jnp.matmul(half, half.T, precision=trees.EXACT)
    share = jnp.linalg.norm(jnp.where((inverse == 0)[None], vectors, 0), axis=1)
    unknown = share > _SHOWN
    infinite = unknown[:, None] | unknown[None, :]
    return Spread(
        jnp.where(infinite, jnp.inf, covariance), jnp.where(unknown, share, 0)
    )


def as_matrix(rows: Tree) -> jax.Array:
    """Return the rows of J as one matrix, in the order of `ravel_pytree`."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.vmap(lambda row: ravel_pytree(row)[0])(rows)


def column_lengths(matrix: jax.Array) -> jax.Array:
    """Return the norm of each column, without overflow or underflow."""
    largest = jnp.max(jnp.abs(matrix), axis=0)
    unit = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum(jnp.square(matrix / unit[None]), axis=0))


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
