"""Randomised Nyström approximation of the Gauss-Newton matrix, and its damped inverse.

From Y = GΩ, a product for each column of a random Ω,

    G ≈ Y (ΩᵀY)⁻¹ Yᵀ = U Λ Uᵀ ⪯ G,
    P⁻¹ = U μ (Λ + λ)⁻¹ Uᵀ + (I − U Uᵀ),    μ = λ + Λᵣ.

Columns are trees like the parameters with a leading axis; only matrices of `rank` rows
are factorised. Every one is shifted by ν, what the rounding of the products may be, and
what of Λ is not above ν counts as 0: it is noise.
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
"""ν in units of ε ‖Y‖, ε that of the sums (heuristic: their errors stay below it)."""
_LEAST_REST = 100
"""What the rest of G counts as, at least, in units of ε Λ₁ (heuristic)."""
_LEAST_UNIT = 1e-6
"""Least entry of T, relative to the largest (heuristic): 1/T of 0 is none."""


class Sketch(NamedTuple):
    """√u G √u ≈ U Λ Uᵀ.

    Attributes:
      vectors: U, a tree with a leading axis of columns: orthonormal, and zeros in the
        place of those of which nothing is known.
      values: Λ, descending; 0 where nothing is known.
      noise: ν: what the other eigenvalues may be, for all that Y tells.
      units: √u, a tree like the parameters.
    """

    vectors: Tree
    values: jax.Array
    noise: jax.Array
    units: Tree


class Rule(NamedTuple):
    """The options of `preconditioners.nystrom`, which has their meaning."""

    rank: int
    interval: int

    def init(self, params: Params) -> dict[str, tuple]:
        """Return room for the sketch."""
        return {"nystrom": tuple(room_for(params, self.rank))}

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
        """Build P⁻¹, and what is remembered; `damping` has the weight decay in it."""

        def fresh(_: tuple) -> tuple:
            found = sketch(objective, params, batch, damping, key, rank=self.rank)
            return tuple(found)

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
    """Approximate G, in units of the parameters that make λD a multiple of I.

    Args:
      objective: whose G it is, without weight decay.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      damping: λ, or a tree like the parameters, the diagonal of λD.
      key: of Ω, the same on all devices.
      rank: columns of Ω, at most the number of parameters.

    Returns:
      The approximation, in float32 or wider.
    """
    units = _units(damping, params)
    bare = each(objective, lambda f: dataclasses.replace(f, weight_decay=0.0))
    product = ggn(bare, params, batch)

    def matvec(v: Tree) -> Tree:
        return _times(units, product(_times(units, v)))

    return Sketch(*approximate(matvec, params, rank, key), units)


def room_for(params: Params, rank: int) -> Sketch:
    """Return zeros for a sketch."""
    rank, dtype = columns(params, rank), trees.scalar_dtype(params)
    units = sharding.zeros_like(trees.widen(params))
    vectors = jax.vmap(lambda _: units)(jnp.arange(rank))
    return Sketch(vectors, jnp.zeros(rank, dtype), jnp.zeros((), dtype), units)


def columns(params: Params, rank: int) -> int:
    """Return how many columns Ω can have."""
    return min(rank, optax.tree.size(params))


def approximate(
    matvec: Matvec, like: Tree, rank: int, key: jax.Array
) -> tuple[Tree, jax.Array, jax.Array]:
    """Approximate a positive semi-definite matrix.

    Args:
      matvec: `v -> G v`.
      like: a tree of the shapes and dtypes that it takes.
      rank: columns of Ω, at most the number of parameters.
      key: of Ω.

    Returns:
      U, Λ and ν, in float32 or wider; 0, 0 and 1 if a product is not finite.
    """
    rank = columns(like, rank)
    omega = _orthonormal(_random(like, rank, key))
    products = jax.vmap(matvec)(omega)

    # In a unit that keeps squares in range; a G that is not finite counts as 0.
    scale = trees.magnitude(products)
    finite = jnp.isfinite(scale)
    scale = jnp.where(finite, scale, 1)
    y = jax.tree.map(lambda x: jnp.where(finite, x, 0), products)
    y = trees.scale(1 / scale, y)
    inner = trees.gram(omega, y)
    shift = noise = _noise(inner, y, like)
    y = trees.axpy(shift, omega, y)
    values, rotation = linalg.eigh(
        (inner + inner.T) / 2 + shift * jnp.eye(rank, dtype=shift.dtype)
    )
    factor = trees.combination(_over_root(rotation, values, shift / 2).T, y)

    # G + ν ≈ F Fᵀ, so that FᵀF has its eigenvalues; and what is no noise of U.
    values, rotation = linalg.eigh(trees.gram(factor, factor))
    rounding = _ROUNDING * jnp.finfo(values.dtype).eps * values[-1]
    noise = jnp.maximum(noise, rounding)
    known = values > 2 * noise
    vectors = trees.combination(_over_root(rotation, values, 2 * noise).T, factor)
    # Columns of small eigenvalues have rounding of the large ones in them: once more.
    overlap = trees.gram(vectors, vectors)
    lengths, axes = linalg.eigh(overlap + jnp.diag((~known).astype(overlap.dtype)))
    lengths = jnp.sqrt(jnp.maximum(lengths, 0.1))  # All near 1.
    root = _product(axes * lengths[None], axes.T)
    values, rotation = linalg.eigh(
        _product(root * jnp.where(known, values, 0)[None], root)
    )
    known = values > 2 * noise
    rotation = jnp.where(
        known[None], _product(_product(axes / lengths[None], axes.T), rotation), 0
    )
    vectors = trees.combination(rotation[:, ::-1].T, vectors)
    values = jnp.where(known, values - shift, 0)[::-1]
    return vectors, scale * values, scale * noise


def inverse(found: Sketch, damping: Tree) -> Preconditioner:
    """Invert U (Λ + λ) Uᵀ + μ (I − U Uᵀ), times μ, in the sketch's units.

    μ = λ + max(Λᵣ, ν, 100 ε Λ₁). Of a λ below the noise of G the products do not tell
    what the rest of G is; and I − U (I − D) Uᵀ is positive only for D = μ / (Λ + λ) above
    the rounding of U, some ε.

    Args:
      found: U, Λ, ν and units.
      damping: λ ≥ 0, or the diagonal of λD, with the D that the units are of.

    Returns:
      `r -> P⁻¹ r`, in the dtypes of r.
    """
    vectors, values, noise, units = found
    level = _largest(damping).astype(values.dtype)
    least = _LEAST_REST * jnp.finfo(values.dtype).eps * values[0]
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
    """Draw standard normal columns, laid out as `like` is."""

    def column(key: jax.Array) -> Tree:
        drawn = optax.tree.random_like(key, trees.widen(like), jax.random.normal)
        return sharding.like(drawn, like)

    return jax.vmap(column)(jax.random.split(key, count))


def _orthonormal(vectors: Tree) -> Tree:
    """Return an orthonormal basis of the columns, and zeros for what depends on others.

    To rounding times the square of their condition number: random columns have a small
    one, and what is built from them depends on their space alone, up to ν.
    """
    values, rotation = linalg.eigh(trees.gram(vectors, vectors))
    least = 10 * len(values) * jnp.finfo(values.dtype).eps * values[-1]
    return trees.combination(_over_root(rotation, values, least).T, vectors)


def _noise(inner: jax.Array, y: Tree, like: Tree) -> jax.Array:
    """Estimate ν: how large the error of Y may be; 1 if Y = 0.

    Of ε, that of the parameters, in which products are computed; or, as a device may
    multiply in fewer digits, of how far ΩᵀY is from symmetric. Errors that are the same
    in all entries of Y, σ, have the norm σ√n, and make entries of √2 σ of ΩᵀY − YᵀΩ.
    """
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(like)]
    eps = max(
        max(float(jnp.finfo(d).eps), _ROUNDING * float(jnp.finfo(trees.wide(d)).eps))
        for d in dtypes
    )
    rounding = eps * trees.norm(y)
    size = optax.tree.size(like)
    seen = math.sqrt(size / 2) / len(inner) * jnp.linalg.norm(inner - inner.T)
    noise = jnp.maximum(rounding, seen.astype(rounding.dtype))
    return jnp.where(noise > 0, noise, 1).astype(inner.dtype)


def _over_root(rotation: jax.Array, values: jax.Array, above: jax.Array) -> jax.Array:
    """Return Z diag(1/√s), with 0 for each s that is not above a bound."""
    known = values > above
    root = jnp.where(known, jax.lax.rsqrt(jnp.where(known, values, 1)), 0)
    return rotation * root[None]


def _units(damping: Tree, params: Params) -> Tree:
    """Return √u with u = max(T) / T, T the diagonal of λD; 1 where D = I.

    Entries of T far below the largest are raised: P is then that of another T, and
    positive all the same.
    """
    wide = trees.widen(params)
    if _is_scalar(damping):
        return jax.tree.map(lambda x: x + 1, sharding.zeros_like(wide))
    largest = _largest(damping)
    divisor = jnp.where(largest > 0, largest, 1)

    def unit(leaf: jax.Array, like: jax.Array) -> jax.Array:
        share = jnp.maximum(leaf.astype(divisor.dtype) / divisor, _LEAST_UNIT)
        return jax.lax.rsqrt(jnp.where(largest > 0, share, 1)).astype(like.dtype)

    return jax.tree.map(unit, damping, wide)


def _is_scalar(damping: Tree) -> bool:
    leaves = jax.tree.leaves(damping)
    return len(leaves) == 1 and jnp.ndim(leaves[0]) == 0


def _largest(tree: Tree) -> jax.Array:
    """Return the largest entry, at least 0."""
    dtype = trees.scalar_dtype(tree)
    leaves = [jnp.max(x, initial=0).astype(dtype) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves))


def _times(units: Tree, v: Tree) -> Tree:
    return jax.tree.map(lambda u, x: (u * x.astype(u.dtype)).astype(x.dtype), units, v)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=trees.EXACT)
