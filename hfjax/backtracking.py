"""Backtracking: which step the kept iterates of CG become.

M falls along a run of conjugate gradients, f need not: the later iterates trust
the model furthest (report, section 8.7). `early_stop` and `full_search` choose among
the kept iterates; `redamped` chooses among the solutions for other λ over all that they
span, and so finds λ, too. Each evaluates f at one candidate after another, in one loop;
what is not finite counts as +∞. With `cases` they do so on a part of the evaluation
data; f of the chosen one is that on all of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _sharding, _tree
from hfjax._path import Solution, end
from hfjax._redamping import subspace
from hfjax._types import Number, Tree, ValueFn
from hfjax.iterates import Kept

_CREDIBLE = 10.0
"""Times what M says that f may fall; heuristic."""

_MORE = 1.1
"""Times as much of M makes λ worth falling where f shows nothing; heuristic."""


class Choice(NamedTuple):
    """The chosen iterate.

    Attributes:
      step: δ, like the parameters.
      correction: as in `Solution`, where the solver has one: f is looked at at θ + δ + c.
      iteration: int32 scalar, its number; the last iterate's if it is none itself.
      value: f(θ + δ + c); +∞ if it is not finite.
      last_value: f at the last kept iterate; in an update on all of the data only if ρ
        is to judge that one.
      model: M(δ) of a step that is no iterate, else `None`.
      damping: λ of the next update, where the rule finds it, else `None`.
    """

    step: Tree
    iteration: jax.Array
    value: jax.Array
    last_value: jax.Array
    model: jax.Array | None = None
    damping: jax.Array | None = None
    correction: Tree | None = None


class Run(NamedTuple):
    """What a rule that finds λ is told of a run besides its kept iterates.

    Attributes:
      model_values: M at every iterate.
      b: −∇f.
      value: f(θ), on the cases that f is looked at.
      noise: how much of a change of f may be rounding.
      damping: λ.
      other: as in `CGResult`; `None` where the kept iterates tell.
      pulled: as in `CGResult`.
    """

    model_values: jax.Array
    b: Tree
    value: jax.Array
    noise: jax.Array
    damping: jax.Array
    other: Callable[[jax.Array], Solution] | None = None
    pulled: bool = False


class Backtracking(NamedTuple):
    """A rule for choosing.

    Attributes:
      choose: `(value_fn, kept) -> Choice`, or `(value_fn, kept, run) -> Choice` of a
        rule that finds λ.
      cases: how many of the evaluation cases it looks at, `None` is all.
      finds_damping: whether it does.
      otherwise: what takes its place where λ cannot be found, or is not to be.
    """

    choose: Callable[..., Choice]
    cases: int | None = None
    finds_damping: bool = False
    otherwise: "Backtracking | None" = None


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


def redamped(
    *,
    factor: Number = 4.0,
    tolerance: Number = 0.01,
    max_tries: int = 8,
    cases: int | None = 2000,
    otherwise: Backtracking | None = None,
) -> Backtracking:
    """Solve again for other λ over the kept iterates, and take the λ of the lowest f.

    After one run with λ the minimum of M for λ·`factor`^p, over the subspace that its
    kept iterates span, costs no product (`hfjax._redamping`). f is evaluated there for
    p = 0, then 1, 2, … while it gets lower, or else −1, −2, …; the step is the last that
    was lower, and its λ is that of the next update. So a λ that is off by orders of
    magnitude costs evaluations of f, not updates, in both directions. Of two λ whose f
    differ by less than `tolerance` of the gain it takes the higher one: where λ makes
    no difference it does not fall. (With momentum it stays: there a high λ is no short step,
    but the last one again.)

    It goes with `damping.searched`, which takes the λ that is found; ρ is still told.

    Args:
      factor: between one λ and the next, above 1 (4: measured,
        `benchmarks/results/step6.md`; heuristic).
      tolerance: share of f's gain (0.01: heuristic).
      max_tries: evaluations of f, at most (8: a factor of 4⁷ up, 4⁶ down; heuristic).
      cases: as in `early_stop`; with fewer than twice as many, f is looked at on all of
        them (2,000: as `preconditioners.kronecker`; λ of a quarter, 500, led as far in as
        many iterations, `benchmarks/results/step6.md`).
      otherwise: the rule where the solver does not tell of other λ, or `damping` is not
        `searched`; `None` is an error.

    Returns:
      The rule. It needs `damping.searched`, and conjugate gradients with
      `keep=iterates.grid(first=1)` or `every`; a structural μ stays as it was in the run.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      λ = 100 is far too much for f = ½(x − 2)²; one run finds that out:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: p * x, hfjax.losses.squared_error())
      >>> tx = hfjax.hessian_free(
      ...     f,
      ...     damping=hfjax.damping.searched(init=100.0),
      ...     solver=hfjax.cg.conjugate_gradient(
      ...         keep=hfjax.iterates.grid(first=1), warm_start_decay=None
      ...     ),
      ...     backtracking=redamped(),
      ... )
      >>> batch, p = (jnp.ones((1, 1)), jnp.full((1, 1), 2.0)), jnp.zeros(1)
      >>> grads = f.value_and_grad(p, batch)[1]
      >>> updates, state = tx.update(grads, tx.init(p), p, batch=batch)
      >>> print(f"{updates[0]:.2f} {state.damping:.3f}")  # 2 / (1 + λ), λ = 100 / 4⁵
      1.82 0.098
    """
    _options.check_range("factor", factor, low=1.0, open_low=True)
    _options.check_range("tolerance", tolerance, low=0.0, high=1.0)
    _options.check_count("max_tries", max_tries, low=1)
    if cases is not None:
        _options.check_count("cases", cases, low=1)

    def choose(value_fn: ValueFn, kept: Kept, run: Run) -> Choice:
        solve, costly = run.other, run.other is not None
        if solve is None:
            solve = subspace(kept, run.model_values, run.b, run.damping).solve
        dtype = run.value.dtype

        def damping_at(power: jax.Array) -> jax.Array:
            return run.damping * jnp.asarray(factor, dtype) ** power

        def look_at(solution: Solution) -> tuple[jax.Array, jax.Array, jax.Array]:
            reached = end(solution.step, solution.correction)
            value = finite_or_inf(value_fn(reached)).astype(dtype)
            # A fall that M knows nothing of is rounding, and would lead λ anywhere.
            promised = -solution.undamped.astype(dtype)
            unknown = run.value - value > _CREDIBLE * promised
            return value, jnp.where(unknown, run.value, value), promised

        def look(search: _Search) -> _Search:
            solution = solve(damping_at(search.trial))
            found, value, promised = look_at(solution)
            first, up = search.tries == 0, search.trial > search.power
            gain = run.value - search.lowest
            share = _options.like(tolerance, gain)
            slack = jnp.where(gain > run.noise, share * gain, -run.noise)
            slack = jnp.where(jnp.isfinite(slack), slack, 0)
            # Of equals the higher λ, unless there is nothing but rounding to tell by.
            # But with momentum λ without end is to go on as before: equals stay.
            above = value <= search.lowest + (-jnp.abs(slack) if run.pulled else slack)
            below = value < search.lowest - jnp.maximum(jnp.abs(slack), run.noise)
            # A step that f cannot show is no evidence against a longer one.
            hidden = search.promised <= run.noise
            hidden &= value <= run.value + run.noise
            below |= hidden & (promised > _MORE * search.promised)
            better = first | jnp.where(up, above, below)
            # Downwards only if the first step up was no good.
            turns = up & ~better & (search.power == 0)
            power = jnp.where(better, search.trial, search.power)
            direction = jnp.where((first | up) & ~turns, 1, -1).astype(dtype)
            lowest = jnp.minimum(value, search.lowest)
            if costly:
                solution = _tree.select(better, solution, search.solution)
            return _Search(
                trial=power + direction,
                power=power,
                value=jnp.where(better, found, search.value),
                lowest=jnp.where(better, lowest, search.lowest),
                promised=jnp.where(better, promised, search.promised),
                first_value=jnp.where(first, found, search.first_value),
                tries=search.tries + 1,
                going=better | turns,
                solution=solution if costly else None,
            )

        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        start = _Search(
            trial=zero,
            power=zero,
            value=infinite,
            lowest=infinite,
            promised=zero,
            first_value=infinite,
            tries=jnp.zeros((), jnp.int32),
            going=jnp.ones((), bool),
            solution=_sharding.zeros(jax.eval_shape(solve, run.damping))
            if costly
            else None,
        )
        search = jax.lax.while_loop(
            lambda search: search.going & (search.tries < max_tries), look, start
        )
        damping = damping_at(search.power)
        taken = solve(damping) if search.solution is None else search.solution
        return Choice(
            step=taken.step,
            iteration=kept.iterations[_last_slot(kept)],
            value=search.value,
            last_value=search.first_value,
            model=taken.model,
            damping=damping,
            correction=taken.correction,
        )

    return Backtracking(choose, cases, finds_damping=True, otherwise=otherwise)


class _Search(NamedTuple):
    trial: jax.Array  # Power of `factor` to look at next.
    power: jax.Array  # That of the best λ so far.
    value: jax.Array  # f there.
    lowest: jax.Array  # f so far.
    promised: jax.Array  # Its fall, by M without damping.
    first_value: jax.Array  # f for the run's own λ.
    tries: jax.Array
    going: jax.Array
    solution: Solution | None  # That of the best λ, where it is costly to solve again.


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
    walk = jax.lax.while_loop(lambda walk: walk.going & (walk.slot >= 0), look, start)
    step = _at(kept.iterates, walk.chosen)
    return Choice(step, kept.iterations[walk.chosen], walk.value, walk.last_value)


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
