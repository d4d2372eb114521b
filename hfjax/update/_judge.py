"""Choose a step and its length, accept or reject it, and compute ρ."""

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

# If λ is all that matters, A = λI and M(δ) = −½λ‖δ‖²: damping is all of |M|.
_PART = 0.1
"""Fraction of |M| below which damping is considered irrelevant to the step."""


class Trial(NamedTuple):
    """A step to be judged.

    Attributes:
      at: the system that it was computed from.
      run: the run of the solver.
      before: f(θ) and its rounding error.
      chosen: the step, and f at its end.
      gradient_norm: ‖∇f‖.
      slope: ∇fᵀδ.
      search: the result of the line search.
    """

    at: Assembled
    run: Run
    before: Before
    chosen: Chosen
    gradient_norm: jax.Array
    slope: jax.Array
    search: StepSize


class Judged(NamedTuple):
    """The judgement on a step.

    Attributes:
      rejection: a `Rejection`.
      curved: δᵀBδ, on the examples of the curvature.
      predicted: M(δ), the denominator of ρ.
      verdict: what the damping rule adapts λ by.
    """

    rejection: jax.Array
    curved: jax.Array
    predicted: jax.Array
    verdict: Verdict


def choose(
    rule: Backtracking, at: Assembled, run: Run, before: Before, ratio: ReductionRatio
) -> tuple[Chosen, bool]:
    """Choose a step of the run by f on the evaluation data, or on a subset of them.

    Also return whether its `value` is f on all of the data. `last_value` is if ρ is of the
    last step.
    """
    data, objective = at.point.eval_batch, at.point.objective
    evaluate = at.system.value
    cases = at.drawn.compared(rule.cases)
    some = data if cases is None else subsample(objective, data, cases)
    if cases is None or some is data:
        return rule.choose(run, evaluate, before), True
    # The rule compares candidates with f(θ), so that must be on the same subset.
    part = before._replace(value=at.point.value_on_part(some, cases))
    chosen = rule.choose(run, at.value_on(some), part)
    if ratio.step == "last":
        last = trees.finite_or_inf(evaluate(run.last.at()))
        chosen = chosen._replace(last_value=last)
    return chosen, False


def go_along(
    line_search: LineSearch,
    rate: NumberOrSchedule,
    at: Assembled,
    run: Run,
    before: Before,
    chosen: Chosen,
    *,
    known: bool,
) -> Trial:
    """Search along the chosen step's path, starting with α = learning rate.

    `known` says whether its `value` is f on all of the data.
    """
    slope = slope_along(at.system.b, chosen.step.direction)
    # Whether the rate is 1 must be known while tracing, so a schedule or a tracer costs one
    # more evaluation.
    is_one = options.is_plain_number(rate) and rate == 1
    found = line_search.search(
        lambda alpha: at.system.value(chosen.step.at(alpha)),
        before.value,
        slope,
        options.read(rate, at.point.count).astype(before.value.dtype),
        chosen.value if known and is_one else None,
    )
    if not known:
        value = found.first_value
        if value is None or not is_one:
            value = trees.finite_or_inf(at.system.value(chosen.step.at()))
        chosen = chosen._replace(value=value)
    norm = trees.norm(at.system.b)
    return Trial(at, run, before, chosen, norm, slope, found)


def slope_along(b: Tree, step: Tree) -> jax.Array:
    """Return −bᵀδ, with the correct sign even if it overflows or underflows."""
    # The sign decides whether the step is rejected, so 0 and NaN must not replace it.
    (b, b_size), (step, step_size) = trees.normalised(b), trees.normalised(step)
    slope = -trees.dot(b, step)
    limits = jnp.finfo(slope.dtype)
    length = jnp.abs(slope) * (b_size * step_size)
    return jnp.sign(slope) * jnp.clip(length, limits.tiny, limits.max)


def judge(trial: Trial, ratio: ReductionRatio) -> Judged:
    """Accept or reject the step, and compare the change of f with that of M."""
    at, run, before, chosen, *_ = trial
    rejection = _rejection(trial)
    part = at.penalty(chosen.step.direction)
    change, predicted = _reduction(trial, ratio, part)
    rho, seen = _ratio_of(rejection, change, predicted, before.noise, ratio.expected)
    on_boundary = run.stats.reason == Reason.BOUNDARY
    on_boundary &= chosen.step.iteration == run.stats.num_iterations
    # If λ is so large that only it matters, ½λ‖δ‖² may underflow to 0 = `part`. Damping
    # determined the step all the same.
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
    # M(δ) = ∇fᵀδ + ½ δᵀBδ + `part`
    curved = 2 * (chosen.step.model - part - trial.slope)
    return Judged(rejection, curved, predicted, verdict)


def _rejection(trial: Trial) -> jax.Array:
    """Return why to reject the step, or `NONE`."""
    # Later lines overwrite earlier ones: of several reasons, the most basic one wins.
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
    """Return the change of f and M(δ), for the step, model and data that `ratio` names.

    `part` is the contribution of damping to M for the chosen step.
    """
    at, run, before, chosen, _, slope, search = trial
    is_last = ratio.step == "last"
    step = run.last if is_last else chosen.step
    alpha, value = jnp.ones_like(before.value), before.value
    after = chosen.last_value if is_last else chosen.value
    predicted = step.model
    if ratio.model == "undamped":
        # The penalty of another step than the chosen one may cost a product with D.
        predicted -= at.penalty(step.direction) if is_last else part
    if ratio.step == "taken":
        # M(αδ) = α ∇fᵀδ + ½α² δᵀBδ, and ½δᵀBδ = M(δ) − ∇fᵀδ.
        alpha = search.step_size
        predicted = alpha * slope + alpha**2 * (predicted - slope)
        after = search.value
    # On the curvature data neither value is known yet: this evaluates f twice.
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
    """Return ρ / `expected`, or −∞ if rejected, and whether f can resolve the step."""
    # If the predicted change is below the rounding error of f, ρ is taken to be 1, even
    # if the step was rejected. A larger λ would only make the next step smaller, and
    # with the same λ the next update would repeat this one forever.
    unseen = (jnp.abs(predicted) <= noise) & (change <= noise)
    judged = rejection == Rejection.NONE
    unseen &= judged | (rejection == Rejection.NO_DECREASE)
    ratio = jnp.where(judged, measured_ratio(change, predicted, noise), -jnp.inf)
    return jnp.where(unseen, 1, ratio / options.like(expected, ratio)), ~unseen


def measured_ratio(
    change: jax.Array, predicted: jax.Array, noise: jax.Array
) -> jax.Array:
    """Compute ρ = (change − η) / (predicted − η), where η is the rounding error of f.

    Args:
      change: f(θ + δ) − f(θ).
      predicted: M(δ).
      noise: η, how much of `change` may be rounding.

    Returns:
      ρ, or −∞ if anything is not finite.

    References:
      Conn, Gould & Toint (2000), section 17.4.2.
    """
    # Without η, a step that is too small to be seen in f often looks bad, so that λ,
    # once too high, would rise forever. With η, ρ tends to 1 for such steps, and
    # changes that are much larger than η are not affected.
    denominator = predicted - noise
    ratio = (change - noise) / jnp.where(denominator == 0, 1, denominator)
    sound = jnp.isfinite(change) & jnp.isfinite(predicted) & (denominator != 0)
    return jnp.where(sound, ratio, -jnp.inf)


def report(trial: Trial, judged: Judged) -> HessianFreeInfo:
    """Return what the update did, with a finite number in place of NaN and infinity."""
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
