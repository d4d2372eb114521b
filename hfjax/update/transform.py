"""Hessian-free optimisation as an Optax transformation.

`_update` is algorithm 3 of M&S (2012). With the step δ and A = B + λD + μS:

    B, D, S, P    curvature, damping matrices and preconditioner, from cases of the batch
    δ₁, δ₂, …     conjugate gradients on A δ = −∇f, from 0 or from ζ δ_before
    δ             the iterate, or the step for another λ, chosen by f
    c             a correction to δ, from the solver in `hfjax.sample_space`, else 0
    ρ, λ          how well M predicted the change of f; λ for the next update
    α             line search along αδ + α²c
    θ + αδ + α²c  the new parameters if f fell; else θ, and the warm start is dropped

This is the only module that knows all the others.
"""

import functools
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
from hfjax.objectives import masking
from hfjax.objectives.balance import number_of_scales
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.preconditioners import PreconditionerRule
from hfjax.solvers.cg import conjugate_gradient
from hfjax.solvers.descent import Solver
from hfjax.update._bookkeeping import check_state, no_info, record_of
from hfjax.update._drawn import drawn, first_sample
from hfjax.update._judge import Judged, Trial, choose, go_along, judge, report
from hfjax.update.fitting import Fitted, check_part, fitted
from hfjax.update.point import starting_point
from hfjax.update.sampling import Sampling
from hfjax.update.state import HessianFreeState, Rejection
from hfjax.update.system import assemble


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
    sampling: Sampling | str | None = "auto",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the Hessian-free optimizer.

    Each update minimises the quadratic model M(δ) = ∇fᵀδ + ½ δᵀ(B + λD + μS)δ by conjugate
    gradients and returns the step αδ, to be added by `optax.apply_updates`. A step that is
    not finite or does not lower f on the evaluation data is rejected: the update is zero,
    and `state.info.rejection` says why. Parameters and state never receive NaN.

    `update(grads, state, params, batch=…, eval_batch=None)` takes:

    - `grads`: ∇f from `objective.value_and_grad`, neither clipped nor scaled. It may come
      from another, larger batch.
    - `batch`: the curvature data, `(inputs, targets)` or `(inputs, targets, weights)`: all
      of it for f in ρ, all or a part (`sampling`) for B and P. Required.
    - `eval_batch`: the data on which steps are compared and the line search runs; by
      default `batch`. If you draw new batches for each update, compute the gradient on
      data that include both: on unseen data ρ is noise, and λ climbs.
    - `all_params`: all parameters, if `optax.partition` or `optax.masked` leaves only some
      of them to this optimizer. The others are held fixed within the update.

    Other keyword arguments are ignored; `docs/faults.md` lists the wrappers of Optax and
    Flax that pass these on. Outside `jit`, an update is compiled once, and reads what
    `model_fn`, the loss or a rule closes over at that time. An update cannot be
    differentiated, and raises an error if you try; to differentiate the result of a fit
    use `hfjax.cg.inverse`. The defaults are those of `recipes.kronecker_factored`, the
    fastest recipe in every comparison; `recipes.martens2010` is the original method.

    Args:
      objective: f, including its weight decay.
      learning_rate: first α that the line search tries; a number or a schedule.
      damping: rule of `hfjax.damping` for λ, D and μ. λ has the units of the curvature of
        f. With a solver in a trust region, `hfjax.trust_region.steihaug_toint()` or
        `hfjax.sample_space.trust_region()`, pass `hfjax.trust_region.radius()`.
      solver: from `hfjax.cg`, `hfjax.trust_region`, `hfjax.krylov` or
        `hfjax.sample_space`. `"auto"` solves small problems exactly, by
        `sample_space.where_small(cg.conjugate_gradient())`, if `curvature` is `ggn` and the
        damping is λI or λ diag(G) without structural damping; otherwise it is
        `cg.conjugate_gradient()`.
      preconditioner: from `hfjax.preconditioners`; `None` is the identity. `"auto"` is
        `kronecker()` if the solver uses a preconditioner, else `None`.
      backtracking: from `hfjax.backtracking`; `None` takes the last iterate. `"auto"` is
        what the damping rule asks for if the solver supports it, such as the search for λ
        of `damping.searched`, and otherwise `early_stop()`.
      line_search: from `hfjax.linesearch`; `None` takes the learning rate, unless f rises.
      curvature: `(objective, params, batch) -> (v -> B v)`, from `hfjax.curvature`. With
        structural damping it is also passed `structural=μ`. With
        `optax.inject_hyperparams`, list it in `static_args` even if you leave it out: Optax
        takes every callable for a schedule.
      sampling: which cases of `batch` B and the preconditioner are computed from, by
        `hfjax.sampling`; `None` is all of them. `"auto"` is `sampling.growing()` if B is
        the Gauss-Newton matrix and conjugate gradients solve with B + λI, else `None`. It
        takes effect with 1,000 cases, 10⁸ cases · parameters, and no `eval_batch`.
      seed: determines all random numbers, together with the number of the update.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `HessianFreeState`.

    Raises:
      TypeError: if `objective` is not an `Objective`, if another argument is not a
        component of its kind, or in `update`, if `params` or `batch` is missing.
      ValueError: if an option is out of range, or if two components do not fit together: a
        trust-region solver with a rule for λ, or the reverse; `krylov.subspace_descent()`
        with a λ that changes; `sample_space.cholesky()` with a preconditioner, another
        damping matrix than I or diag(G), or another curvature; structural damping without
        a `hidden_loss`.

    Example:
      Without damping, one update solves a linear least-squares problem:

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
    fit = fitted(
        objective, damping, solver, preconditioner, backtracking, curvature, sampling
    )
    preconditioner = fit.preconditioner
    remembered = (preconditioner and preconditioner.init) or (lambda params: None)
    line_search = line_search or LineSearch()
    scales = number_of_scales(objective)
    parts = _Parts(objective, learning_rate, damping, fit, line_search, curvature, seed)
    changed = compiled.once(functools.partial(_update, parts))

    def init(params: Params) -> Any:
        params = as_params(masking.ours(params))
        dtype = trees.scalar_dtype(params)
        state = HessianFreeState(
            count=jnp.zeros((), jnp.int32),
            damping=damping.init().astype(dtype),
            direction=optax.tree.zeros_like(trees.widen(params)),
            preconditioner=remembered(params),
            scales=jnp.ones(scales, dtype) if scales else None,
            sample=first_sample(fit.sampling, dtype),
            record=record_of(None, fit.solver.max_iterations, dtype),
            info=no_info(dtype),
        )
        return masking.theirs(state)

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        eval_batch: Batch | None = None,
        all_params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        del extra_args  # Optax's contract: ignore what is not needed.
        if params is None or batch is None:
            raise missing("params" if params is None else "batch")
        updates, state, params = masking.ours((updates, state, params))
        params, hidden = as_params(params), masking.hidden_of(params, all_params)
        check_gradient(updates, params)
        memory = jax.eval_shape(remembered, params)
        check_state(state, params, memory, scales, samples=fit.sampling is not None)
        if eval_batch is not None:
            terms_of(objective, eval_batch, "eval_batch")  # Raises if it is no batch.
        new = changed(updates, state, params, batch, eval_batch, hidden)
        return masking.theirs(without_derivative("An update", new))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_hessian_free(
    objective: Objective,
    *,
    damping: Damping = searched(),
    solver: Solver | str = conjugate_gradient(),
    preconditioner: PreconditionerRule | str | None = "auto",
    backtracking: Backtracking | str | None = "auto",
    curvature: Curvature = ggn,
    sampling: Sampling | str | None = "auto",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Build the direction only, to chain with other transformations.

    Returns −δ, which has the sign of a gradient like all of Optax's `scale_by_*`. Chain it
    with `optax.scale_by_learning_rate`, or with `optax.scale(-1.0)` and one of Optax's line
    searches, which needs `value_fn=objective.value`. It has no line search and no learning
    rate of its own. λ adapts, and a direction along which f would rise becomes zero, as in
    `hessian_free`.

    Args:
      objective: as in `hessian_free`, like all other options.
      damping: as in `hessian_free`.
      solver: as in `hessian_free`.
      preconditioner: as in `hessian_free`.
      backtracking: as in `hessian_free`.
      curvature: as in `hessian_free`.
      sampling: as in `hessian_free`.
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
        sampling=sampling,
        seed=seed,
    )

    def update(
        updates: Params, state: Any, params: Params | None = None, **extra_args: Any
    ) -> tuple[Params, Any]:
        steps, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(jnp.negative, steps), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


class _Parts(NamedTuple):
    """The components of an optimizer."""

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
    hidden: Tree | None,
) -> tuple[Params, HessianFreeState]:
    """Perform one update: algorithm 3."""
    solver, rule = parts.fit.solver, parts.damping
    point = starting_point(
        parts.objective,
        rule,
        parts.seed,
        grads=grads,
        state=state,
        params=params,
        batch=batch,
        eval_batch=eval_batch,
    )
    if hidden is not None:
        visible = masking.of_visible(point.objective, params, hidden)
        point = point._replace(objective=visible)
    # With data of its own for the evaluation, all of the batch is for the curvature.
    sampling = parts.fit.sampling if eval_batch is None else None
    cases = drawn(sampling, point.objective, params, batch, state.sample)

    # Solve A δ = −∇f, from 0 or from ζ δ_before; choose a step; search along it.
    at = assemble(point, parts.curvature, rule, parts.fit.preconditioner, cases)
    before, rate = at.before(), parts.learning_rate
    start = solver.start(at.packing.pack(state.direction), state.count)
    run = solver.solve(at.system, start)
    chosen, known = choose(parts.fit.rule_for(run), at, run, before, rule.ratio)
    trial = go_along(parts.line_search, rate, at, run, before, chosen, known=known)

    # Accept or reject the step; compute ρ, and λ for the next update.
    judged = judge(trial, rule.ratio)
    scalar = rule.update(point.scalar, judged.verdict, chosen.damping)
    stays = (judged.rejection == Rejection.ZERO_GRADIENT) | ~jnp.isfinite(scalar)
    scalar = jnp.where(stays, point.scalar, scalar)
    return _taken(trial, judged), _next(parts.fit, trial, judged, scalar)


def _taken(trial: Trial, judged: Judged) -> Params:
    """Return what to add to the parameters: the step, or zeros."""
    step = trial.chosen.step.at(trial.search.step_size)
    step = trial.at.packing.unpack(_or_zero(judged.verdict.accepted, step))
    return trees.cast_like(step, trial.at.point.params)


def _next(
    fit: Fitted, trial: Trial, judged: Judged, scalar: jax.Array
) -> HessianFreeState:
    at, run, _, chosen, *_ = trial
    point, dtype, solver = at.point, at.point.scalar.dtype, fit.solver
    carried = solver.carry(run, chosen.step.at())
    kept = judged.verdict.accepted & jnp.isfinite(trees.magnitude(carried))
    return HessianFreeState(
        count=jnp.asarray(optax.safe_increment(point.count)),
        damping=scalar.astype(dtype),
        direction=at.packing.unpack(_or_zero(kept, carried)),
        preconditioner=at.memory(),
        scales=point.next_scales(),
        sample=at.next_sample(fit.sampling, chosen.step.direction, judged.curved),
        record=record_of(run.stats, solver.max_iterations, dtype),
        info=report(trial, judged),
    )


def _or_zero(accepted: jax.Array | bool, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(accepted, x, 0), tree)
