"""A step on trial: accepted or rejected, how well M predicted it, what to tell."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _sharding, _tree
from hfjax._path import along, end
from hfjax._system import Point
from hfjax._types import Number, NumberOrSchedule, Tree, ValueFn
from hfjax.backtracking import Backtracking, Choice, Run, finite_or_inf
from hfjax.cg import CGResult, Reason, Subproblem
from hfjax.damping import Damping, ReductionRatio, measured_ratio, rounding_noise
from hfjax.linesearch import LineSearch, StepSize
from hfjax.state import HessianFreeInfo, Rejection, no_info

_PART = 0.1
"""Of |M| that damping must make up to have a part in the step; it is as much as |M| where
λ is all that matters (heuristic)."""


class Trial(NamedTuple):
    """A step on trial, and what is known of it."""

    gradient_norm: jax.Array
    result: CGResult
    value: jax.Array  # f(θ) on the evaluation data.
    choice: Choice
    slope: jax.Array  # ∇fᵀδ
    search: StepSize


def choose(
    backtracking: Backtracking,
    point: Point,
    subproblem: Subproblem,
    result: CGResult,
    value: jax.Array,
    noise: jax.Array,
    *,
    judges_last: bool,
) -> Choice:
    """Choose a step of the run, on the evaluation data or on a part of them.

    Then f is that on all of them: at the chosen step and, if ρ is to judge that one, at
    the last.
    """
    data, cases = point.eval_batch, backtracking.cases
    some = data if cases is None else point.objective.thinned(data, cases)
    value_fn = point.value_on(data)

    def on(seen: ValueFn, before: jax.Array) -> Choice:
        if not backtracking.finds_damping:
            # A solver that corrects its step has kept nothing else.
            correction = result.correction

            def reached(step: Tree) -> jax.Array:
                return seen(end(step, correction))

            choice = backtracking.choose(reached, result.kept)
            return choice._replace(correction=correction)
        models, b = result.model_values, subproblem.b
        run = Run(models, b, before, noise, point.damping, result.other, result.pulled)
        return backtracking.choose(seen, result.kept, run)

    if some is data:
        return on(value_fn, value)
    # Candidates are compared with f(θ), too: on the same cases.
    before = point.value(some) if backtracking.finds_damping else value
    choice = on(point.value_on(some), before)
    reached = end(choice.step, choice.correction)
    choice = choice._replace(value=finite_or_inf(value_fn(reached)))
    if not judges_last:
        return choice
    of_last = value_fn(end(result.x, result.correction))
    return choice._replace(last_value=finite_or_inf(of_last))


def go_along(
    line_search: LineSearch,
    rate: NumberOrSchedule,
    point: Point,
    value: jax.Array,
    choice: Choice,
    slope: jax.Array,
) -> StepSize:
    """Search along the chosen step's path, from the learning rate down."""
    value_fn = point.value_on(point.eval_batch)
    # Backtracking has evaluated α = 1 already.
    known = _options.is_plain_number(rate) and rate == 1
    return line_search.search(
        lambda alpha: value_fn(along(alpha, choice.step, choice.correction)),
        value,
        slope,
        _options.read(rate, point.count).astype(value.dtype),
        choice.value if known else None,
    )


def slope_along(b: Tree, step: Tree) -> jax.Array:
    """Return −bᵀδ, with its sign even where it is smaller or larger than any float."""
    (b, b_size), (step, step_size) = _tree.normalised(b), _tree.normalised(step)
    slope = -_tree.dot(b, step)
    limits = jnp.finfo(slope.dtype)
    length = jnp.abs(slope) * (b_size * step_size)
    return jnp.sign(slope) * jnp.clip(length, limits.tiny, limits.max)


def judge(trial: Trial) -> jax.Array:
    """Return why to reject, or NONE: of several reasons the deepest."""
    gradient_norm, result, value, choice, slope, search = trial
    finite = jnp.isfinite
    reason = jnp.where(search.success, Rejection.NONE, Rejection.NO_DECREASE)
    seen = finite(value) & (finite(choice.value) | search.success)
    reason = jnp.where(seen, reason, Rejection.NONFINITE_VALUE)
    reason = jnp.where(slope < 0, reason, Rejection.NO_DESCENT)
    broken = result.reason == Reason.NONFINITE
    reason = jnp.where(broken, Rejection.NONFINITE_PRODUCT, reason)
    reason = jnp.where(gradient_norm == 0, Rejection.ZERO_GRADIENT, reason)
    reason = jnp.where(finite(gradient_norm), reason, Rejection.NONFINITE_GRADIENT)
    return reason.astype(jnp.int32)


def reduction(
    trial: Trial,
    ratio: ReductionRatio,
    penalty: ValueFn,
    part: jax.Array,
    value_on_batch: ValueFn | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the change of f and M(δ), of the step and data that ρ is to judge.

    `penalty` is δ ↦ ½ δᵀ(A − B)δ, what damping adds to M, and `part` that of the chosen
    step; `value_on_batch` is f on the curvature data, `None` where the evaluation data
    are the same.
    """
    _, result, value, choice, slope, search = trial
    is_last = ratio.step == "last"
    step, alpha = result.x if is_last else choice.step, jnp.ones_like(value)
    correction = result.correction if is_last else choice.correction
    after = choice.last_value if is_last else choice.value
    index = result.num_iterations if is_last else choice.iteration
    predicted = result.model_values[index]
    if choice.model is not None and not is_last:
        predicted = choice.model
    if ratio.model == "undamped":
        # It may cost a product.
        predicted -= penalty(step) if is_last else part
    if ratio.step == "taken":
        # M(αδ) = α ∇fᵀδ + ½α² δᵀBδ, and ½δᵀBδ = M(δ) − ∇fᵀδ.
        alpha = search.step_size
        predicted = alpha * slope + alpha**2 * (predicted - slope)
        after = search.value
    if value_on_batch is not None and ratio.data == "batch":
        value = value_on_batch(_sharding.zeros_like(step))
        after = value_on_batch(along(alpha, step, correction))
    return after - value, predicted


def noise_of(value: jax.Array, b: Tree, params: Tree) -> jax.Array:
    """Return how much of f(θ + δ) − f(θ) may be rounding: of f, and of θ + δ.

    The entries of θ + δ are rounded independently, each by ε θᵢ / 2 at most: f moves by
    ε ‖∇f ∘ θ‖ in 3.5 standard deviations. Where f is the square of a difference, this
    is far more than the rounding of f itself.
    """
    b, b_size = _tree.normalised(b)
    scaled, size = _tree.normalised(_tree.widen(params))

    def rounded(b: jax.Array, scaled: jax.Array, x: jax.Array) -> jax.Array:
        return float(jnp.finfo(x.dtype).eps) * b * scaled.astype(b.dtype)

    moved = jax.tree.map(rounded, b, scaled, params)
    of_params = jnp.sqrt(_tree.dot(moved, moved)) * (b_size * size)
    # Beyond the floats it counts for nothing: f is there, too.
    return rounding_noise(value) + jnp.where(jnp.isfinite(of_params), of_params, 0)


def ratio_of(
    rejection: jax.Array,
    change: jax.Array,
    predicted: jax.Array,
    noise: jax.Array,
    expected: Number,
) -> tuple[jax.Array, jax.Array]:
    """Return ρ, relative to the share of M that is expected; −∞ for a rejected step.

    But a step too small to be seen in f, taken or not, is no evidence against the
    model, ρ = 1: λ, raised for it, would only make the next one smaller, and λ kept
    would make the next update the same as this one, for ever. Whether it can be seen is
    returned too.
    """
    unseen = (jnp.abs(predicted) <= noise) & (change <= noise)
    judged = rejection == Rejection.NONE
    unseen &= judged | (rejection == Rejection.NO_DECREASE)
    ratio = jnp.where(judged, measured_ratio(change, predicted, noise), -jnp.inf)
    return jnp.where(unseen, 1, ratio / _options.like(expected, ratio)), ~unseen


def adapt(
    rule: Damping,
    damping: jax.Array,
    trial: Trial,
    ratio: jax.Array,
    seen: jax.Array,
    part: jax.Array,
    accepted: jax.Array,
) -> jax.Array:
    """Return λ, or the radius, for the next update.

    It stays where f shows nothing of a step that it has no part in either: at a minimum
    λ would fall for ever, and be no use to the next data. `part` is what damping adds to
    M of the chosen step.
    """
    _, result, _, choice, _, _ = trial
    on_boundary = result.reason == Reason.BOUNDARY
    on_boundary &= choice.iteration == result.num_iterations
    model = choice.model
    # Where each λ is solved for, the run's own is not, unless somebody asks for its M.
    if model is None or result.other is None:
        model = result.model_values[choice.iteration]
    model = jnp.abs(model)
    # Where λ is all that matters, ‖δ‖² may be too small to be a float.
    shortest = 8 * jnp.sqrt(jnp.finfo(part.dtype).tiny)
    vanished = (part == 0) & (_tree.magnitude(choice.step) <= shortest)
    has_part = on_boundary | vanished | (part >= _PART * model)
    adapted = rule.update(damping, ratio, on_boundary)
    adapted = jnp.where(seen | has_part, adapted, damping)
    if choice.damping is None:
        return adapted
    assert rule.limit is not None, "checked by `fitting`"
    found = rule.limit(choice.damping, damping)
    # M may have vanished, and a search on it stand still.
    found = jnp.where(seen, found, jnp.minimum(found, adapted))
    return jnp.where(accepted, found, adapted)


def report(
    trial: Trial,
    rejection: jax.Array,
    ratio: jax.Array,
    predicted: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> HessianFreeInfo:
    gradient_norm, result, value, choice, _, search = trial
    accepted = rejection == Rejection.NONE
    step_size = jnp.where(accepted, search.step_size, 0)
    taken = along(step_size, choice.step, choice.correction)
    info = HessianFreeInfo(
        value_before=_finite_or(0, value),
        value_after=_finite_or(0, jnp.where(accepted, search.value, value)),
        reduction_ratio=_finite_or(-1e9, ratio),
        predicted_change=_finite_or(0, predicted),
        cg_iterations=result.num_iterations,
        cg_reason=result.reason,
        chosen_iteration=choice.iteration,
        step_size=step_size,
        accepted=accepted,
        rejection=rejection,
        gradient_norm=_finite_or(0, gradient_norm),
        update_norm=jnp.where(accepted, _tree.norm(taken), 0),
    )
    return _tree.cast_like(info, no_info(dtype))


def _finite_or(sentinel: float, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, sentinel)
