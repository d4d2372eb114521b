"""Backtracking: which of the kept CG iterates becomes the step.

M falls along a run of conjugate gradients, f need not: the later iterates trust
the model furthest (report, section 8.7). Both rules evaluate f at kept iterates,
one at a time, in one loop; what is not finite counts as +∞. With `cases` they do so
on a part of the evaluation data, and once on all of it, for the chosen one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _tree
from hfjax._types import Tree, ValueFn
from hfjax.iterates import Kept


class Choice(NamedTuple):
    """The chosen iterate.

    Attributes:
      step: δ, like the parameters.
      iteration: int32 scalar, its number.
      value: f(θ + δ); +∞ if it is not finite.
      last_value: f at the last kept iterate.
    """

    step: Tree
    iteration: jax.Array
    value: jax.Array
    last_value: jax.Array


class Backtracking(NamedTuple):
    """A rule for choosing.

    Attributes:
      choose: `(value_fn, kept) -> Choice`.
      cases: how many of the evaluation cases it looks at, `None` is all.
    """

    choose: Callable[[ValueFn, Kept], Choice]
    cases: int | None = None


def early_stop(*, cases: int | None = None) -> Backtracking:
    """Walk from the last iterate back, and stop at the first that is no better.

    Args:
      cases: how many of the evaluation cases (of each device's, under `axis_name`) to
        compare the iterates on at least: every k-th, with the largest k for which
        they are so many; `None` is all (report, section 8.7: "only on a small
        subset").

    Returns:
      The rule of Martens' program (Martens 2010, section 4.6).

    Raises:
      TypeError: if `cases` is no Python integer.
      ValueError: if it is less than 1.
    """
    return _backtracking(cases, full=False)


def full_search(*, cases: int | None = None) -> Backtracking:
    """Evaluate every kept iterate and take the lowest f; of equals, the latest.

    Args:
      cases: as in `early_stop`.

    Returns:
      The rule (report, section 8.7).

    Raises:
      TypeError: if `cases` is no Python integer.
      ValueError: if it is less than 1.

    Example:
      Of the iterates 1, 2 and 3, f = (x − 2)² is lowest at the second:

      >>> kept = Kept(jnp.arange(1.0, 4.0), jnp.array([5, 7, 9]), jnp.full(3, jnp.inf))
      >>> choice = full_search().choose(lambda x: (x - 2) ** 2, kept)
      >>> print(choice.step, choice.iteration, choice.value, choice.last_value)
      2.0 7 0.0 1.0
    """
    return _backtracking(cases, full=True)


def last() -> Backtracking:
    """Take the last iterate: what `backtracking=None` stands for.

    Returns:
      The rule.
    """

    def choose(value_fn: ValueFn, kept: Kept) -> Choice:
        slot = _last_slot(kept)
        step = _at(kept.iterates, slot)
        value = finite_or_inf(value_fn(step))
        return Choice(step, kept.iterations[slot], value, value)

    return Backtracking(choose)


def _backtracking(cases: int | None, *, full: bool) -> Backtracking:
    if cases is not None:
        _options.check_count("cases", cases, low=1)
    return Backtracking(lambda value_fn, kept: _walk(value_fn, kept, full=full), cases)


class _Walk(NamedTuple):
    slot: jax.Array  # To look at next.
    chosen: jax.Array
    value: jax.Array
    last_value: jax.Array
    going: jax.Array


def _walk(value_fn: ValueFn, kept: Kept, *, full: bool) -> Choice:
    final = _last_slot(kept)

    def look(walk: _Walk) -> _Walk:
        value = finite_or_inf(value_fn(_at(kept.iterates, walk.slot)))
        value = value.astype(walk.value.dtype)
        first = walk.slot == final
        better = (value < walk.value) | first
        # A value that is not finite is not one to stop at.
        going = better | full | ~jnp.isfinite(walk.value)
        return _Walk(
            slot=walk.slot - 1,
            chosen=jnp.where(better, walk.slot, walk.chosen),
            value=jnp.where(better, value, walk.value),
            last_value=jnp.where(first, value, walk.last_value),
            going=going,
        )

    infinite = jnp.full((), jnp.inf, _tree.scalar_dtype(kept.iterates))
    start = _Walk(final, final, infinite, infinite, jnp.ones((), bool))
    end = jax.lax.while_loop(lambda walk: walk.going & (walk.slot >= 0), look, start)
    step = _at(kept.iterates, end.chosen)
    return Choice(step, kept.iterations[end.chosen], end.value, end.last_value)


def _last_slot(kept: Kept) -> jax.Array:
    return (jnp.sum(kept.iterations >= 0) - 1).astype(jnp.int32)


def _at(iterates: Tree, slot: jax.Array) -> Tree:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), iterates
    )


def finite_or_inf(value: jax.Array) -> jax.Array:
    """Return f, and +∞ for what is not finite.

    Args:
      value: f at a candidate.

    Returns:
      A scalar that is less than +∞ only where f is a number.

    Example:
      >>> print(finite_or_inf(jnp.float32(2.0)), finite_or_inf(jnp.float32(jnp.nan)))
      2.0 inf
    """
    return jnp.where(jnp.isfinite(value), value, jnp.inf)
