"""Hessian-free optimisation as an Optax transformation: the report's algorithm 3.

Only this room knows all the others. One update, with `δ` the step, `A = B + λD + μS`:

    B, D, S, P    curvature, damping matrices and preconditioner of the batch
    δ₁, δ₂, …     conjugate gradients on A δ = −∇f, from 0 or from ζ δ_before
    δ             the kept iterate that backtracking on f chooses, or another λ's solution
    c             what the solver corrects δ by: 0, but for `hfjax.sample_space`
    ρ, λ          how well M predicted the change of f; λ for the next update
    α             line search along αδ + α²c
    θ + αδ + α²c  if f has fallen; else θ, and the warm start dropped
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax import _compiled, _options, _tree
from hfjax._arguments import as_params, check_gradient, missing
from hfjax._fitting import check_part, fitted
from hfjax._path import along, end
from hfjax._refusal import without_derivative
from hfjax._system import Point, assemble
from hfjax._trial import (
    Trial,
    adapt,
    choose,
    go_along,
    judge,
    noise_of,
    ratio_of,
    reduction,
    report,
    slope_along,
)
from hfjax._types import Batch, NumberOrSchedule, Params, Tree
from hfjax.backtracking import Backtracking, early_stop, redamped
from hfjax.cg import Solver, conjugate_gradient
from hfjax.curvature import Curvature, ggn
from hfjax.damping import Damping, searched
from hfjax.linesearch import LineSearch, armijo, whole
from hfjax.objective import Objective
from hfjax.preconditioners import PreconditionerRule
from hfjax.sample_space import suited
from hfjax.state import (
    HessianFreeState,
    Rejection,
    check_state,
    no_info,
    record_of,
)


def hessian_free(
    objective: Objective,
    *,
    learning_rate: NumberOrSchedule = 1.0,
    damping: Damping = searched(),
    solver: Solver | str = conjugate_gradient(),
    preconditioner: PreconditionerRule | str | None = "auto",
    backtracking: Backtracking | None = redamped(otherwise=early_stop()),
    line_search: LineSearch | None = armijo(),
    curvature: Curvature = ggn,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the Hessian-free optimizer.

    Its `update` minimises M(δ) = ∇fᵀδ + ½δᵀ(B + λD + μS)δ by conjugate gradients and
    returns the step αδ for `optax.apply_updates`, or zeros: an update never raises
    f on the evaluation data, and never brings NaN into parameters or state.

    `update(grads, state, params, batch=…, eval_batch=None)` takes:

    - `grads`: ∇f, of `objective.value_and_grad`, on any batch, often a larger one.
      Neither clipped nor scaled: they must be the gradient of this objective.
    - `batch`: the curvature data, `(inputs, targets)` or `(inputs, targets, weights)`:
      what B, the preconditioner and ρ are taken on. Required.
    - `eval_batch`: on which iterates are chosen and the line search runs; `None` is
      `batch`. Where batches are drawn anew in each update, let the gradient's hold both:
      on data that it has not seen ρ is noise, and λ climbs.

    Other keyword arguments are ignored. Outside of `jit`, too, an update is compiled once: what
    `model_fn`, the loss or a rule closes over is read when that is done. An update has no derivative, and says so: for that of
    a fit, by data or hyperparameters, there is `hfjax.cg.inverse`. `docs/faults.md` has the wrappers of Optax and
    Flax that hand them on, and those that do not.

    As it comes it is `recipes.kronecker_factored`, the fastest on every problem that it
    was compared on (`benchmarks/results/step6.md`). The report's method is
    `recipes.martens2010`.

    Args:
      objective: f, with its weight decay.
      learning_rate: the first α that the line search tries; number or schedule (1:
        report, section 8.8).
      damping: λ, D and μ, of `hfjax.damping`; with
        `solver=hfjax.trust_region.steihaug_toint()`, `hfjax.trust_region.radius()`.
      solver: of `hfjax.cg`, `hfjax.trust_region`, `hfjax.krylov` or
        `hfjax.sample_space`; `"auto"` is `sample_space.cholesky(momentum=0.5)` where the batch's
        outputs or the parameters are few enough to be solved for exactly
        (`hfjax.sample_space.suited`), curvature and damping are the plain ones that it
        solves with, and damping is not structural; and else `cg.conjugate_gradient()`.
      preconditioner: of `hfjax.preconditioners`; `None` is the identity; `"auto"` is
        `kronecker()` where the solver asks for one, and `None` where it does not.
      backtracking: of `hfjax.backtracking`; `None` takes the last iterate. As it comes,
        `early_stop` takes the place of `redamped` unless `damping` is `searched`, and
        where the solver does not allow a search.
      line_search: of `hfjax.linesearch`; `None` takes the learning rate, unless f
        rises.
      curvature: `(objective, params, batch) -> (v -> B v)`, of `hfjax.curvature`; it
        is given `structural=μ` too if `damping` has one. Under
        `optax.inject_hyperparams` list it in `static_args`, even if it is left out:
        Optax takes every callable for a schedule.
      seed: of all random numbers: an update draws with a key of the seed and the number
        of the update alone.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `HessianFreeState`.

    Raises:
      TypeError: if `objective` is no `Objective`, or another argument is not a part of
        its kind; in `update`, if `params` or `batch` is missing.
      ValueError: if an option is out of range, or if two parts do not go together: a
        solver that reads a radius and a rule that drives λ, or the reverse;
        `krylov.subspace_descent()` and a λ that is adapted or searched for;
        `sample_space.cholesky()` and a preconditioner, a damping matrix or another
        curvature; structural damping without a `hidden_loss`; `backtracking=redamped()`
        without `damping.searched()`, or with a solver that cannot search for λ.

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
    check_part("line_search", line_search, LineSearch, none=True)
    solver, exact, preconditioner, backtracking = fitted(
        objective, damping, solver, preconditioner, backtracking, curvature
    )
    remembered = (preconditioner and preconditioner.init) or (lambda params: None)
    parts = _Parts(
        objective=objective,
        learning_rate=learning_rate,
        damping=damping,
        solver=solver,
        exact_if_suited=exact,
        preconditioner=preconditioner,
        backtracking=backtracking,
        line_search=line_search or whole(),
        curvature=curvature,
        seed=seed,
    )

    @_compiled.once
    def changed(
        grads: Params,
        state: Any,
        params: Params,
        batch: Batch,
        eval_batch: Batch | None,
    ) -> tuple[Params, Any]:
        return _update(parts, grads, state, params, batch, eval_batch)

    def init(params: Params) -> Any:
        params = as_params(params)
        dtype = _tree.scalar_dtype(params)
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=damping.init().astype(dtype),
            direction=optax.tree.zeros_like(_tree.widen(params)),
            preconditioner=remembered(params),
            record=record_of(None, solver.recorded, dtype),
            info=no_info(dtype),
        )

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        eval_batch: Batch | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        del extra_args  # The contract of Optax: what is not needed is ignored.
        if params is None or batch is None:
            raise missing("params" if params is None else "batch")
        params = as_params(params)
        check_gradient(updates, params)
        memory = jax.eval_shape(remembered, params)
        check_state(state, params, memory)
        if eval_batch is not None:
            objective.check_batch(eval_batch, "eval_batch")
        new = changed(updates, state, params, batch, eval_batch)
        return without_derivative("An update", new)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_hessian_free(
    objective: Objective,
    *,
    damping: Damping = searched(),
    solver: Solver | str = conjugate_gradient(),
    preconditioner: PreconditionerRule | str | None = "auto",
    backtracking: Backtracking | None = redamped(otherwise=early_stop()),
    curvature: Curvature = ggn,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the direction alone, to chain with other transformations.

    Returns −δ, with the sign of a gradient as all of Optax's `scale_by_*`: chain it
    with `optax.scale_by_learning_rate`, or with `optax.scale(-1.0)` and a line search
    of Optax's, which wants `value_fn=objective.value`. No line search and no learning
    rate of its own; λ adapts, and a direction along which f would rise becomes zero, as
    in `hessian_free`, whose options and arguments these are.

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
      >>> direction = scale_by_hessian_free(
      ...     objective, damping=hfjax.damping.constant(1.0)
      ... )
      >>> tx = optax.chain(direction, optax.scale(-0.5))
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
    """The components of one optimizer."""

    objective: Objective
    learning_rate: NumberOrSchedule
    damping: Damping
    solver: Solver
    exact_if_suited: bool
    preconditioner: PreconditionerRule | None
    backtracking: Backtracking
    line_search: LineSearch
    curvature: Curvature
    seed: int


def _update(
    parts: _Parts,
    grads: Params,
    state: HessianFreeState,
    params: Params,
    batch: Batch,
    eval_batch: Batch | None,
) -> tuple[Params, HessianFreeState]:
    """Do one update: algorithm 3, line by line."""
    dtype = _tree.scalar_dtype(params)
    b = jax.tree.map(jnp.negative, _tree.cast_like(grads, _tree.widen(params)))
    damping = parts.damping.current(jnp.asarray(state.damping, dtype), state.count)
    solver, preconditioner = parts.solver, parts.preconditioner
    if parts.exact_if_suited:
        solver = suited(parts.objective, params, batch, otherwise=solver)
        preconditioner = preconditioner if solver.preconditioned else None

    # A = B + λD + μS, and P.
    point = Point(
        objective=parts.objective.at(state.count),
        params=params,
        batch=batch,
        eval_batch=batch if eval_batch is None else eval_batch,
        damping=damping.astype(dtype),
        count=state.count,
        key=jax.random.fold_in(jax.random.key(parts.seed), state.count),
        memory=state.preconditioner,
    )
    subproblem, penalty, memory = assemble(
        point, b, parts.curvature, parts.damping, preconditioner
    )

    # A δ = −∇f, by conjugate gradients from 0 or ζ δ_before, or exactly.
    x0 = solver.start(state.direction, state.count)
    result = solver.solve(subproblem, x0)

    # δ, one of its iterates, and c; α, how far to go along them; accept or reject.
    value = point.value(point.eval_batch)
    noise = noise_of(value, b, params)
    rule = parts.damping.ratio
    choice = choose(
        parts.backtracking,
        point,
        subproblem,
        result,
        value,
        noise,
        judges_last=rule.step == "last",
    )
    slope = slope_along(b, choice.step)
    rate = parts.learning_rate
    search = go_along(parts.line_search, rate, point, value, choice, slope)
    trial = Trial(_tree.norm(b), result, value, choice, slope, search)
    rejection = judge(trial)
    accepted = rejection == Rejection.NONE
    step = _or_zero(accepted, along(search.step_size, choice.step, choice.correction))

    # ρ, and λ for the next update.
    value_on_batch = None if eval_batch is None else subproblem.batch_value_fn
    part = penalty(choice.step)
    change, predicted = reduction(trial, rule, penalty, part, value_on_batch)
    ratio, seen = ratio_of(rejection, change, predicted, noise, rule.expected)
    adapted = adapt(parts.damping, point.damping, trial, ratio, seen, part, accepted)
    stays = (rejection == Rejection.ZERO_GRADIENT) | ~jnp.isfinite(adapted)
    adapted = jnp.where(stays, point.damping, adapted)

    carried = solver.carry(result, end(choice.step, choice.correction))
    new_state = HessianFreeState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        damping=adapted.astype(dtype),
        direction=_or_zero(accepted & jnp.isfinite(_tree.magnitude(carried)), carried),
        preconditioner=memory,
        record=record_of(result, parts.solver.recorded, dtype),
        info=report(trial, rejection, ratio, predicted, dtype),
    )
    return _tree.cast_like(step, params), new_state


def _or_zero(accepted: jax.Array, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(accepted, x, 0), tree)
