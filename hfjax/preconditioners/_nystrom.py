"""Randomised Nyström approximation of the Gauss-Newton matrix, and its damped inverse.

With Y = GΩ, a product for each column of a random matrix Ω,

    G ≈ Y (ΩᵀY)⁻¹ Yᵀ = U Λ Uᵀ ⪯ G,
    P⁻¹ = U μ (Λ + λ)⁻¹ Uᵀ + (I − U Uᵀ),    μ = λ + Λᵣ.

Columns are trees like the parameters with a leading axis, and only matrices of `rank`
rows are factorised. In fact G + νI is sketched, where ν estimates the rounding error of
the products. Eigenvalues of G that are not above ν count as 0, because they are noise.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Matvec, Params, Preconditioner, Tree
from hfjax._tracing import linalg
from hfjax.curvature import ggn
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import each
from hfjax.preconditioners import _remembered

_ROUNDING = 10
"""ν in units of ε ‖Y‖, with ε the rounding of the sums, whose errors stay below it."""
_LEAST_REST = 100
"""The least value for the rest of the eigenvalues of G, in units of ε Λ₁."""
_LEAST_UNIT = 1e-6
"""The least entry of λD's diagonal, relative to the largest: units divide by it."""


class Sketch(NamedTuple):
    """The approximation √u G √u ≈ U Λ Uᵀ, with the units u of `_units`.

    Attributes:
      vectors: U, a tree with a leading axis of columns. They are orthonormal, except
        that unknown eigenvectors are 0.
      values: Λ, in descending order; 0 for unknown eigenvalues.
      noise: ν; the remaining eigenvalues may be this large without showing in Y.
      units: √u, a tree like the parameters.
    """

    vectors: Tree
    values: jax.Array
    noise: jax.Array
    units: Tree


class Rule(NamedTuple):
    """The options of `preconditioners.nystrom`."""

    rank: int
    interval: int

    def init(self, params: Params) -> dict[str, tuple]:
        """Return space for a sketch: zeros."""
        rank, dtype = columns(params, self.rank), trees.scalar_dtype(params)
        units = sharding.zeros_like(trees.widen(params))
        vectors = jax.vmap(lambda _: units)(jnp.arange(rank))
        space = Sketch(vectors, jnp.zeros(rank, dtype), jnp.zeros((), dtype), units)
        return {"nystrom": tuple(space)}

    def build(
        self,
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
        memory: dict[str, tuple],
        count: jax.Array | int,
    ) -> tuple[Preconditioner, dict[str, tuple]]:
        """Build r ↦ P⁻¹r and the new memory; `damping` includes the weight decay."""

        def fresh(_: tuple) -> tuple:
            return tuple(sketch(objective, params, batch, damping, key, rank=self.rank))

        if not memory:
            return inverse(Sketch(*fresh(())), damping), {}
        kept = _remembered.every(self.interval, count, fresh, memory["nystrom"])
        return inverse(Sketch(*kept), damping), {"nystrom": kept}


def sketch(
    objective: Objective,
    params: Params,
    batch: Batch,
    damping: Tree,
    key: jax.Array,
    *,
    rank: int,
) -> Sketch:
    """Approximate G without weight decay, in units of the parameters in which λD ∝ I.

    `damping` is λ, or the diagonal of λD. `key` draws Ω, and must be the same on all
    devices.
    """
    units = _units(damping, params)
    bare = each(objective, lambda f: dataclasses.replace(f, weight_decay=0.0))
    product = ggn(bare, params, batch)

    def matvec(v: Tree) -> Tree:
        return _times(units, product(_times(units, v)))

    return Sketch(*approximate(matvec, params, rank, key), units)


def columns(params: Params, rank: int) -> int:
    """Return the number of columns of Ω, at most the number of parameters."""
    return min(rank, optax.tree.size(params))


def approximate(
    matvec: Matvec, like: Tree, rank: int, key: jax.Array
) -> tuple[Tree, jax.Array, jax.Array]:
    """Approximate a positive semi-definite matrix G, given v ↦ Gv.

    `like` is a tree with the shapes and dtypes that `matvec` takes. Returns U, Λ and ν
    as in `Sketch`, in float32 or wider; 0, 0 and 1 if a product is not finite.
    """
    rank = columns(like, rank)
    omega = _orthonormal(_random(like, rank, key))
    products = jax.vmap(matvec)(omega)

    # Scale Y so that squares stay in range. A G that is not finite counts as 0.
    scale = trees.magnitude(products)
    finite = jnp.isfinite(scale)
    scale = jnp.where(finite, scale, 1)
    y = jax.tree.map(lambda x: jnp.where(finite, x, 0), products)
    y = trees.scale(1 / scale, y)
    inner = trees.gram(omega, y)
    # The shift by ν keeps ΩᵀY positive definite despite rounding: its eigenvalues are
    # then about ν or more. Any below ν/2 is left out.
    shift = noise = _noise(inner, y, like)
    y = trees.axpy(shift, omega, y)
    shifted = (inner + inner.T) / 2 + shift * jnp.eye(rank, dtype=shift.dtype)
    values, rotation = linalg.eigh(shifted)
    factor = trees.combination(_over_root(rotation, values, shift / 2).T, y)

    # G + νI ≈ F Fᵀ has the nonzero eigenvalues s of FᵀF = Z diag(s) Zᵀ, and the eigenvectors
    # F Z diag(1/√s). Those that are only noise become 0.
    values, rotation = linalg.eigh(trees.gram(factor, factor))
    rounding = _ROUNDING * jnp.finfo(values.dtype).eps * values[-1]
    noise = jnp.maximum(noise, rounding)
    known = values > 2 * noise
    vectors = trees.combination(_over_root(rotation, values, 2 * noise).T, factor)
    # Eigenvectors of small eigenvalues contain rounding errors of the large ones. With
    # S = VᵀV ≈ I for these columns V, W = V S^-½ is orthonormal, and
    # V diag(s) Vᵀ = W (S^½ diag(s) S^½) Wᵀ: diagonalise the matrix in the middle.
    overlap = trees.gram(vectors, vectors)
    lengths, axes = linalg.eigh(overlap + jnp.diag((~known).astype(overlap.dtype)))
    lengths = jnp.sqrt(jnp.maximum(lengths, 0.1))  # All are close to 1.
    root = _product(axes * lengths[None], axes.T)
    middle = _product(root * jnp.where(known, values, 0)[None], root)
    values, rotation = linalg.eigh(middle)
    known = values > 2 * noise
    inverse_root = _product(axes / lengths[None], axes.T)
    rotation = jnp.where(known[None], _product(inverse_root, rotation), 0)
    vectors = trees.combination(rotation[:, ::-1].T, vectors)
    values = jnp.where(known, values - shift, 0)[::-1]
    return vectors, scale * values, scale * noise


def inverse(found: Sketch, damping: Tree) -> Preconditioner:
    """Return r ↦ P⁻¹r, with μ P = U (Λ + λ) Uᵀ + μ (I − U Uᵀ) in the sketch's units.

    μ is λ + max(Λᵣ, ν, 100 ε Λ₁). `damping` is λ ≥ 0, or the diagonal of λD that the
    units were made for. The result has the dtypes of r.
    """
    vectors, values, noise, units = found
    # In the units of the sketch, λD is its largest entry times I.
    level = _largest(damping).astype(values.dtype)
    least = _LEAST_REST * jnp.finfo(values.dtype).eps * values[0]
    # Y cannot tell what is below ν. And P⁻¹ = I − U (I − E) Uᵀ, with E = μ / (Λ + λ), is
    # positive definite only if E is well above the rounding of U, some ε: hence `least`.
    rest = level + jnp.maximum(values[-1], jnp.maximum(noise, least))
    known = values > 0
    excess = jnp.where(known, rest / jnp.where(known, values + level, 1), 1) - 1

    def product(r: Tree) -> Tree:
        scaled = _times(units, trees.widen(r))
        within = trees.coordinates(vectors, scaled).astype(values.dtype)
        y = trees.add(scaled, trees.combination(excess * within, vectors))
        return trees.cast_like(_times(units, y), r)

    return product


def _random(like: Tree, count: int, key: jax.Array) -> Tree:
    """Draw standard normal columns with the layout of `like`."""

    def column(key: jax.Array) -> Tree:
        drawn = optax.tree.random_like(key, trees.widen(like), jax.random.normal)
        return sharding.like(drawn, like)

    return jax.vmap(column)(jax.random.split(key, count))


def _orthonormal(vectors: Tree) -> Tree:
    """Return an orthonormal basis of the columns' span; dependent columns become 0."""
    # The error is the rounding times the squared condition number. Random columns have a
    # small one. What is built from the basis depends on its span alone, up to ν.
    values, rotation = linalg.eigh(trees.gram(vectors, vectors))
    least = 10 * len(values) * jnp.finfo(values.dtype).eps * values[-1]
    return trees.combination(_over_root(rotation, values, least).T, vectors)


def _noise(inner: jax.Array, y: Tree, like: Tree) -> jax.Array:
    """Estimate ν, the size of the error of Y; 1 if Y = 0."""

    def eps(dtype: jnp.dtype) -> float:
        of_sums = _ROUNDING * float(jnp.finfo(trees.wide(dtype)).eps)
        return max(float(jnp.finfo(dtype).eps), of_sums)

    coarsest = max(eps(leaf.dtype) for leaf in jax.tree.leaves(like))
    rounding = coarsest * trees.norm(y)
    size = optax.tree.size(like)
    # A device may multiply with fewer digits than ε tells, which shows as asymmetry: errors
    # of size σ in all entries of Y have the norm σ√n in a column, and make entries of size
    # √2 σ in ΩᵀY − YᵀΩ.
    seen = math.sqrt(size / 2) / len(inner) * jnp.linalg.norm(inner - inner.T)
    noise = jnp.maximum(rounding, seen.astype(rounding.dtype))
    return jnp.where(noise > 0, noise, 1).astype(inner.dtype)


def _over_root(rotation: jax.Array, values: jax.Array, above: jax.Array) -> jax.Array:
    """Return Z diag(1/√s), with 0 for every s that is not above a bound."""
    known = values > above
    root = jnp.where(known, jax.lax.rsqrt(jnp.where(known, values, 1)), 0)
    return rotation * root[None]


def _units(damping: Tree, params: Params) -> Tree:
    """Return √u with u = max(T) / T, where T is the diagonal of λD; 1 if D = I."""
    wide = trees.widen(params)
    leaves = jax.tree.leaves(damping)
    if len(leaves) == 1 and jnp.ndim(leaves[0]) == 0:
        return jax.tree.map(lambda x: x + 1, sharding.zeros_like(wide))
    largest = _largest(damping)
    divisor = jnp.where(largest > 0, largest, 1)

    def unit(leaf: jax.Array, like: jax.Array) -> jax.Array:
        # P then belongs to another T, and stays positive definite.
        share = jnp.maximum(leaf.astype(divisor.dtype) / divisor, _LEAST_UNIT)
        return jax.lax.rsqrt(jnp.where(largest > 0, share, 1)).astype(like.dtype)

    return jax.tree.map(unit, damping, wide)


def _largest(tree: Tree) -> jax.Array:
    """Return the largest entry, at least 0."""
    dtype = trees.scalar_dtype(tree)
    leaves = [jnp.max(x, initial=0).astype(dtype) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves))


def _times(units: Tree, v: Tree) -> Tree:
    return jax.tree.map(lambda u, x: (u * x.astype(u.dtype)).astype(x.dtype), units, v)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=trees.EXACT)
