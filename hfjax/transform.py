"""Hessian-free optimisation as an Optax transformation: the report's algorithm 3.

Only this room knows all the others. One update, with `δ` the step, `A = B + λI`:

    B, P        curvature and preconditioner of the batch
    δ₁, δ₂, …   conjugate gradients on A δ = −∇f, from ζ δ_before
    δ           the kept iterate that backtracking on f chooses
    ρ, λ        how well M predicted the change of f; λ for the next update
    α           line search along δ
    θ + α δ     if f has fallen; else θ, λ raised, warm start dropped
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax import _options, _tree
from hfjax._types import NumberOrSchedule, Params, Tree
from hfjax.backtracking import Backtracking, Choice, early_stop, take_last
from hfjax.cg import CGResult, Reason, Solver, conjugate_gradient
from hfjax.curvature import Curvature, ggn
from hfjax.damping import (
    Damping,
    levenberg_marquardt,
    measured_ratio,
    rounding_noise,
    tikhonov,
)
from hfjax.linesearch import LineSearch, StepSize, armijo, take_whole
from hfjax.objective import Objective
from hfjax.preconditioners import PreconditionerRule, diagonal
from hfjax.state import HessianFreeInfo, HessianFreeState, Rejection, no_info


def hessian_free(
    objective: Objective,
    *,
    learning_rate: NumberOrSchedule = 1.0,
    damping: Damping = levenberg_marquardt(),
    solver: Solver = conjugate_gradient(),
    preconditioner: PreconditionerRule | None = diagonal(),
    backtracking: Backtracking | None = early_stop(),
    line_search: LineSearch | None = armijo(),
    curvature: Curvature = ggn,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the Hessian-free optimizer.

    Its `update` minimises M(δ) = ∇fᵀδ + ½δᵀ(B + λI)δ by conjugate gradients and
    returns the step αδ for `optax.apply_updates`, or zeros: an update never raises
    f on the evaluation data, and never brings NaN into parameters or state.

    `update(grads, state, params, batch=…, eval_batch=None)` takes:

    - `grads`: ∇f, of `objective.value_and_grad`, on any batch, often a larger one.
      Neither clipped nor scaled: they must be the gradient of this objective.
    - `batch`: the curvature data, `(inputs, targets)` or `(inputs, targets, weights)`:
      what B, the preconditioner and ρ are taken on. Required.
    - `eval_batch`: on which iterates are chosen and the line search runs; `None` is
      `batch`.

    Other keyword arguments are ignored.

    Args:
      objective: f, with its weight decay.
      learning_rate: the first α that the line search tries; number or schedule (1:
        report, section 8.8).
      damping: rule for λ, of `hfjax.damping`.
      solver: of `hfjax.cg`.
      preconditioner: of `hfjax.preconditioners`; `None` is the identity.
      backtracking: of `hfjax.backtracking`; `None` takes the last iterate.
      line_search: of `hfjax.linesearch`; `None` takes the learning rate, unless f
        rises.
      curvature: `(objective, params, batch) -> (v -> B v)`, of `hfjax.curvature`.
        Under `optax.inject_hyperparams` list it in `static_args`: Optax takes every
        callable for a schedule.
      seed: for a preconditioner that draws random numbers; else not used.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `HessianFreeState`.

    Raises:
      TypeError: if `objective` is no `Objective`; in `update`, if `params` or `batch`
        is missing.
      ValueError: if an option is out of range.

    Example:
      A linear least-squares problem, without damping, is solved in one update:

      >>> import hfjax
      >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
      >>> batch = (x, x @ jnp.array([1.0, -1.0]))
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> solver = hfjax.cg.conjugate_gradient(stopping=None)
      >>> tx = hessian_free(
      ...     objective, damping=hfjax.damping.constant(0.0), solver=solver
      ... )
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> value, grads = objective.value_and_grad(params, batch)
      >>> updates, state = tx.update(grads, state, params, batch=batch)
      >>> print(optax.apply_updates(params, updates).round(3))
      [ 1. -1.]

    References:
      Martens & Sutskever (2012), section 4, algorithm 3; Martens (2010).
    """
    if not isinstance(objective, Objective):
        msg = (
            "`objective` must be an `hfjax.Objective(model_fn, loss)`, got "
            f"{type(objective).__name__}."
        )
        raise TypeError(msg)
    _options.check_range("learning_rate", learning_rate, low=0.0)
    parts = _Parts(
        objective=objective,
        learning_rate=learning_rate,
        damping=damping,
        solver=solver,
        preconditioner=preconditioner,
        backtracking=backtracking or take_last,
        line_search=line_search or take_whole,
        curvature=curvature,
    )

    def init(params: Params) -> Any:
        needs_key = preconditioner is not None and preconditioner.needs_key
        dtype = _tree.scalar_dtype(params)
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=damping.init().astype(dtype),
            direction=optax.tree.zeros_like(_tree.widen(params)),
            key=jax.random.key(seed) if needs_key else None,
            info=no_info(dtype),
        )

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        batch: tuple | None = None,
        eval_batch: tuple | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        del extra_args  # The contract of Optax: what is not needed is ignored.
        if params is None or batch is None:
            missing = "params" if params is None else "batch"
            msg = (
                f"`{missing}` is missing: call `tx.update(grads, state, params, "
                "batch=batch)`. (Flax's `TrainState.apply_gradients` does not hand "
                "`batch` on; call `tx.update` yourself.)"
            )
            raise TypeError(msg)
        return _update(parts, updates, state, params, batch, eval_batch)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_hessian_free(
    objective: Objective,
    *,
    damping: Damping = levenberg_marquardt(),
    solver: Solver = conjugate_gradient(),
    preconditioner: PreconditionerRule | None = diagonal(),
    backtracking: Backtracking | None = early_stop(),
    curvature: Curvature = ggn,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the direction alone, to chain with other transformations.

    Returns −δ, with the sign of a gradient as all of Optax's `scale_by_*`: chain it
    with `optax.scale_by_learning_rate`. No line search and no learning rate; λ
    adapts, and a direction along which f would rise becomes zero, as in
    `hessian_free`, whose options and arguments these are.

    Args:
      objective: f, with its weight decay.
      damping: as in `hessian_free`.
      solver: as in `hessian_free`.
      preconditioner: as in `hessian_free`.
      backtracking: as in `hessian_free`.
      curvature: as in `hessian_free`.
      seed: as in `hessian_free`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `HessianFreeState`.

    Example:
      >>> import hfjax
      >>> objective = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch, params = (jnp.ones((1, 1)), jnp.ones((1, 1))), jnp.zeros(1)
      >>> tx = optax.chain(scale_by_hessian_free(objective), optax.scale(-0.5))
      >>> grads = objective.value_and_grad(params, batch)[1]
      >>> updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
      >>> print(updates)  # −½ · grads / (1 + λ), with λ = 1
      [0.25]
    """
    tx = hessian_free(
        objective,
        damping=damping,
        solver=solver,
        preconditioner=preconditioner,
        backtracking=backtracking,
        line_search=None,
        curvature=curvature,
        seed=seed,
    )

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        steps, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.negative, steps), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


class _Parts(NamedTuple):
    objective: Objective
    learning_rate: NumberOrSchedule
    damping: Damping
    solver: Solver
    preconditioner: PreconditionerRule | None
    backtracking: Backtracking
    line_search: LineSearch
    curvature: Curvature


def _update(
    parts: _Parts,
    grads: Params,
    state: HessianFreeState,
    params: Params,
    batch: tuple,
    eval_batch: tuple | None,
) -> tuple[Params, HessianFreeState]:
    """Do one update: algorithm 3, line by line."""
    objective = parts.objective
    evaluated = batch if eval_batch is None else eval_batch
    gradient = _tree.widen(grads)
    dtype = _tree.scalar_dtype(params)
    damping = parts.damping.current(jnp.asarray(state.damping, dtype), state.count)
    damping = damping.astype(dtype)
    key, subkey = (None, None) if state.key is None else jax.random.split(state.key)

    def value_fn(step: Tree) -> jax.Array:
        return objective.value(_tree.add(params, step), evaluated)

    # (B + λI) δ = −∇f, by conjugate gradients.
    matvec = tikhonov(parts.curvature(objective, params, batch), damping)
    precondition = None
    if parts.preconditioner is not None:
        build = parts.preconditioner.build
        precondition = build(objective, params, batch, damping, subkey)
    b = jax.tree.map(jnp.negative, gradient)
    x0 = parts.solver.start(state.direction, state.count)
    result = parts.solver.solve(matvec, b, x0, precondition, value_fn)

    # δ among its iterates, and α along it.
    value = objective.value(params, evaluated)
    choice = parts.backtracking(value_fn, result.kept)
    slope = _tree.dot(gradient, choice.step)
    rate = _options.read(parts.learning_rate, state.count).astype(value.dtype)
    is_whole = (
        _options.is_plain_number(parts.learning_rate) and parts.learning_rate == 1
    )
    search = parts.line_search(
        lambda alpha: value_fn(_tree.scale(alpha, choice.step)),
        value,
        slope,
        rate,
        choice.value if is_whole else None,
    )

    # Accept or reject.
    gradient_norm = _tree.norm(gradient)
    rejection = _judge(gradient_norm, result, value, choice, slope, search)
    accepted = rejection == Rejection.NONE
    step = _tree.scale(search.step_size, choice.step)
    step = _tree.select(accepted, step, jax.tree.map(jnp.zeros_like, step))

    # ρ, and λ for the next update.
    proposal = _Proposal(result, value, choice, slope, search)
    change, predicted = _reduction(parts, proposal, params, batch, eval_batch, damping)
    ratio = measured_ratio(change, predicted, value)
    # A step too small to be seen in f is no evidence against the model, even rejected.
    visible = ~(jnp.abs(predicted) <= rounding_noise(value))
    ratio = jnp.where(accepted | ~visible, ratio, -jnp.inf)
    adapted = parts.damping.update(damping, ratio)
    adapted = jnp.where(rejection == Rejection.ZERO_GRADIENT, damping, adapted)

    carried = parts.solver.carry(result, choice.step)
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
    new_state = HessianFreeState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        damping=adapted.astype(dtype),
        direction=_tree.select(
            accepted, carried, jax.tree.map(jnp.zeros_like, carried)
        ),
        key=key,
        info=_tree.cast_like(info, no_info(dtype)),
    )
    return _tree.cast_like(step, params), new_state


def _judge(
    gradient_norm: jax.Array,
    result: CGResult,
    value: jax.Array,
    choice: Choice,
    slope: jax.Array,
    search: StepSize,
) -> jax.Array:
    """Return why to reject, or NONE: the first reason that holds."""
    finite = jnp.isfinite
    reason = jnp.where(search.success, Rejection.NONE, Rejection.NO_DECREASE)
    reason = jnp.where(slope < 0, reason, Rejection.NO_DESCENT)
    seen = finite(value) & finite(choice.value)
    reason = jnp.where(seen, reason, Rejection.NONFINITE_VALUE)
    broken = result.reason == Reason.NONFINITE
    reason = jnp.where(broken, Rejection.NONFINITE_PRODUCT, reason)
    reason = jnp.where(gradient_norm == 0, Rejection.ZERO_GRADIENT, reason)
    reason = jnp.where(finite(gradient_norm), reason, Rejection.NONFINITE_GRADIENT)
    return reason.astype(jnp.int32)


class _Proposal(NamedTuple):
    result: CGResult
    value: jax.Array
    choice: Choice
    slope: jax.Array
    search: StepSize


def _reduction(
    parts: _Parts,
    proposal: _Proposal,
    params: Params,
    batch: tuple,
    eval_batch: tuple | None,
    damping: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the change of f and M(δ), of the step and data that ρ is to judge."""
    ratio, (result, value, choice, slope, search) = parts.damping.ratio, proposal
    is_last = ratio.step == "last"
    step = result.x if is_last else choice.step
    after = choice.last_value if is_last else choice.value
    index = result.num_iterations if is_last else choice.iteration
    predicted = result.model_values[index]
    if ratio.model == "undamped":
        predicted -= 0.5 * damping * _tree.dot(step, step)
    if ratio.step == "taken":
        # M(αδ) = α ∇fᵀδ + ½α² δᵀBδ, and ½δᵀBδ = M(δ) − ∇fᵀδ.
        alpha = search.step_size
        predicted = alpha * slope + alpha**2 * (predicted - slope)
        step, after = _tree.scale(alpha, step), search.value
    if eval_batch is not None and ratio.data == "batch":
        value = parts.objective.value(params, batch)
        after = parts.objective.value(_tree.add(params, step), batch)
    return after - value, predicted


def _finite_or(sentinel: float, x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, sentinel)
