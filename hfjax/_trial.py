"""A step on trial: accepted or rejected, how well M predicted it, what to tell."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _tree
from hfjax._types import Number, Tree, ValueFn
from hfjax.backtracking import Choice
from hfjax.cg import CGResult, Reason
from hfjax.damping import ReductionRatio, measured_ratio, rounding_noise
from hfjax.linesearch import StepSize
from hfjax.state import HessianFreeInfo, Rejection, no_info


class Trial(NamedTuple):
    """A step on trial, and what is known of it."""

    gradient_norm: jax.Array
    result: CGResult
    value: jax.Array  # f(θ) on the evaluation data.
    choice: Choice
    slope: jax.Array  # ∇fᵀδ
    search: StepSize


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
    value_on_batch: ValueFn | None,
) -> tuple[jax.Array, jax.Array]:
    """Return the change of f and M(δ), of the step and data that ρ is to judge.

    `penalty` is δ ↦ ½ δᵀ(A − B)δ, what damping adds to M; `value_on_batch` is f on the
    curvature data, `None` where the evaluation data are the same.
    """
    _, result, value, choice, slope, search = trial
    is_last = ratio.step == "last"
    step = result.x if is_last else choice.step
    after = choice.last_value if is_last else choice.value
    index = result.num_iterations if is_last else choice.iteration
    predicted = result.model_values[index]
    if ratio.model == "undamped":
        predicted -= penalty(step)
    if ratio.step == "taken":
        # M(αδ) = α ∇fᵀδ + ½α² δᵀBδ, and ½δᵀBδ = M(δ) − ∇fᵀδ.
        alpha = search.step_size
        predicted = alpha * slope + alpha**2 * (predicted - slope)
        step, after = _tree.scale(alpha, step), search.value
    if value_on_batch is not None and ratio.data == "batch":
        value = value_on_batch(jax.tree.map(jnp.zeros_like, step))
        after = value_on_batch(step)
    return after - value, predicted


def ratio_of(
    rejection: jax.Array,
    change: jax.Array,
    predicted: jax.Array,
    value: jax.Array,
    expected: Number,
) -> jax.Array:
    """Return ρ, relative to the share of M that is expected; −∞ for a rejected step.

    But a step that is rejected as it is too small to be seen in f is no evidence against
    the model: λ, raised for it, would only make the next one smaller.
    """
    visible = ~(jnp.abs(predicted) <= rounding_noise(value))
    ratio = measured_ratio(change, predicted, value) / expected
    counts = rejection == Rejection.NONE
    counts |= (rejection == Rejection.NO_DECREASE) & ~visible
    return jnp.where(counts, ratio, -jnp.inf)


def report(
    trial: Trial,
    rejection: jax.Array,
    ratio: jax.Array,
    predicted: jax.Array,
    step: Tree,
    dtype: jax.typing.DTypeLike,
) -> HessianFreeInfo:
    gradient_norm, result, value, choice, _, search = trial
    accepted = rejection == Rejection.NONE
    info = HessianFreeInfo(
        value_before=_finite_or(0, value),
        value_after=_finite_or(0, jnp.where(accepted, search.value, value)),
        reduction_ratio=_finite_or(-1e9, ratio),
        predicted_change=_finite_or(0, predicted),
        cg_iterations=result.num_iterations,
        cg_reason=result.reason,
        chosen_iteration=choice.iteration,
        step_size=jnp.where(accepted, search.step_size, 0),
        accepted=accepted,
        rejection=rejection,
        gradient_norm=_finite_or(0, gradient_norm),
        update_norm=_tree.norm(step),
    )
    return _tree.cast_like(info, no_info(dtype))


def _finite_or(sentinel: float, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, sentinel)
