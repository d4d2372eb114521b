"""Which iterates of conjugate gradients are kept, to choose among afterwards.

M falls with every iteration; f need not (report, section 8.7). So some iterates
are kept: `grid` keeps those numbered ⌈first · growth^j⌉ and the last one, as
Martens' program does, and costs that many copies of the parameters; `best` keeps
the one with the lowest f, evaluated at the same iterations during the run, and
costs one; `every` keeps every c-th; `guarded` does so too, evaluates f there, and ends
the run once f has got worse (section 13).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import Number, Tree, ValueFn


class Iterates(NamedTuple):
    """Kept iterates, oldest first.

    Attributes:
      iterates: a tree like x with a leading axis of slots.
      iterations: shape `[slots]`, int32: each slot's iteration, −1 if it is empty.
      values: shape `[slots]`: f there if `best` knows it, else +inf.
    """

    iterates: Tree
    iterations: jax.Array
    values: jax.Array


class IterateBuffer(NamedTuple):
    """A buffer of iterates inside the loop of `hfjax.cg.solve`.

    Attributes:
      init: `x -> Iterates`, the buffer at the start, with `x` as iterate 0.
      update: `(kept, i, x, is_last) -> Iterates`, offers iterate `i`.
      stop: `(kept, i) -> bool`, whether the run is to end after iterate `i`.
    """

    init: Callable[[Tree], Iterates]
    update: Callable[[Iterates, jax.Array, Tree, jax.Array], Iterates]
    stop: Callable[[Iterates, jax.Array], jax.Array] = lambda kept, i: jnp.zeros(
        (), bool
    )


class IterateRule(NamedTuple):
    """Which iterates a run of conjugate gradients keeps.

    Attributes:
      build: `(max_iterations, value_fn) -> IterateBuffer`.
      evaluates: whether the run evaluates f, so that `Iterates.values` are known.
      data: of an update that f is then evaluated on, `"batch"` or `"eval_batch"`.
    """

    build: Callable[[int, ValueFn | None], IterateBuffer]
    evaluates: bool = False
    data: str = "eval_batch"


def grid(*, first: int = 5, growth: float = 1.3) -> IterateRule:
    """Keep iterates number ⌈`first` · `growth`^j⌉, and the last.

    Args:
      first: iteration (Martens' program: 5).
      growth: factor between iterations (Martens 2010, section 4.6: 1.3).

    Returns:
      The rule. For 250 iterations it holds 16 copies of x.

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
    return IterateRule(
        lambda max_iterations, value_fn: _slots(_spaced(first, growth, max_iterations))
    )


def every(interval: int) -> IterateRule:
    """Keep iterates number c, 2c, 3c, …, and the last (report, section 8.7).

    Args:
      interval: c.

    Returns:
      The rule: a copy of x for every c-th of `max_iterations`.
    """
    options.check_count("interval", interval, low=1)
    return IterateRule(
        lambda max_iterations, value_fn: _slots(_multiples(interval, max_iterations))
    )


def best(*, first: int = 5, growth: float = 1.3) -> IterateRule:
    """Keep only the iterate with the lowest f, for when memory is short.

    f is evaluated during the run, at the iterations of `grid`; the choice is that of
    `hfjax.backtracking.full_search` over the grid.

    Args:
      first: iteration (as `grid`).
      growth: factor between iterations (as `grid`).

    Returns:
      The rule; `hfjax.cg.solve` then needs its `value_fn`.
    """
    _check_spacing(first, growth)

    def build(max_iterations: int, value_fn: ValueFn | None) -> IterateBuffer:
        value_fn = _needed(value_fn)
        ends = _spaced(first, growth, max_iterations)

        def init(x: Tree) -> Iterates:
            return _start(x, 1, trees.wide(jax.eval_shape(value_fn, x).dtype))

        def update(
            kept: Iterates, i: jax.Array, x: Tree, is_last: jax.Array
        ) -> Iterates:
            due = is_last | jnp.any(jnp.asarray(ends, jnp.int32) == i)
            value = jax.lax.cond(
                due,
                lambda: value_fn(x).astype(kept.values.dtype),
                lambda: jnp.full((), jnp.inf, kept.values.dtype),
            )
            # Ties go to the later iterate; NaN never wins.
            better = due & (value <= kept.values[0])
            slot = jnp.zeros((), jnp.int32)
            # A selection would write all of it anew in each iteration.
            return jax.lax.cond(
                better, lambda: _write(kept, slot, i, x, value), lambda: kept
            )

        return IterateBuffer(init, update)

    return IterateRule(build, evaluates=True)


def guarded(
    interval: int = 10, *, tolerance: Number = 0.01, data: str = "batch"
) -> IterateRule:
    """Keep every c-th iterate with f there; end the run once f has got worse.

    It ends at iterate i = kc when f(xᵢ) > f(xᵢ₋c) + `tolerance` · (highest − lowest f
    so far in the run), for k > 1, or f(xᵢ) is not finite: f is "significantly worse than its
    value from some number of steps ago (e.g. 10)". Beware: how long runs are then
    depends on λ, and λ on how long they are (report, end of section 8.5).

    Args:
      interval: c (report, section 13: 10).
      tolerance: share of the range of f that counts as significant; heuristic.
      data: of an update that f is evaluated on: `"batch"`, the curvature data (ibid.),
        or `"eval_batch"`.

    Returns:
      The rule; `hfjax.cg.solve` then needs its `value_fn`. With
      `conjugate_gradient(warm_start_from="best")` the next run starts from the
      iterate of the lowest f.

    Raises:
      ValueError: if an option is out of range.

    References:
      Martens & Sutskever (2012), sections 8.7 and 13, second recipe.
    """
    options.check_count("interval", interval, low=1)
    options.check_range("tolerance", tolerance, low=0.0)
    options.check_choice("data", data, ("batch", "eval_batch"))

    def build(max_iterations: int, value_fn: ValueFn | None) -> IterateBuffer:
        value_fn = _needed(value_fn)
        ends = _multiples(interval, max_iterations)
        slots = _slots(ends)

        def update(
            kept: Iterates, i: jax.Array, x: Tree, is_last: jax.Array
        ) -> Iterates:
            kept = slots.update(kept, i, x, is_last)
            slot = _slot_of(ends, i)
            value = jax.lax.cond(
                is_last | (i % interval == 0),
                lambda: value_fn(x).astype(kept.values.dtype),
                lambda: kept.values[slot],
            )
            return kept._replace(values=kept.values.at[slot].set(value))

        def stop(kept: Iterates, i: jax.Array) -> jax.Array:
            slot = _slot_of(ends, i)
            now, before = kept.values[slot], kept.values[jnp.maximum(slot - 1, 0)]
            seen = jnp.isfinite(kept.values)
            lowest = jnp.min(jnp.where(seen, kept.values, jnp.inf))
            highest = jnp.max(jnp.where(seen, kept.values, -jnp.inf))
            worse = ~(now <= before + tolerance * (highest - lowest))
            worse = ((slot > 0) & worse) | ~jnp.isfinite(now)
            return (i % interval == 0) & worse

        return IterateBuffer(slots.init, update, stop)

    return IterateRule(build, evaluates=True, data=data)


def _slots(ends: list[int]) -> IterateBuffer:
    """Keep the iterates numbered `ends`, and the last."""

    def init(x: Tree) -> Iterates:
        return _start(x, len(ends) + 1, trees.scalar_dtype(x))

    def update(kept: Iterates, i: jax.Array, x: Tree, is_last: jax.Array) -> Iterates:
        # A slot is written over until its iteration has come: so the last iterate is
        # always there, each iteration costs one copy of x, and no branch has the
        # buffer as an operand, which would copy all of it.
        del is_last
        slot = _slot_of(ends, i)
        return _write(kept, slot, i, x, kept.values[slot])

    return IterateBuffer(init, update)


def _slot_of(ends: list[int], i: jax.Array) -> jax.Array:
    return jnp.sum(jnp.asarray(ends, jnp.int32) < i)


def _needed(value_fn: ValueFn | None) -> ValueFn:
    if value_fn is None:
        msg = "Judging iterates by f needs `value_fn`, f at an iterate; got None."
        raise ValueError(msg)
    return value_fn


def _multiples(interval: int, max_iterations: int) -> list[int]:
    return list(range(interval, max_iterations, interval))


def _check_spacing(first: int, growth: float) -> None:
    options.check_count("first", first, low=1)
    options.check_range("growth", growth, low=1.0, open_low=True)


def _spaced(first: int, growth: float, max_iterations: int) -> list[int]:
    """Return the distinct ⌈first · growth^j⌉ below `max_iterations`."""

    def numbers() -> Iterator[int]:
        for j in itertools.count():
            yield math.ceil(first * growth**j)

    below = itertools.takewhile(lambda i: i < max_iterations, numbers())
    return sorted(set(below))


def _start(x: Tree, slots: int, dtype: jax.typing.DTypeLike) -> Iterates:
    iterates = jax.tree.map(lambda leaf: jnp.stack([leaf] * slots), x)
    iterations = jnp.full(slots, -1, jnp.int32).at[0].set(0)
    return Iterates(iterates, iterations, jnp.full(slots, jnp.inf, dtype))


def _write(
    kept: Iterates, slot: jax.Array, i: jax.Array, x: Tree, value: jax.Array
) -> Iterates:
    write = jax.lax.dynamic_update_index_in_dim
    slot = jnp.asarray(slot, jnp.int32)
    here = jnp.arange(len(kept.iterations), dtype=jnp.int32) == slot
    return Iterates(
        jax.tree.map(
            lambda buffer, leaf: write(buffer, leaf, slot, 0), kept.iterates, x
        ),
        jnp.where(here, i, kept.iterations),
        jnp.where(here, value, kept.values),
    )
