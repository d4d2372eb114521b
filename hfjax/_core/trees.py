"""Tree arithmetic that `optax.tree` lacks, or offers with other guarantees.

Sums accumulate in float32 or wider for every dtype of leaves. Nothing is ravelled:
`ravel_pytree` and `jnp.vdot` (which `optax.tree.vdot` uses) gather a sharded leaf onto
every device; `sum(x * y)` does not.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Number, Tree

EXACT = jax.lax.Precision.HIGHEST
"""Some devices multiply float32 with fewer digits; a basis is then not orthogonal."""


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype in which sums of `dtype` accumulate: float32 or wider."""
    return widest(dtype, jnp.float32)


def scalar_dtype(tree: Tree) -> jnp.dtype:
    """Return the dtype of scalars computed from `tree`: float32 or its widest leaf."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return widest(jnp.float32, *dtypes)


def widest(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype to which arrays of these are cast before they are combined."""
    # Strict promotion, if the user has set it, guards against implicit casts only.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, [jnp.dtype(d) for d in dtypes])


def widen(tree: Tree) -> Tree:
    """Return `tree` with every leaf in float32 or wider."""
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def cast_like(tree: Tree, other: Tree) -> Tree:
    """Return `tree` with the dtypes of `other`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


def dot(x: Tree, y: Tree) -> jax.Array:
    """Return xᵀy, accumulated and returned in float32 or wider."""
    products = jax.tree.map(operator.mul, widen(x), widen(y))
    sums = [jnp.sum(product) for product in _merged(jnp.add, products)]
    return sum_leaves(sums, scalar_dtype(x))


def _merged(function: Callable[..., jax.Array], tree: Tree) -> list[jax.Array]:
    """Return the leaves, with vectors of the same type combined by a binary function."""
    # Each kernel takes time to compile, however short, and even a sum over a few numbers
    # is three kernels on a CPU. Matrices are left alone: two of the same shape may be
    # sharded along different axes.
    vectors: dict[Any, list[jax.Array]] = {}
    others = []
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim > 1:
            others.append(leaf)
        else:
            vectors.setdefault(jax.typeof(leaf), []).append(leaf)
    return [*(_pairwise(function, alike) for alike in vectors.values()), *others]


def _pairwise(function: Callable[..., jax.Array], arrays: list[jax.Array]) -> jax.Array:
    """Combine arrays pair by pair, so that of N roundings only log₂ N accumulate."""
    while len(arrays) > 1:
        pairs = (arrays[n : n + 2] for n in range(0, len(arrays), 2))
        arrays = [functools.reduce(function, pair) for pair in pairs]
    return arrays[0]


def sum_leaves(scalars: Tree, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the sum of a tree of scalars; zero of `dtype` if it has no leaves."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(scalars)]
    return _pairwise(operator.add, leaves) if leaves else jnp.zeros((), dtype)


def axpy(a: jax.Array, x: Tree, y: Tree) -> Tree:
    """Return a·x + y in the dtypes of `y`, computed in float32 or wider."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        return a.astype(y.dtype) * x.astype(y.dtype) + y

    return cast_like(jax.tree.map(leaf, x, widen(y)), y)


def scale(a: jax.Array, x: Tree) -> Tree:
    """Return a·x in the dtypes of `x`, computed in float32 or wider."""
    return cast_like(jax.tree.map(lambda x: a.astype(x.dtype) * x, widen(x)), x)


def add(x: Tree, y: Tree) -> Tree:
    """Return x + y in the dtypes of `x`, as `optax.apply_updates` does."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), x, y)


def select(predicate: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
    """Return `on_true` if the scalar `predicate` holds, else `on_false`."""
    return jax.tree.map(lambda x, y: jnp.where(predicate, x, y), on_true, on_false)


def is_finite(tree: Tree) -> jax.Array:
    """Return whether every entry is finite."""
    return jnp.isfinite(largest(tree))


def largest(tree: Tree) -> jax.Array:
    """Return max |x| in float32 or wider: NaN or inf if an entry is, 0 of nothing."""
    dtype = scalar_dtype(tree)
    found = [size.astype(dtype) for size in maxima(tree)]
    # `jnp.maximum` propagates NaN.
    return functools.reduce(jnp.maximum, found, jnp.zeros((), dtype))


def maxima(tree: Tree) -> list[jax.Array]:
    """Return numbers whose maximum is max |x|: one per leaf, or group of similar leaves."""
    sizes = _merged(jnp.maximum, jax.tree.map(jnp.abs, tree))
    return [jnp.max(leaf, initial=0) for leaf in sizes]


def magnitude(tree: Tree) -> jax.Array:
    """Return a power of two near max |x|: NaN or inf if an entry is, 1 for zeros."""
    size = largest(tree)
    # Its reciprocal must also be finite and normal, in the dtype of every leaf.
    widest = [jnp.finfo(wide(leaf.dtype)).maxexp for leaf in jax.tree.leaves(tree)]
    return power_of_two(size, min(widest, default=jnp.finfo(size.dtype).maxexp) - 2)


def power_of_two(size: jax.Array, most: int) -> jax.Array:
    """Return the power of two nearest to a size, between 2^−most and 2^most; 1 for 0."""
    # Scaling by a power of two is exact, and squares then neither overflow nor underflow.
    within = jnp.clip(jnp.where(size == 0, 1, size), 2.0**-most, 2.0**most)
    # A mantissa of no bits rounds to the nearest power of two.
    power = jax.lax.reduce_precision(within, jnp.finfo(size.dtype).nexp, 0)
    return jnp.where(jnp.isfinite(size), power, size)


def unfactored(scaled: Tree) -> Tree:
    """Return a tree that XLA may not take factors out of."""
    # In Σ (s x)² with a leaf x that XLA knows, such as the zero gradient of what the model
    # does not read, XLA would take s² out of the sum. That is ∞ · 0 = NaN if s is large.
    return jax.lax.optimization_barrier(scaled)


def normalised(tree: Tree) -> tuple[Tree, jax.Array]:
    """Return x / s and s = `magnitude(x)`; x itself if an entry is not finite."""
    size = magnitude(tree)
    unit = jnp.where(jnp.isfinite(size), size, 1)
    return unfactored(scale(1 / unit, tree)), size


def norm(tree: Tree) -> jax.Array:
    """Return ‖x‖₂ without overflow or underflow; NaN or inf if an entry is."""
    scaled, size = normalised(widen(tree))
    return jnp.where(jnp.isfinite(size), size * jnp.sqrt(dot(scaled, scaled)), size)


def row(tree: Tree, k: jax.Array | int, *, axis: int = 0) -> Tree:
    """Return the k-th row of every leaf, or what is there along another axis."""
    take = jax.lax.dynamic_index_in_dim
    return jax.tree.map(lambda leaf: take(leaf, k, axis, keepdims=False), tree)


def with_row(tree: Tree, k: jax.Array, row: Tree) -> Tree:
    """Return `tree` with another k-th row in every leaf."""
    put = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda leaf, x: put(leaf, x, k, 0), tree, row)


def coordinates(vectors: Tree, x: Tree) -> jax.Array:
    """Return Vᵀx, shape `[K]`, summed in float32 or wider."""

    def leaf(v: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(v * x.astype(v.dtype)[None], axis=tuple(range(1, v.ndim)))

    return sum_leaves(jax.tree.map(leaf, widen(vectors), x), scalar_dtype(x))


def gram(vectors: Tree, others: Tree) -> jax.Array:
    """Return VᵀW, shape `[K, L]`, summed in float32 or wider."""

    def leaf(v: jax.Array, w: jax.Array) -> jax.Array:
        axes = tuple(range(1, v.ndim))
        return sharding.contracted(v, w.astype(v.dtype), (axes, axes), EXACT)

    parts = jax.tree.leaves(jax.tree.map(leaf, widen(vectors), others))
    return sum_leaves(parts or [jnp.zeros((1, 1))], scalar_dtype(vectors))


def combination(weights: jax.Array, vectors: Tree) -> Tree:
    """Return V a; for rows of coefficients, one combination for each row."""

    def leaf(v: jax.Array) -> jax.Array:
        return jnp.tensordot(weights.astype(v.dtype), v, axes=1, precision=EXACT)

    return jax.tree.map(leaf, vectors)


def interpolate(
    diagonal: Tree, *, exponent: Number, kappa: Number, scale: Tree | None
) -> Tree:
    """Return (d + κ s)^ξ: for ξ between 0 and 1, between the identity and a diagonal.

    Args:
      diagonal: d; negative entries of d + κ s count as 0.
      exponent: ξ; 0 gives the identity.
      kappa: κ.
      scale: s, a tree like `diagonal`; `None` is 1 everywhere.
    """
    ones = jax.tree.map(jnp.ones_like, diagonal) if scale is None else scale

    def leaf(d: jax.Array, s: jax.Array) -> jax.Array:
        total = d + jnp.asarray(kappa, d.dtype) * s.astype(d.dtype)
        return jnp.maximum(total, 0) ** jnp.asarray(exponent, d.dtype)

    return jax.tree.map(leaf, diagonal, ones)


def damped(diagonal: Tree, damping: Tree) -> Tree:
    """Return d + x in the dtypes of d, where x is a scalar or a tree like d."""

    def leaf(d: jax.Array, x: jax.Array) -> jax.Array:
        # Entries are squares of gradients, and may overflow where the gradients do not.
        # Infinity then counts as the largest float, so that r / P stays above 0.
        return jnp.minimum(d, jnp.finfo(d.dtype).max) + jnp.asarray(x, d.dtype)

    return jax.tree.map(leaf, diagonal, jax.tree.broadcast(damping, diagonal))


def ones_for_zeros(diagonal: Tree) -> Tree:
    """Return 1 in place of entries that are not positive: if all is 0, the identity."""
    # A curvature of 0 means that nothing is known about this parameter.
    return jax.tree.map(lambda d: jnp.where(d > 0, d, 1), diagonal)


def finite_or_inf(value: jax.Array) -> jax.Array:
    """Return a value of f, or +∞ in place of one that is not finite."""
    return jnp.where(jnp.isfinite(value), value, jnp.inf)
