"""Which iterates of conjugate gradients are kept, to choose among afterwards.

M falls with every iteration; f need not (report, section 8.7). So some iterates
are kept: `grid` keeps those numbered ⌈first · growth^j⌉ and the last one, as
Martens' program does, and costs that many copies of the parameters; `best` keeps
the one with the lowest f, evaluated at the same iterations during the run, and
costs one.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax import _options, _tree
from hfjax._types import Tree, ValueFn


class Kept(NamedTuple):
    """Kept iterates, oldest first.

    Attributes:
      iterates: a tree like x with a leading axis of slots.
      iterations: shape `[slots]`, int32: each slot's iteration, −1 if it is empty.
      values: shape `[slots]`: f there if `best` knows it, else +inf.
    """

    iterates: Tree
    iterations: jax.Array
    values: jax.Array


class Keeper(NamedTuple):
    """A buffer of iterates inside the loop of `hfjax.cg.solve`.

    Attributes:
      init: `x -> Kept`, the buffer at the start, with `x` as iterate 0.
      update: `(kept, i, x, is_last) -> Kept`, offers iterate `i`.
    """

    init: Callable[[Tree], Kept]
    update: Callable[[Kept, jax.Array, Tree, jax.Array], Kept]


Keep: TypeAlias = Callable[[int, ValueFn | None], Keeper]
"""`(max_iterations, value_fn) -> Keeper`: how a run of CG keeps its iterates."""


def grid(*, first: int = 5, growth: float = 1.3) -> Keep:
    """Keep iterates number ⌈`first` · `growth`^j⌉, and the last.

    Args:
      first: iteration (Martens' program: 5).
      growth: factor between iterations (Martens 2010, section 4.6: 1.3).

    Returns:
      The way of keeping. For 250 iterations it holds 16 copies of x.

    Example:
      >>> from hfjax import cg
      >>> import jax.numpy as jnp
      >>> d = jnp.arange(1.0, 21.0)
      >>> run = cg.solve(
      ...     lambda v: d * v, jnp.ones(20), max_iterations=12, stopping=None
      ... )
      >>> print(run.kept.iterations)
      [ 5  7  9 11 12]
    """
    _check_spacing(first, growth)

    def keep(max_iterations: int, value_fn: ValueFn | None) -> Keeper:
        del value_fn
        ends = _spaced(first, growth, max_iterations)
        slots = len(ends) + 1

        def init(x: Tree) -> Kept:
            return _buffer(x, slots, _tree.scalar_dtype(x))

        def update(kept: Kept, i: jax.Array, x: Tree, is_last: jax.Array) -> Kept:
            # A slot is written over until its iteration has come: so the last iterate
            # is always there, each iteration costs one copy of x, and no branch has
            # the buffer as an operand, which would copy all of it.
            del is_last
            slot = jnp.sum(jnp.asarray(ends, jnp.int32) < i)
            return _write(kept, slot, i, x, kept.values[slot])

        return Keeper(init, update)

    return keep


def best(*, first: int = 5, growth: float = 1.3) -> Keep:
    """Keep only the iterate with the lowest f, for when memory is short.

    f is evaluated during the run, at the iterations of `grid`; the choice is that of
    `hfjax.backtracking.full_search` over the grid.

    Args:
      first: iteration (as `grid`).
      growth: factor between iterations (as `grid`).

    Returns:
      The way of keeping; `hfjax.cg.solve` then needs its `value_fn`.
    """
    _check_spacing(first, growth)

    def keep(max_iterations: int, value_fn: ValueFn | None) -> Keeper:
        if value_fn is None:
            msg = (
                "Keeping the best iterate needs `value_fn`, f at an iterate; got None."
            )
            raise ValueError(msg)
        ends = _spaced(first, growth, max_iterations)

        def init(x: Tree) -> Kept:
            return _buffer(x, 1, _tree.wide(jax.eval_shape(value_fn, x).dtype))

        def update(kept: Kept, i: jax.Array, x: Tree, is_last: jax.Array) -> Kept:
            due = is_last | jnp.any(jnp.asarray(ends, jnp.int32) == i)
            value = jax.lax.cond(
                due,
                lambda: value_fn(x).astype(kept.values.dtype),
                lambda: jnp.full((), jnp.inf, kept.values.dtype),
            )
            # Ties go to the later iterate; NaN never wins.
            better = due & (value <= kept.values[0])
            offered = _write(kept, jnp.zeros((), jnp.int32), i, x, value)
            return jax.tree.map(
                lambda new, old: jnp.where(better, new, old), offered, kept
            )

        return Keeper(init, update)

    return keep


def _check_spacing(first: int, growth: float) -> None:
    _options.check_count("first", first, low=1)
    _options.check_range("growth", growth, low=1.0, open_low=True)


def _spaced(first: int, growth: float, max_iterations: int) -> list[int]:
    """Return the distinct ⌈first · growth^j⌉ below `max_iterations`."""

    def numbers() -> Iterator[int]:
        for j in itertools.count():
            yield math.ceil(first * growth**j)

    below = itertools.takewhile(lambda i: i < max_iterations, numbers())
    return sorted(set(below))


def _buffer(x: Tree, slots: int, dtype: jax.typing.DTypeLike) -> Kept:
    iterates = jax.tree.map(lambda leaf: jnp.stack([leaf] * slots), x)
    iterations = jnp.full(slots, -1, jnp.int32).at[0].set(0)
    return Kept(iterates, iterations, jnp.full(slots, jnp.inf, dtype))


def _write(
    kept: Kept, slot: jax.Array, i: jax.Array, x: Tree, value: jax.Array
) -> Kept:
    write = jax.lax.dynamic_update_index_in_dim
    return Kept(
        jax.tree.map(
            lambda buffer, leaf: write(buffer, leaf, slot, 0), kept.iterates, x
        ),
        write(kept.iterations, i, slot, 0),
        write(kept.values, value, slot, 0),
    )
