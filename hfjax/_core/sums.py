"""Sums of many trees, one after another, that lose hardly any digits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.types import Tree

FEW = 64
"""The most terms added one by one, which loses at most half as many units of rounding."""


def summed(
    term: Callable[[jax.Array], Tree],
    count: int,
    zeros: Tree,
    first: jax.Array | None = None,
) -> Tree:
    """Return Σₖ term(k) for k < `count`, one term after another.

    At worst 32 units of rounding are lost for any `count`. This holds two trees more than
    a plain loop.

    Args:
      term: k ↦ a tree of floats.
      count: the number of terms.
      zeros: zeros with the shapes, dtypes and layout of a term.
      first: sum only so many terms, the first ones. The number need not be known while
        tracing, and others take no time; but the sum then has no reverse-mode derivative.
    """

    # Added one by one, N terms of one sign lose up to N/2 units of rounding: of 10⁵ terms
    # in float32, two to four digits are right. So terms are added in blocks of at most
    # 64, and what the addition of each block rounds off is kept and added at the end
    # (Knuth's two-sum, as in Neumaier's and Klein's summation). Treating every term like
    # this would be accurate to one unit, but took a third more time where a term is the
    # gradient of some examples. XLA does not reorder floating-point additions, so this
    # survives.
    def add_up(total: Tree, k: jax.Array) -> tuple[Tree, None]:
        x = term(jnp.minimum(k, count - 1) if padded else k)
        # The last block may run past the last term.
        x = jax.tree.map(lambda x: jnp.where(k < count, x, 0), x) if padded else x
        return trees.add(total, x), None

    def add_block(carry: tuple[Tree, Tree], numbers: jax.Array) -> tuple[tuple, None]:
        total, lost = carry
        block = jax.lax.scan(add_up, zeros, numbers)[0]
        new = trees.add(total, block)
        return (new, jax.tree.map(_rounded_off, lost, total, block, new)), None

    length = _block(count)
    blocks = -(-count // length)
    if first is not None:
        return _sum_of_first(term, length, zeros, first, one=blocks == 1)
    padded = blocks * length > count
    numbers = jnp.arange(blocks * length, dtype=jnp.int32)
    if blocks == 1:
        return jax.lax.scan(add_up, zeros, numbers)[0]
    numbers = numbers.reshape(blocks, length)
    (total, lost), _ = jax.lax.scan(add_block, (zeros, zeros), numbers)
    return _with_lost(total, lost)


def _sum_of_first(
    term: Callable[[jax.Array], Tree],
    length: int,
    zeros: Tree,
    count: jax.Array,
    *,
    one: bool,
) -> Tree:
    """Sum the first `count` terms, in blocks of `length`; `one` if there is only one."""

    def block(start: jax.Array | int) -> Tree:
        return jax.lax.fori_loop(
            start,
            jnp.minimum(start + length, count),
            lambda k, total: trees.add(total, term(k)),
            zeros,
        )

    def add_block(number: jax.Array, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        total, lost = carry
        part = block(number * length)
        new = trees.add(total, part)
        return new, jax.tree.map(_rounded_off, lost, total, part, new)

    if one:
        return block(0)
    blocks = (count + length - 1) // length
    return _with_lost(*jax.lax.fori_loop(0, blocks, add_block, (zeros, zeros)))


def _with_lost(total: Tree, lost: Tree) -> Tree:
    # If the sum has overflowed, `lost` is NaN, and the result should still be ∞.
    return jax.tree.map(lambda s, c: s + jnp.where(jnp.isfinite(c), c, 0), total, lost)


def _block(count: int) -> int:
    """Return how many of `count` terms to add one by one: all, if they are few."""
    if count <= FEW:
        return count
    # The last block is filled up in vain: choose the length that wastes the fewest terms.
    lengths = range(FEW // 4, FEW + 1)
    return min(lengths, key=lambda n: (-count % n, abs(n - FEW // 2)))


def _rounded_off(
    lost: jax.Array, total: jax.Array, x: jax.Array, new: jax.Array
) -> jax.Array:
    """Add to `lost` the rounding error of total + x, which is exactly representable."""
    # Knuth's two-sum, unlike the faster one, does not ask which of the two is larger.
    added = new - total
    return lost + ((total - (new - added)) + (x - added))
