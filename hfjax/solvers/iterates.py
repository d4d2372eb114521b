"""Which iterates of conjugate gradients to keep, for backtracking to choose among.

M falls with every iteration, but f need not, so some iterates are kept, each a copy of
the parameters. `at_most` keeps so many, thinned out as the run goes on. `grid` keeps those
numbered ⌈first · growth^j⌉ and the last; `every` keeps every c-th. `best` evaluates f on
the grid during the run and keeps a single iterate. `guarded` keeps every c-th with f
there, and ends the run once f has increased.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import Number, Tree, ValueFn


class Iterates(NamedTuple):
    """Kept iterates: oldest first, except those of `at_most`.

    Attributes:
      iterates: a tree like x with a leading axis of slots.
      iterations: shape `[slots]`, int32: the iteration of each slot; −1 if it is empty.
      values: shape `[slots]`: f there if the rule evaluates it, else +∞.
    """

    iterates: Tree
    iterations: jax.Array
    values: jax.Array


class IterateBuffer(NamedTuple):
    """A buffer of iterates inside the loop of `hfjax.cg.solve`.

    Attributes:
      init: `x -> Iterates`, the buffer at the start, with `x` as iterate 0.
      update: `(kept, i, x, is_last) -> Iterates`, offers iterate `i` to the buffer.
      stop: `(kept, i) -> bool`, whether to end the run after iterate `i`.
    """

    init: Callable[[Tree], Iterates]
    update: Callable[[Iterates, jax.Array, Tree, jax.Array], Iterates]
    stop: Callable[[Iterates, jax.Array], jax.Array] = lambda *_: jnp.zeros((), bool)


class IterateRule(NamedTuple):
    """Which iterates a run of conjugate gradients keeps.

    Attributes:
      build: `(max_iterations, value_fn) -> IterateBuffer`.
      evaluates: whether the run evaluates f, so that `Iterates.values` are known.
      data: the data on which an update evaluates f then, `"batch"` or `"eval_batch"`.
    """

    build: Callable[[int, ValueFn | None], IterateBuffer]
    evaluates: bool = False
    data: str = "eval_batch"


def at_most(slots: int = 6) -> IterateRule:
    """Keep at most so many iterates, thinned out as the run goes on.

    The first `slots` iterates are all kept. After that, each new one takes the place of an
    earlier one: of any three kept in succession, numbered i < j < k, it is the j for which
    k / i is smallest. So the first and the last stay, and the numbers between them grow
    about geometrically. Their place says nothing of their order; `iterations` does.

    Args:
      slots: the most iterates to keep, at least 2.

    Returns:
      The rule. It holds `slots` copies of x, however long the run.

    Raises:
      TypeError: if `slots` is not a Python integer.
      ValueError: if it is less than 2.

    Example:
      >>> from hfjax import cg
      >>> import jax.numpy as jnp
      >>> options = {"max_iterations": 30, "stopping": None, "keep": at_most(5)}
      >>> d = jnp.arange(1.0, 41.0)
      >>> run = cg.solve(lambda v: d * v, jnp.ones(40), **options)
      >>> print(jnp.sort(run.kept.iterations))
      [ 1  2  7 24 30]
    """
    options.check_count("slots", slots, low=2)

    def build(max_iterations: int, value_fn: ValueFn | None) -> IterateBuffer:
        del value_fn
        places = jnp.asarray(_thinned(slots, max_iterations), jnp.int32)
        return _slots(min(slots, max(max_iterations, 1)), lambda i: places[i])

    return IterateRule(build)


def grid(*, first: int = 5, growth: float = 1.3) -> IterateRule:
    """Keep iterates number ⌈`first` · `growth`^j⌉, j = 0, 1, …, and the last.

    Args:
      first: the first iteration to keep.
      growth: factor > 1 between iterations.

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
        lambda max_iterations, value_fn: _ending(_spaced(first, growth, max_iterations))
    )


def every(interval: int) -> IterateRule:
    """Keep iterates number c, 2c, 3c, …, and the last.

    Args:
      interval: c.

    Returns:
      The rule. It holds a copy of x for every c-th of `max_iterations`.
    """
    options.check_count("interval", interval, low=1)
    return IterateRule(
        lambda max_iterations, value_fn: _ending(_multiples(interval, max_iterations))
    )


def best(*, first: int = 5, growth: float = 1.3) -> IterateRule:
    """Keep only the iterate with the lowest f, to save memory.

    f is evaluated during the run, at the iterations of `grid`, and the choice is that of
    `hfjax.backtracking.full_search` over the grid.

    Args:
      first: as in `grid`.
      growth: as in `grid`.

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
            # A `select` would copy the buffer in every iteration.
            return jax.lax.cond(
                better, lambda: _write(kept, 0, i, x, value), lambda: kept
            )

        return IterateBuffer(init, update)

    return IterateRule(build, evaluates=True)


def guarded(
    interval: int = 10, *, tolerance: Number = 0.01, data: str = "batch"
) -> IterateRule:
    """Keep every c-th iterate and f there; end the run once f has increased.

    The run ends at iterate i = kc, for k > 1, if

        f(xᵢ) > f(xᵢ₋c) + tolerance · (highest − lowest f so far in the run),

    and for any k if f(xᵢ) is not finite. Beware: the length of a run then depends on λ,
    and λ on the length of runs.

    Args:
      interval: c.
      tolerance: the increase to accept, as a fraction of the range of f.
      data: on which data an update evaluates f: `"batch"`, the curvature data, or
        `"eval_batch"`.

    Returns:
      The rule; `hfjax.cg.solve` then needs its `value_fn`. With
      `conjugate_gradient(warm_start_from="best")` the next run starts from the iterate
      with the lowest f.

    Raises:
      ValueError: if an option is out of range.

    References:
      Martens & Sutskever (2012), sections 8.5 (end), 8.7 and 13, second recipe.
    """
    options.check_count("interval", interval, low=1)
    options.check_range("tolerance", tolerance, low=0.0)
    options.check_choice("data", data, ("batch", "eval_batch"))

    def build(max_iterations: int, value_fn: ValueFn | None) -> IterateBuffer:
        value_fn = _needed(value_fn)
        ends = _multiples(interval, max_iterations)
        slots = _ending(ends)

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
            # Slots that are still empty hold +∞ and do not count.
            seen = jnp.isfinite(kept.values)
            lowest = jnp.min(jnp.where(seen, kept.values, jnp.inf))
            highest = jnp.max(jnp.where(seen, kept.values, -jnp.inf))
            # Written so that NaN counts as worse.
            worse = ~(now <= before + tolerance * (highest - lowest))
            worse = ((slot > 0) & worse) | ~jnp.isfinite(now)
            return (i % interval == 0) & worse

        return IterateBuffer(slots.init, update, stop)

    return IterateRule(build, evaluates=True, data=data)


def by_age(iterations: jax.Array) -> jax.Array:
    """Return the slots of kept iterates, oldest first, and then those that are empty.

    Args:
      iterations: of `Iterates`.

    Returns:
      int32, like `iterations`.
    """
    numbers = jnp.arange(len(iterations), dtype=jnp.int32)
    latest = jnp.iinfo(jnp.int32).max - len(numbers)
    age = jnp.where(iterations < 0, latest + numbers, iterations)
    # Not `argsort`: a sort is one more program to compile.
    place = jnp.sum(age[None] < age[:, None], axis=1, dtype=jnp.int32)
    slots = jnp.where(place[None] == numbers[:, None], numbers[None], 0)
    return jnp.sum(slots, axis=1, dtype=jnp.int32)


def _slots(count: int, slot_of: Callable[[jax.Array], jax.Array]) -> IterateBuffer:
    """Keep every iterate in its slot, until another one takes it."""

    def init(x: Tree) -> Iterates:
        return _start(x, count, trees.scalar_dtype(x))

    def update(kept: Iterates, i: jax.Array, x: Tree, is_last: jax.Array) -> Iterates:
        # So the last one is always there, and an iteration costs one copy of x. A `cond`
        # with the buffer as an operand would copy all of it.
        del is_last
        slot = slot_of(i)
        return _write(kept, slot, i, x, kept.values[slot])

    return IterateBuffer(init, update)


def _thinned(slots: int, last: int) -> list[int]:
    """Return the slot of each of the iterations 0, 1, …, `last` of `at_most`."""
    kept: list[int] = []  # oldest first
    places = [0]
    for i in range(1, last + 1):
        place = i - 1
        if len(kept) == slots:
            *inner, newest = range(1, slots)
            after = {j: kept[j + 1] for j in inner} | {newest: i}
            j = min(after, key=lambda j: after[j] / kept[j - 1])
            place = places[kept.pop(j)]
        kept.append(i)
        places.append(place)
    return places


def _ending(ends: list[int]) -> IterateBuffer:
    """Keep the iterates numbered `ends`, and the last."""
    # Every iterate overwrites the slot of the next iteration to keep.
    return _slots(len(ends) + 1, lambda i: _slot_of(ends, i))


def _slot_of(ends: list[int], i: jax.Array) -> jax.Array:
    """Return the slot of the first iteration to keep that is not before `i`."""
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
    numbers = (math.ceil(first * growth**j) for j in itertools.count())
    return sorted(set(itertools.takewhile(lambda i: i < max_iterations, numbers)))


def _start(x: Tree, slots: int, dtype: jax.typing.DTypeLike) -> Iterates:
    iterates = jax.tree.map(lambda leaf: jnp.stack([leaf] * slots), x)
    iterations = jnp.full(slots, -1, jnp.int32).at[0].set(0)
    return Iterates(iterates, iterations, jnp.full(slots, jnp.inf, dtype))


def _write(
    kept: Iterates, slot: jax.Array | int, i: jax.Array, x: Tree, value: jax.Array
) -> Iterates:
    slot = jnp.asarray(slot, jnp.int32)
    here = jnp.arange(len(kept.iterations), dtype=jnp.int32) == slot
    return Iterates(
        trees.with_row(kept.iterates, slot, x),
        jnp.where(here, i, kept.iterations),
        jnp.where(here, value, kept.values),
    )
