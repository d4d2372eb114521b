"""Backtracking: choose which step of a run to take.

M falls along a run of conjugate gradients, but f need not: later iterates trust the model
further. `early_stop` and `full_search` choose among the kept iterates by f, where a value
that is not finite counts as +∞. With `cases`, they evaluate f on a subset of the
evaluation data, and then once on all of them, at the chosen step.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import ValueFn
from hfjax.solvers.descent import Run, Step
from hfjax.solvers.iterates import Iterates, by_age


class Before(NamedTuple):
    """What is known before a step is chosen.

    Attributes:
      value: f(θ), on the data on which the rule evaluates f.
      noise: how much of a change of f may be rounding.
      scalar: λ of the run, or the radius.
      partial: whether B may be of other cases than f (`hfjax.sampling`, `eval_batch`).
    """

    value: jax.Array
    noise: jax.Array
    scalar: jax.Array
    partial: jax.Array | bool = False


class Chosen(NamedTuple):
    """The chosen step.

    Attributes:
      step: the step.
      value: f at its end, θ + δ + c; +∞ if it is not finite.
      last_value: f at the end of the last step of the run. In an update it is on all of
        the evaluation data only if ρ is of that step.
      damping: λ of the next update if the rule finds it, else `None`.
    """

    step: Step
    value: jax.Array
    last_value: jax.Array
    damping: jax.Array | None = None


Choose: TypeAlias = Callable[[Run, ValueFn, Before], Chosen]
"""`(run, evaluate, before) -> Chosen`, where `evaluate` is x ↦ f(θ + x)."""


def _last_step(run: Run, evaluate: ValueFn, before: Before) -> Chosen:
    value = trees.finite_or_inf(evaluate(run.last.at())).astype(before.value.dtype)
    return Chosen(run.last, value, value)


class Backtracking(NamedTuple):
    """A rule for choosing a step.

    Attributes:
      choose: `(run, evaluate, before) -> Chosen`. By default the last step is taken,
        which is also what `backtracking=None` means.
      cases: evaluate f on at least this many of the evaluation examples; `None` is all.
    """

    choose: Choose = _last_step
    cases: int | None = None


def early_stop(*, cases: int | None = None) -> Backtracking:
    """Walk back from the last iterate, and stop at the first that is not better.

    Args:
      cases: compare iterates on at least this many evaluation examples (of each device,
        under `axis_name`): on every k-th, with the largest k that leaves enough. `None`
        is all.

    Returns:
      The rule.

    Raises:
      TypeError: if `cases` is not a Python integer.
      ValueError: if it is less than 1.

    References:
      Martens (2010), section 4.6; Martens & Sutskever (2012), section 8.7.
    """
    return _backtracking(cases, full=False)


def full_search(*, cases: int | None = None) -> Backtracking:
    """Evaluate f at every kept iterate, and take the lowest; the latest one of equals.

    Args:
      cases: as in `early_stop`.

    Returns:
      The rule.

    Raises:
      TypeError: if `cases` is not a Python integer.
      ValueError: if it is less than 1.

    Example:
      Of the iterates 1, 2 and 3, the second has the lowest f = (x − 2)²:

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
        if run.iterates is None:  # Not every solver keeps iterates.
            return _last_step(run, evaluate, before)
        return _walk(run, run.iterates, evaluate, before, full=full)

    return Backtracking(choose, cases)


class _Walk(NamedTuple):
    age: jax.Array  # of the next to evaluate; 0 is the oldest
    chosen: jax.Array
    value: jax.Array
    last_value: jax.Array
    going: jax.Array


def _walk(
    run: Run, kept: Iterates, evaluate: ValueFn, before: Before, *, full: bool
) -> Chosen:
    """Walk back from the last iterate, to the first that is not better unless `full`."""
    slots, dtype = by_age(kept.iterations), before.value.dtype
    newest = (jnp.sum(kept.iterations >= 0) - 1).astype(jnp.int32)

    # A loop that evaluates one iterate at a time, so that f is compiled only once.
    def look(walk: _Walk) -> _Walk:
        slot = slots[walk.age]
        x = trees.row(kept.iterates, slot)
        value = trees.finite_or_inf(evaluate(x)).astype(dtype)
        first = walk.age == newest
        better = (value < walk.value) | first
        return _Walk(
            age=walk.age - 1,
            chosen=jnp.where(better, slot, walk.chosen),
            value=jnp.where(better, value, walk.value),
            last_value=jnp.where(first, value, walk.last_value),
            # Never stop at a value that is not finite.
            going=better | full | ~jnp.isfinite(walk.value),
        )

    infinite = jnp.full((), jnp.inf, dtype)
    start = _Walk(newest, slots[newest], infinite, infinite, jnp.ones((), bool))
    walk = jax.lax.while_loop(lambda walk: walk.going & (walk.age >= 0), look, start)
    number = kept.iterations[walk.chosen]
    direction = trees.row(kept.iterates, walk.chosen)
    step = Step(direction, run.stats.model_values[number], number)
    return Chosen(step, walk.value, walk.last_value)
