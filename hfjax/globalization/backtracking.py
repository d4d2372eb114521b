"""Backtracking: which step of a run is taken.

M falls along a run of conjugate gradients, f need not: the later iterates trust
the model furthest (report, section 8.7). `early_stop` and `full_search` choose among
the kept iterates. (The search for λ of `hfjax.damping.searched` is a rule of this kind
too: it chooses among the steps for other λ.) Each evaluates f at one candidate after
another, in one loop; a value that is not finite counts as +∞. With `cases` f is evaluated
on a part of the evaluation data; the value of the chosen step is that on all of it.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import Tree, ValueFn
from hfjax.solvers.descent import Run, Step
from hfjax.solvers.iterates import Iterates


class Before(NamedTuple):
    """What is known before a step is chosen.

    Attributes:
      value: f(θ), on the cases that f is evaluated on.
      noise: how much of a change of f may be rounding.
      scalar: λ of the run, or the radius.
    """

    value: jax.Array
    noise: jax.Array
    scalar: jax.Array


class Chosen(NamedTuple):
    """The chosen step.

    Attributes:
      step: the step.
      value: f at its end, θ + δ + c; +∞ if it is not finite.
      last_value: f at the end of the run's last step; in an update on all of the data only
        if ρ is to judge that one.
      damping: λ of the next update, where the rule finds it, else `None`.
    """

    step: Step
    value: jax.Array
    last_value: jax.Array
    damping: jax.Array | None = None


Choose: TypeAlias = Callable[[Run, ValueFn, Before], Chosen]
"""`(run, evaluate, before) -> Chosen`, with `evaluate` x ↦ f(θ + x)."""


def _last_step(run: Run, evaluate: ValueFn, before: Before) -> Chosen:
    value = trees.finite_or_inf(evaluate(run.last.at())).astype(before.value.dtype)
    return Chosen(run.last, value, value)


class Backtracking(NamedTuple):
    """A rule for choosing.

    Attributes:
      choose: `(run, evaluate, before) -> Chosen`; left out, the last step is taken, which
        is what `backtracking=None` stands for.
      cases: how many of the evaluation cases it evaluates f on at least, `None` is all.
    """

    choose: Choose = _last_step
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

      >>> from hfjax import cg, iterates
      >>> numbers = jnp.array([5, 7, 9])
      >>> kept = iterates.Iterates(jnp.arange(1.0, 4.0), numbers, jnp.full(3, jnp.inf))
      >>> last = cg.Step(jnp.float32(3.0), jnp.float32(-1.0), numbers[-1])
      >>> run = cg.Run(last, cg.RunStats(numbers[-1], 0, -jnp.ones(10)), kept)
      >>> before = Before(jnp.float32(4.0), jnp.float32(0.0), jnp.float32(1.0))
      >>> chosen = full_search().choose(run, lambda x: (x - 2) ** 2, before)
      >>> print(chosen.step.direction, chosen.step.iteration, chosen.value)
      2.0 7 0.0
    """
    return _backtracking(cases, full=True)


def _backtracking(cases: int | None, *, full: bool) -> Backtracking:
    if cases is not None:
        options.check_count("cases", cases, low=1)

    def choose(run: Run, evaluate: ValueFn, before: Before) -> Chosen:
        if run.iterates is None:  # Of a solver that keeps none.
            return _last_step(run, evaluate, before)
        return _walk(run, run.iterates, evaluate, before, full=full)

    return Backtracking(choose, cases)


class _Walk(NamedTuple):
    slot: jax.Array  # To look at next.
    chosen: jax.Array
    value: jax.Array
    last_value: jax.Array
    going: jax.Array


def _walk(
    run: Run, kept: Iterates, evaluate: ValueFn, before: Before, *, full: bool
) -> Chosen:
    """Go from the last kept iterate back, to the first that is no better or to the first."""
    final = (jnp.sum(kept.iterations >= 0) - 1).astype(jnp.int32)
    dtype = before.value.dtype

    def look(walk: _Walk) -> _Walk:
        value = trees.finite_or_inf(evaluate(_at(kept.iterates, walk.slot))).astype(
            dtype
        )
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

    infinite = jnp.full((), jnp.inf, dtype)
    start = _Walk(final, final, infinite, infinite, jnp.ones((), bool))
    walk = jax.lax.while_loop(lambda walk: walk.going & (walk.slot >= 0), look, start)
    number = kept.iterations[walk.chosen]
    direction = _at(kept.iterates, walk.chosen)
    step = Step(direction, run.stats.model_values[number], number)
    return Chosen(step, walk.value, walk.last_value)


def _at(iterates: Tree, slot: jax.Array) -> Tree:
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, slot, keepdims=False), iterates
    )
