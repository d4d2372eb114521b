"""Hessian-free optimisation as an Optax transformation: the report's algorithm 3.

Only this module knows all the others. One update, with `δ` the step, `A = B + λD + μS`:

    B, D, S, P    curvature, damping matrices and preconditioner of the batch
    δ₁, δ₂, …     conjugate gradients on A δ = −∇f, from 0 or from ζ δ_before
    δ             the kept iterate that backtracking on f chooses, or another λ's step
    c             what the solver corrects δ by: 0, but for `hfjax.sample_space`
    ρ, λ          how well M predicted the change of f; λ for the next update
    α             line search along αδ + α²c
    θ + αδ + α²c  if f has fallen; else θ, and the warm start dropped
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, check_gradient, missing
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Batch, NumberOrSchedule, Params, Tree
from hfjax._tracing import compiled
from hfjax.curvature import Curvature, ggn
from hfjax.globalization.backtracking import Backtracking
from hfjax.globalization.damping import Damping, searched
from hfjax.globalization.linesearch import LineSearch, armijo
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.preconditioners import PreconditionerRule
from hfjax.solvers.cg import conjugate_gradient
from hfjax.solvers.descent import Solver
from hfjax.update._bookkeeping import check_state, no_info, record_of
from hfjax.update._judge import Judged, Trial, choose, go_along, judge, report
from hfjax.update.fitting import Fitted, check_part, fitted
from hfjax.update.state import HessianFreeState, Rejection
from hfjax.update.system import Point, assemble, key_of


def hessian_free(
    objective: Objective,
    *,
    learning_rate: NumberOrSchedule = 1.0,
    damping: Damping = searched(),
    solver: Solver | str = conjugate_gradient(),
    preconditioner: PreconditionerRule | str | None = "auto",
    backtracking: Backtracking | str | None = "auto",
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

    Other keyword arguments are ignored; `docs/faults.md` has the wrappers of Optax and Flax
    that hand these on. Outside of `jit`, too, an update is compiled once: what `model_fn`,
    the loss or a rule closes over is read then. An update has no derivative, and says so:
    for that of a fit there is `hfjax.cg.inverse`. By default it is
    `recipes.kronecker_factored`, the fastest on every problem compared
    (`benchmarks/results/step6.md`); the report's method is `recipes.martens2010`.

    Args:
      objective: f, with its weight decay.
      learning_rate: the first α that the line search tries; number or schedule (1:
        report, section 8.8).
      damping: λ, D and μ, of `hfjax.damping`; with
        `solver=hfjax.trust_region.steihaug_toint()`, `hfjax.trust_region.radius()`.
      solver: of `hfjax.cg`, `hfjax.trust_region`, `hfjax.krylov` or
        `hfjax.sample_space`; `"auto"` is `sample_space.where_small(cg.conjugate_gradient())`
        where curvature and damping are the plain ones that it can solve with, and damping is
        not structural; and else `cg.conjugate_gradient()`.
      preconditioner: of `hfjax.preconditioners`; `None` is the identity; `"auto"` is
        `kronecker()` where the solver asks for one, and `None` where it does not.
      backtracking: of `hfjax.backtracking`; `None` takes the last iterate; `"auto"` is what
        the damping rule wants, as the search for λ of `damping.searched`, where the solver
        tells the steps for other λ; and else `early_stop()`.
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
        curvature; structural damping without a `hidden_loss`, or with a curvature that
        does not take `structural`.

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
    options.check_range("learning_rate", learning_rate, low=0.0)
    check_part("line_search", line_search, LineSearch, none=True)
    fit = fitted(objective, damping, solver, preconditioner, backtracking, curvature)
    preconditioner = fit.preconditioner
    remembered = (preconditioner and preconditioner.init) or (lambda params: None)
    line_search = line_search or LineSearch()
    parts = _Parts(objective, learning_rate, damping, fit, line_search, curvature, seed)

    @compiled.once
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
        dtype = trees.scalar_dtype(params)
        return HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=damping.init().astype(dtype),
            direction=optax.tree.zeros_like(trees.widen(params)),
            preconditioner=remembered(params),
            record=record_of(None, fit.solver.max_iterations, dtype),
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
            terms_of(objective, eval_batch, "eval_batch")  # Raises, if it is none.
        new = changed(updates, state, params, batch, eval_batch)
        return without_derivative("An update", new)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_hessian_free(
    objective: Objective,
    *,
    damping: Damping = searched(),
    solver: Solver | str = conjugate_gradient(),
    preconditioner: PreconditionerRule | str | None = "auto",
    backtracking: Backtracking | str | None = "auto",
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
    fit: Fitted
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
    eval_batch = batch if eval_batch is None else eval_batch
    point = _point(parts, grads, state, params, batch, eval_batch)
    solver, rule = parts.fit.solver, parts.damping

    # A δ = −∇f, from 0 or from ζ δ_before; δ, one of its steps; how far along it.
    at = assemble(point, parts.curvature, rule, parts.fit.preconditioner)
    before, rate = at.before(), parts.learning_rate
    start = solver.start(at.packing.pack(state.direction), state.count)
    run = solver.solve(at.system, start)
    chosen = choose(parts.fit.rule_for(run), at, run, before, rule.ratio)
    trial = go_along(parts.line_search, rate, at, run, before, chosen)

    # Accepted or rejected, ρ, and λ for the next update.
    judged = judge(trial, rule.ratio)
    scalar = rule.update(point.scalar, judged.verdict, chosen.damping)
    stays = (judged.rejection == Rejection.ZERO_GRADIENT) | ~jnp.isfinite(scalar)
    scalar = jnp.where(stays, point.scalar, scalar)
    return _taken(trial, judged), _next(solver, trial, judged, scalar)


def _point(
    parts: _Parts,
    grads: Params,
    state: HessianFreeState,
    params: Params,
    batch: Batch,
    eval_batch: Batch,
) -> Point:
    """Return where the update stands."""
    dtype = trees.scalar_dtype(params)
    scalar = parts.damping.current(jnp.asarray(state.damping, dtype), state.count)
    return Point(
        objective=parts.objective.at(state.count),
        params=params,
        gradient=grads,
        batch=batch,
        eval_batch=eval_batch,
        scalar=scalar.astype(dtype),
        count=state.count,
        key=key_of(parts.seed, state.count),
        memory=state.preconditioner,
    )


def _taken(trial: Trial, judged: Judged) -> Params:
    """Return what is added to the parameters: the step, or zeros."""
    step = trial.chosen.step.at(trial.search.step_size)
    step = trial.at.packing.unpack(_or_zero(judged.verdict.accepted, step))
    return trees.cast_like(step, trial.at.point.params)


def _next(
    solver: Solver, trial: Trial, judged: Judged, scalar: jax.Array
) -> HessianFreeState:
    """Return the state for the next update."""
    at, run, _, chosen, *_ = trial
    dtype = at.point.scalar.dtype
    carried = solver.carry(run, chosen.step.at())
    kept = judged.verdict.accepted & jnp.isfinite(trees.magnitude(carried))
    return HessianFreeState(
        count=jnp.asarray(optax.safe_increment(at.point.count)),
        damping=scalar.astype(dtype),
        direction=at.packing.unpack(_or_zero(kept, carried)),
        preconditioner=at.memory(),
        record=record_of(run.stats, solver.max_iterations, dtype),
        info=report(trial, judged),
    )


def _or_zero(accepted: jax.Array | bool, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(accepted, x, 0), tree)
