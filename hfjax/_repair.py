"""Positive semi-definite repair of each case's loss Hessian (report, section 6.3).

    L″ + R ⪰ 0, with R ⪰ 0 and R = 0 where nothing is missing

R is made once from the outputs; a product with it is then cheap. What can be paid
for depends on m, the outputs of a case: to `MOST_FOR_EIGENVALUES` the dense L″ of
each case is decomposed, above that Gershgorin's circles bound its spectrum.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hfjax import _tree
from hfjax._types import Tree

MOST_FOR_EIGENVALUES = 64
"""Most outputs of a case whose L″ is decomposed: 16 KB a case in float32 (heuristic)."""


def missing(
    hessian: Callable[[Tree], Tree],
    matrices: Callable[[], jax.Array],
    outputs: Tree,
    positive: str,
) -> Callable[[Tree], Tree]:
    """Build v ↦ R v, such that L″ + R is positive semi-definite in each case.

    Args:
      hessian: v ↦ L″ v, all cases at once.
      matrices: computes L″, shape `[cases, m, m]`; called for few outputs only.
      outputs: where L″ is taken; every leaf leads with cases.
      positive: "clip" or "shift".

    Returns:
      The product, in the dtypes of `v`.
    """
    if _count(outputs) > MOST_FOR_EIGENVALUES:
        diagonal = _gershgorin_of_product(hessian, outputs)
        return lambda v: _tree.cast_like(jax.tree.map(jnp.multiply, diagonal, v), v)
    dense = _widened(matrices())
    if positive == "shift":
        shift = _spectral(jnp.linalg.eigvalsh(dense), positive)
        return lambda v: _by_case(jnp.multiply, v, shift)
    values, vectors = jnp.linalg.eigh(dense)
    negative = _spectral(values, positive)
    return lambda v: _by_case(_in_basis, v, negative, vectors)


def root(matrices: jax.Array, positive: str | None) -> Callable[[Tree], Tree]:
    """Build v ↦ S v with S Sᵀ = L″ + R, S symmetric; without repair R is "clip"'s.

    Args:
      matrices: L″, shape `[cases, m, m]`.
      positive: "clip", "shift" or `None`.

    Returns:
      The product, in the dtypes of `v`.
    """
    dense = _widened(matrices)
    many = dense.shape[-1] > MOST_FOR_EIGENVALUES
    if positive is not None and many:
        diagonal = jnp.diagonal(dense, axis1=1, axis2=2)
        lacking = _gershgorin(jnp.sum(jnp.abs(dense), axis=2), diagonal)
        dense += jax.vmap(jnp.diag)(lacking)
    values, vectors = jnp.linalg.eigh(dense)
    if positive is not None and not many:
        values += _spectral(values, positive)
    roots = jnp.sqrt(jnp.maximum(values, 0))
    return lambda v: _by_case(_in_basis, v, roots, vectors)


def _spectral(values: jax.Array, positive: str) -> jax.Array:
    """Return what ascending eigenvalues `[cases, m]` lack: each its own, or all alike."""
    worst = values if positive == "clip" else values[:, :1]
    return jnp.broadcast_to(jnp.maximum(-worst, 0), values.shape)


def _gershgorin(row_sums: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Return the diagonal that makes L″ diagonally dominant, from Σⱼ|Lᵢⱼ| and Lᵢᵢ."""
    return jnp.maximum(row_sums - jnp.abs(diagonal) - diagonal, 0)


def _gershgorin_of_product(hessian: Callable[[Tree], Tree], outputs: Tree) -> Tree:
    """Return max(0, Σ_{j≠i}|Lᵢⱼ| − Lᵢᵢ) for each case, like `outputs`.

    One product with each basis vector, in turn: the memory of three outputs.
    """
    leaves, structure = jax.tree.flatten(outputs)
    # Of the outputs, so that under `shard_map` these vary over devices as they do.
    zeros = [_tree.widen(jnp.zeros_like(leaf)) for leaf in leaves]
    sums = diagonal = zeros
    for place, leaf in enumerate(leaves):

        def step(carry: tuple, j: jax.Array, place: int = place) -> tuple:
            sums, diagonal = carry
            entries = jnp.arange(zeros[place][0].size).reshape(zeros[place].shape[1:])
            chosen = (entries == j)[None]
            basis = [
                jnp.where(chosen, 1, zero) if k == place else zero
                for k, zero in enumerate(zeros)
            ]
            basis = structure.unflatten(basis)
            column = jax.tree.leaves(hessian(_tree.cast_like(basis, outputs)))
            column = _tree.widen(column)
            sums = [total + jnp.abs(x) for total, x in zip(sums, column, strict=True)]
            diagonal = list(diagonal)
            diagonal[place] = jnp.where(chosen, column[place], diagonal[place])
            return (sums, diagonal), None

        (sums, diagonal), _ = jax.lax.scan(
            step, (sums, diagonal), jnp.arange(leaf[0].size)
        )
    return structure.unflatten(jax.tree.map(_gershgorin, sums, diagonal))


def _in_basis(flat: jax.Array, values: jax.Array, vectors: jax.Array) -> jax.Array:
    return vectors @ (values * (vectors.T @ flat))


def _by_case(product: Callable[..., jax.Array], v: Tree, *operands: jax.Array) -> Tree:
    """Apply `product(flat, *operands)` to each case of `v`, in float32 or wider."""

    def one_case(v: Tree, *operands: jax.Array) -> Tree:
        flat, unravel = ravel_pytree(_tree.widen(v))
        return unravel(product(flat, *operands))

    return _tree.cast_like(jax.vmap(one_case)(v, *operands), v)


def _count(outputs: Tree) -> int:
    """Return m, the number of outputs of a case."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(outputs))


def _widened(matrices: jax.Array) -> jax.Array:
    """LAPACK has no half precision."""
    return matrices.astype(_tree.wide(matrices.dtype))
