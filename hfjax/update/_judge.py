"""Judging a step: which one of a run, how far along it, accepted or not, and ρ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.types import Number, NumberOrSchedule, Tree
from hfjax.globalization.backtracking import Backtracking, Before, Chosen
from hfjax.globalization.linesearch import LineSearch, StepSize
from hfjax.globalization.rule import ReductionRatio, Verdict
from hfjax.objectives.plain import subsample
from hfjax.solvers.descent import Reason, Run
from hfjax.update._bookkeeping import no_info
from hfjax.update.state import HessianFreeInfo, Rejection
from hfjax.update.system import Assembled

_PART = 0.1
"""If damping makes up less than this fraction of |M|, it had no part in the step; it makes
up all of |M| where λ is all that matters (heuristic)."""


class Trial(NamedTuple):
    """A step on trial, and what is known of it.

    Attributes:
      at: where it starts.
      run: that it came from.
      before: f(θ), and its noise.
      chosen: the step, and f at its end.
      gradient_norm: ‖∇f‖.
      slope: ∇fᵀδ.
      search: how far it is gone.
    """

    at: Assembled
    run: Run
    before: Before
    chosen: Chosen
    gradient_norm: jax.Array
    slope: jax.Array
    search: StepSize


class Judged(NamedTuple):
    """What came of a step.

    Attributes:
      rejection: a `Rejection`.
      predicted: M(δ), which ρ divides by.
      verdict: what the damping rule is told.
    """

    rejection: jax.Array
    predicted: jax.Array
    verdict: Verdict


def choose(
    rule: Backtracking, at: Assembled, run: Run, before: Before, ratio: ReductionRatio
) -> Chosen:
    """Choose a step of the run, on the evaluation data or on a part of them.

    Then f is that on all of them: of the chosen step and, if ρ is to judge that one, of
    the last.
    """
    data, objective = at.point.eval_batch, at.point.objective
    evaluate = at.value_on(data)
    some = data if rule.cases is None else subsample(objective, data, rule.cases)
    if some is data:
        return rule.choose(run, evaluate, before)
    # Candidates are compared with f(θ), too: on the same cases.
    part = before._replace(value=at.point.value(some))
    chosen = rule.choose(run, at.value_on(some), part)
    value = trees.finite_or_inf(evaluate(chosen.step.at()))
    if ratio.step != "last":
        return chosen._replace(value=value)
    last = trees.finite_or_inf(evaluate(run.last.at()))
    return chosen._replace(value=value, last_value=last)


def go_along(
    line_search: LineSearch,
    rate: NumberOrSchedule,
    at: Assembled,
    run: Run,
    before: Before,
    chosen: Chosen,
) -> Trial:
    """Search along the chosen step's path, from the learning rate down."""
    slope = slope_along(at.system.b, chosen.step.direction)
    # Backtracking has evaluated α = 1 already.
    known = options.is_plain_number(rate) and rate == 1
    found = line_search.search(
        lambda alpha: at.system.value(chosen.step.at(alpha)),
        before.value,
        slope,
        options.read(rate, at.point.count).astype(before.value.dtype),
        chosen.value if known else None,
    )
    norm = trees.norm(at.system.b)
    return Trial(at, run, before, chosen, norm, slope, found)


def slope_along(b: Tree, step: Tree) -> jax.Array:
    """Return −bᵀδ, with its sign even where it is smaller or larger than any float."""
    (b, b_size), (step, step_size) = trees.normalised(b), trees.normalised(step)
    slope = -trees.dot(b, step)
    limits = jnp.finfo(slope.dtype)
    length = jnp.abs(slope) * (b_size * step_size)
    return jnp.sign(slope) * jnp.clip(length, limits.tiny, limits.max)


def judge(trial: Trial, ratio: ReductionRatio) -> Judged:
    """Accept the step or reject it, and compare the change of f with M's."""
    at, run, before, chosen, *_ = trial
    rejection = _rejection(trial)
    part = at.penalty(chosen.step.direction)
    change, predicted = _reduction(trial, ratio, part)
    rho, seen = _ratio_of(rejection, change, predicted, before.noise, ratio.expected)
    on_boundary = run.stats.reason == Reason.BOUNDARY
    on_boundary &= chosen.step.iteration == run.stats.num_iterations
    # Where λ is all that matters, ‖δ‖² may be too small to be a float.
    shortest = 8 * jnp.sqrt(jnp.finfo(part.dtype).tiny)
    vanished = (part == 0) & (trees.magnitude(chosen.step.direction) <= shortest)
    limits = part >= _PART * jnp.abs(chosen.step.model)
    verdict = Verdict(
        ratio=rho,
        accepted=rejection == Rejection.NONE,
        seen=seen,
        has_part=on_boundary | vanished | limits,
        on_boundary=on_boundary,
    )
    return Judged(rejection, predicted, verdict)


def _rejection(trial: Trial) -> jax.Array:
    """Return why to reject, or NONE: of several reasons the deepest."""
    _, run, before, chosen, gradient_norm, slope, search = trial
    finite = jnp.isfinite
    reason = jnp.where(search.success, Rejection.NONE, Rejection.NO_DECREASE)
    seen = finite(before.value) & (finite(chosen.value) | search.success)
    reason = jnp.where(seen, reason, Rejection.NONFINITE_VALUE)
    reason = jnp.where(slope < 0, reason, Rejection.NO_DESCENT)
    broken = run.stats.reason == Reason.NONFINITE
    reason = jnp.where(broken, Rejection.NONFINITE_PRODUCT, reason)
    reason = jnp.where(gradient_norm == 0, Rejection.ZERO_GRADIENT, reason)
    reason = jnp.where(finite(gradient_norm), reason, Rejection.NONFINITE_GRADIENT)
    return reason.astype(jnp.int32)


def _reduction(
    trial: Trial, ratio: ReductionRatio, part: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the change of f and M(δ), of the step and data that ρ is to judge.

    `part` is what damping adds to M of the chosen step.
    """
    at, run, before, chosen, _, slope, search = trial
    is_last = ratio.step == "last"
    step = run.last if is_last else chosen.step
    alpha, value = jnp.ones_like(before.value), before.value
    after = chosen.last_value if is_last else chosen.value
    predicted = step.model
    if ratio.model == "undamped":
        # It may cost a product.
        predicted -= at.penalty(step.direction) if is_last else part
    if ratio.step == "taken":
        # M(αδ) = α ∇fᵀδ + ½α² δᵀBδ, and ½δᵀBδ = M(δ) − ∇fᵀδ.
        alpha = search.step_size
        predicted = alpha * slope + alpha**2 * (predicted - slope)
        after = search.value
    if ratio.data == "batch" and at.point.eval_batch is not at.point.batch:
        on_batch = at.system.batch_value
        value = on_batch(sharding.zeros_like(step.direction))
        after = on_batch(step.at(alpha))
    return after - value, predicted


def _ratio_of(
    rejection: jax.Array,
    change: jax.Array,
    predicted: jax.Array,
    noise: jax.Array,
    expected: Number,
) -> tuple[jax.Array, jax.Array]:
    """Return ρ, relative to the share of M that is expected; −∞ for a rejected step.

    If the predicted change is below the rounding error of f, ρ is taken to be 1, whether
    the step was accepted or not: λ, raised for it, would only make the next step smaller,
    and λ kept would make the next update the same as this one, for ever. Whether f can
    show the step is returned too.
    """
    unseen = (jnp.abs(predicted) <= noise) & (change <= noise)
    judged = rejection == Rejection.NONE
    unseen &= judged | (rejection == Rejection.NO_DECREASE)
    ratio = jnp.where(judged, measured_ratio(change, predicted, noise), -jnp.inf)
    return jnp.where(unseen, 1, ratio / options.like(expected, ratio)), ~unseen


def measured_ratio(
    change: jax.Array, predicted: jax.Array, noise: jax.Array
) -> jax.Array:
    """Compute ρ = change / predicted, guarded where both are below the noise of f.

    A step so small that f cannot show its gain would read as a bad one, and λ, once
    too high, would rise for ever. So η, the noise, of decrease is added to both, and ρ
    tends to 1 for such steps (Conn, Gould & Toint 2000, section 17.4.2). Changes much
    larger than η are not affected.

    Args:
      change: f(θ + δ) − f(θ).
      predicted: M(δ).
      noise: η, how much of `change` may be rounding.

    Returns:
      ρ, or −∞ if anything is not finite.
    """
    denominator = predicted - noise
    ratio = (change - noise) / jnp.where(denominator == 0, 1, denominator)
    sound = jnp.isfinite(change) & jnp.isfinite(predicted) & (denominator != 0)
    return jnp.where(sound, ratio, -jnp.inf)


def report(trial: Trial, judged: Judged) -> HessianFreeInfo:
    """Say what the update did, in finite numbers."""
    at, run, before, chosen, gradient_norm, _, search = trial
    accepted, value = jnp.asarray(judged.verdict.accepted), before.value
    step_size = jnp.where(accepted, search.step_size, 0)
    info = HessianFreeInfo(
        value_before=_finite_or(0, value),
        value_after=_finite_or(0, jnp.where(accepted, search.value, value)),
        reduction_ratio=_finite_or(-1e9, judged.verdict.ratio),
        predicted_change=_finite_or(0, judged.predicted),
        cg_iterations=run.stats.num_iterations,
        cg_reason=run.stats.reason,
        chosen_iteration=chosen.step.iteration,
        step_size=step_size,
        accepted=accepted,
        rejection=judged.rejection,
        gradient_norm=_finite_or(0, gradient_norm),
        update_norm=jnp.where(accepted, chosen.step.length(step_size), 0),
    )
    return trees.cast_like(info, no_info(at.point.scalar.dtype))


def _finite_or(sentinel: float, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, sentinel)
