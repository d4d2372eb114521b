"""The search for λ of `hfjax.damping.searched`: compare the steps for several λ by f.

The steps are those for λ · factor^p, with p = 0, then 1, 2, … as long as f at their end
gets lower, or else −1, −2, …. The last step that was better is taken, by these rules:

| candidate | f there | taken |
|---|---|---|
| p = 0 | any | yes |
| higher λ | at most `tolerance` of the gain above the lowest | yes, as λ makes no difference |
| higher λ, momentum | lower by `tolerance` of the gain | yes: λ → ∞ repeats the last step |
| lower λ | lower by `tolerance` of the gain, and by more than rounding | yes |
| lower λ | all changes below rounding, but M falls by 1.1 times as much | yes |
| lower λ, by `sacrifice` | above the lowest by at most this share of the gain, M falling on | yes |
| higher λ, by `sacrifice` | lower by this share of the gain | yes |
| any | lower by more than 10 times what M predicts | as if f had not changed |
| higher λ | any, if the best step so far breaks M's promise | yes |
| lower λ | any, if the step breaks M's promise | no |
| p = 1 | not taken | no, and p = −1 is next |
| any other | | no, and the search ends |

`sacrifice` replaces the rules above it where it holds: not with momentum, nor while B is of
other cases than f, nor where the gain may be rounding. A step breaks M's promise if `lower`
is given and f falls by less than this share of it.

With `longest`, a step is *good* if f falls by at least this share of M's promise, and f is not
compared otherwise. From a good step for p = 0, p = −1, −2, … are tried, and the last good one
is taken; else p = 1, 2, … until one is good.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.types import Number, ValueFn
from hfjax.globalization.backtracking import Backtracking, Before, Chosen
from hfjax.solvers.descent import Run, Step

_CREDIBLE = 10.0
"""f may fall by at most this many times what M predicts."""

_LONGEST = 0.5
"""`longest` for steps that are solved exactly (`benchmarks/results/equations.md`)."""

_MORE = 1.1
"""Where f shows nothing, lower λ if M then falls by this many times as much."""

_FURTHER = 1.01
"""A step is longer, and may cost some of the gain, if M falls by this many times as much."""


def search_damping(
    factor: Number,
    tolerance: Number,
    lower: Number | None,
    longest: Number | str | None,
    sacrifice: Number,
    max_tries: int,
    cases: int | None,
) -> Backtracking:
    """Build the rule; the options are those of `hfjax.damping.searched`."""

    def choose(run: Run, evaluate: ValueFn, before: Before) -> Chosen:
        at_damping = run.at_damping
        assert at_damping is not None, "other runs get another rule"
        dtype = before.value.dtype
        anchored = run.anchor is not None
        exact = run.iterates is None and lower is None
        by_default = _LONGEST if exact else None
        share = by_default if isinstance(longest, str) else longest
        wants = _Wants(tolerance, lower, 0.0 if anchored else sacrifice, anchored)

        def damping_at(power: jax.Array) -> jax.Array:
            return before.scalar * jnp.asarray(factor, dtype) ** power

        def look(search: _Search) -> _Search:
            step = at_damping(damping_at(search.trial))
            value = trees.finite_or_inf(evaluate(step.at())).astype(dtype)
            assert step.undamped is not None, "known for the steps of `at_damping`"
            candidate = _Candidate(value, -step.undamped.astype(dtype), step)
            if share is not None:
                return _next_longest(search, candidate, before, share)
            return _next(search, candidate, before, wants)

        # Placeholders: the first candidate, p = 0, is always taken.
        zero, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        nothing = sharding.zeros_like(run.last)
        nothing = nothing._replace(undamped=sharding.zeros_like(run.last.model))
        start = _Search(
            trial=zero,
            power=zero,
            best=_Candidate(infinite, zero, nothing),
            lowest=infinite,
            first_value=infinite,
            tries=jnp.zeros((), jnp.int32),
            going=jnp.ones((), bool),
        )
        search = jax.lax.while_loop(
            lambda search: search.going & (search.tries < max_tries), look, start
        )
        best, damping = search.best, damping_at(search.power)
        return Chosen(best.step, best.value, search.first_value, damping)

    return Backtracking(choose, cases)


class _Wants(NamedTuple):
    tolerance: Number
    lower: Number | None
    sacrifice: Number
    anchored: bool  # with momentum


class _Candidate(NamedTuple):
    value: jax.Array  # f at the end of the step
    promised: jax.Array  # how much f should fall, by M without damping
    step: Step


class _Search(NamedTuple):
    trial: jax.Array  # the power of `factor` to try next
    power: jax.Array  # that of the best λ so far
    best: _Candidate
    lowest: jax.Array  # the lowest credible f of the steps taken so far
    first_value: jax.Array  # f for the λ of the run
    tries: jax.Array
    going: jax.Array


def _next(
    search: _Search, candidate: _Candidate, before: Before, wants: _Wants
) -> _Search:
    """Compare a candidate with the best so far, and say which λ to try next."""
    first, up = search.tries == 0, search.trial > search.power
    fall = before.value - candidate.value
    # Ignore decreases far larger than M predicts: they are rounding errors in f, and would
    # lead λ anywhere.
    credible = ~(fall > _CREDIBLE * candidate.promised)
    value = jnp.where(credible, candidate.value, before.value)
    gain, lower = before.value - search.lowest, wants.lower
    slack = _slack(gain, before.noise, wants.tolerance)

    # Break ties towards larger λ, unless the difference is only rounding. With momentum,
    # λ → ∞ repeats the last step, so keep the current λ.
    as_good = value <= search.lowest + (-jnp.abs(slack) if wants.anchored else slack)
    clearly_better = value < search.lowest - jnp.maximum(jnp.abs(slack), before.noise)
    # Longer steps may lead further in a run, if they follow f and not the noise of a part
    # of its cases.
    given_up = options.like(wants.sacrifice, gain) * jnp.maximum(gain, 0)
    gives_up = (given_up > 0) & (gain > before.noise) & jnp.logical_not(before.partial)
    as_good = jnp.where(gives_up, value <= search.lowest - given_up, as_good)
    is_longer = candidate.promised > _FURTHER * search.best.promised
    affordable = is_longer & (value <= search.lowest + given_up)
    clearly_better = jnp.where(gives_up, affordable, clearly_better)
    # A best step that is too small for f to show is no evidence against a longer one.
    invisible = search.best.promised <= before.noise
    invisible &= value <= before.value + before.noise
    goes_further = candidate.promised > _MORE * search.best.promised
    below = clearly_better | (invisible & goes_further)
    lowest = search.lowest
    if lower is not None:
        forced = _breaks_promise(search.best, before, lower)
        as_good, lowest = as_good | forced, jnp.where(forced, jnp.inf, lowest)
        below &= ~_breaks_promise(candidate, before, lower)
    better = first | jnp.where(up, as_good, below)
    # Only the first higher λ can turn the search round; later failures end it.
    turns = up & ~better & (search.power == 0)

    power = jnp.where(better, search.trial, search.power)
    direction = jnp.where((first | up) & ~turns, 1, -1).astype(power.dtype)
    return _Search(
        trial=power + direction,
        power=power,
        best=trees.select(better, candidate, search.best),
        lowest=jnp.where(better, jnp.minimum(value, lowest), search.lowest),
        first_value=jnp.where(first, candidate.value, search.first_value),
        tries=search.tries + 1,
        going=better | turns,
    )


def _breaks_promise(candidate: _Candidate, before: Before, lower: Number) -> jax.Array:
    """Return whether f falls by less than `lower` of what M predicts, as far as f shows."""
    promised, fall = candidate.promised, before.value - candidate.value
    enough = fall >= options.like(lower, promised) * promised
    return (promised > before.noise) & ~enough


def _next_longest(
    search: _Search, candidate: _Candidate, before: Before, share: Number
) -> _Search:
    """Judge a candidate by itself, and say which λ to try next."""
    first, promised = search.tries == 0, candidate.promised
    fall = before.value - candidate.value
    predicted = (fall >= options.like(share, fall) * promised) & (promised > 0)
    # Changes that f cannot show are good as long as steps get longer.
    longer = first | (promised > _MORE * search.best.promised)
    unseen = longer & (fall >= -before.noise)
    good = jnp.where(promised > before.noise, predicted, unseen)
    good &= ~(fall > _CREDIBLE * jnp.maximum(promised, before.noise))
    down = jnp.where(first, good, search.trial < 0)
    # If none is good, the best will do: the line search and the verdict on it follow.
    as_low = candidate.value < search.best.value
    better = first | good | (~down & as_low)
    return _Search(
        trial=search.trial + jnp.where(down, -1, 1).astype(search.trial.dtype),
        power=jnp.where(better, search.trial, search.power),
        best=trees.select(better, candidate, search.best),
        lowest=search.lowest,
        first_value=jnp.where(first, candidate.value, search.first_value),
        tries=search.tries + 1,
        going=good == down,
    )


def _slack(gain: jax.Array, noise: jax.Array, tolerance: Number) -> jax.Array:
    """Return by how much f may be higher at a higher λ; negative if f is only noise."""
    # If the gain is only noise, ties must not go to the higher λ, or it would drift up.
    share = options.like(tolerance, gain)
    slack = jnp.where(gain > noise, share * gain, -noise)
    return jnp.where(jnp.isfinite(slack), slack, 0)
