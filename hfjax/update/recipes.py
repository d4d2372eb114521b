"""Recipes: whole set-ups under one name (report, section 13, and one of our own).

| recipe | gradient | curvature | step | CG ends |
|---|---|---|---|---|
| `martens2010` | all data | a part | best of the kept iterates, on all data | M stalls, or 250 |
| `curvature_guarded` | larger batch | a batch | best of the kept, on other data | f rises on the curvature batch |
| `momentum_like` | a small batch | the same | the last iterate | M stalls, or 50 |
| `kronecker_factored` | all data | the same | best of λ on one run's subspace | an iteration gains too little |

The first three are the report's: the Gauss-Newton matrix, warm starts, (diag + λ)^0.75
for a preconditioner and the Levenberg-Marquardt rule, "common elements to all successful
approaches". The last is what `hessian_free` does as it comes, written out. Initialise
well (`hfjax.initializers`), and consider a little weight decay that a schedule turns
off near the end: `Objective(weight_decay=optax.piecewise_constant_schedule(2e-5, {500:
0.0}))`, with gradients of `objective.at(state.count)`.
"""

import optax

from hfjax import preconditioners
from hfjax._core.types import Number, NumberOrSchedule
from hfjax.globalization import backtracking, damping, linesearch
from hfjax.objectives.objective import Objective
from hfjax.solvers import cg, iterates, stopping
from hfjax.update.transform import hessian_free


def martens2010(
    objective: Objective, *, initial_damping: Number = 45.0, max_iterations: int = 250
) -> optax.GradientTransformationExtraArgs:
    """Set up Martens' published program, constant by constant.

    Every constant is written out below, whatever the defaults elsewhere are. In his
    program the gradient, the preconditioner, the choice of iterate and the line search
    are on all training data, the curvature and ρ on one quarter, taken in turn:

        value, grads = objective.value_and_grad(params, everything)
        tx.update(grads, state, params, batch=quarter, eval_batch=everything)

    Weight decay (2e-5 in his program, on biases too) belongs to the objective.

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update, on the scale of the mean curvature.
        45, of his program, is for losses summed over 784 outputs.
      max_iterations: of conjugate gradients in an update. 250, of his program, is for
        deep autoencoders from a random start.

    Returns:
      The transformation, as `hessian_free` returns it.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> print(martens2010(f).init(jnp.zeros(1)).damping)
      45.0

    References:
      Martens (2010); the program published with it, and its log on CURVES.
    """
    return hessian_free(
        objective,
        learning_rate=1.0,
        damping=damping.levenberg_marquardt(
            init=initial_damping,
            decrease=2 / 3,
            increase=3 / 2,
            lower=1 / 4,
            upper=3 / 4,
            minimum=0.0,
            ratio=damping.ReductionRatio(model="undamped", step="chosen", data="batch"),
        ),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            min_iterations=1,
            stopping=stopping.martens2010(5e-4, fraction=0.1, minimum_window=10),
            keep=iterates.grid(first=5, growth=1.3),
            warm_start_decay=0.95,
            warm_start_from="last",
        ),
        preconditioner=preconditioners.diagonal(
            exponent=0.75, kappa=0.0, data="eval_batch"
        ),
        backtracking=backtracking.early_stop(),
        line_search=linesearch.armijo(
            sufficient_decrease=1e-2, shrink=0.8, max_tries=60
        ),
    )


def curvature_guarded(
    objective: Objective,
    *,
    initial_damping: Number = 45.0,
    max_iterations: int = 250,
    interval: int = 10,
    tolerance: Number = 0.01,
    evaluated_cases: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Set up the report's second recipe: f on the curvature batch guards CG.

    Conjugate gradients end as soon as f on the curvature batch is significantly worse
    than `interval` iterations ago; the step is the kept iterate with the lowest f on
    other data; the next run starts from the iterate with the lowest f on the curvature
    batch, which is close to the last. So hand `update` data that the curvature batch
    does not hold:

        value, grads = objective.value_and_grad(params, larger)
        tx.update(grads, state, params, batch=batch, eval_batch=other)

    Without `eval_batch` the recipe selects on the curvature batch itself.

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update (45: as `martens2010`, for losses
        summed over 784 outputs).
      max_iterations: of conjugate gradients in an update (250: Martens 2010).
      interval: iterations between evaluations of f (report, section 13: 10).
      tolerance: what is significantly worse, see `hfjax.iterates.guarded`; heuristic.
      evaluated_cases: how many of the evaluation cases iterates are compared on;
        `None` is all (ibid.: "much smaller (but representative) subsets").

    Returns:
      The transformation, as `hessian_free` returns it.

    References:
      Martens & Sutskever (2012), section 13, second recipe; ERRATA: the best iterate,
      where the report has "the highest objective function value".
    """
    return hessian_free(
        objective,
        damping=damping.levenberg_marquardt(init=initial_damping),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            stopping=stopping.martens2010(),
            keep=iterates.guarded(interval, tolerance=tolerance, data="batch"),
            warm_start_decay=0.95,
            warm_start_from="best",
        ),
        preconditioner=preconditioners.diagonal(exponent=0.75, kappa=0.0),
        backtracking=backtracking.full_search(cases=evaluated_cases),
        line_search=linesearch.armijo(),
    )


def momentum_like(
    objective: Objective,
    *,
    learning_rate: NumberOrSchedule = 1.0,
    initial_damping: Number = 45.0,
    max_iterations: int = 50,
    limit: NumberOrSchedule | None = None,
    warm_start_decay: NumberOrSchedule = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Set up the report's third recipe: short runs that go on from update to update.

    Small batches, the same for gradient and curvature, and at most 25 to 50 iterations
    that start from the last solution, so that the work on one quadratic is spread over
    many updates, as momentum does:

        value, grads = objective.value_and_grad(params, batch)
        tx.update(grads, state, params, batch=batch)

    The last iterate is the step: no backtracking, no line search; an update that raises
    f on its own batch is rejected. For fine convergence near the end lower
    `learning_rate`, raise `warm_start_decay`, lower `limit`, and let batches grow
    (`hfjax.minibatching.growing`), all by schedules.

    Args:
      objective: f, with its weight decay.
      learning_rate: number or schedule.
      initial_damping: λ before the first update (45: as `martens2010`, for losses
        summed over 784 outputs); it "shrinks reliably towards 0".
      max_iterations: of conjugate gradients (report, section 13: 25 to 50).
      limit: fewer iterations, a number or schedule; `None` is none.
      warm_start_decay: ζ, a number or schedule (report, section 10: 0.95; up to 0.999
        at the end: Sutskever et al. 2013, appendix A.6).

    Returns:
      The transformation, as `hessian_free` returns it.

    References:
      Martens & Sutskever (2012), section 13, third recipe.
    """
    return hessian_free(
        objective,
        learning_rate=learning_rate,
        damping=damping.levenberg_marquardt(init=initial_damping),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            stopping=stopping.martens2010(),
            keep=iterates.every(max_iterations),
            warm_start_decay=warm_start_decay,
            warm_start_from="last",
            limit=limit,
        ),
        preconditioner=preconditioners.diagonal(exponent=0.75, kappa=0.0),
        backtracking=None,
        line_search=None,
    )


def kronecker_factored(
    objective: Objective,
    *,
    initial_damping: Number = 1.0,
    max_iterations: int = 250,
    decay: Number = 0.0,
    interval: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Set up short runs with Kronecker factors as the preconditioner, and λ by search.

    What `hessian_free` does as it comes. Three things of the report's are replaced:

    - the diagonal by `preconditioners.kronecker`;
    - the progress of M, that ends a run, by what an iteration costs
      (`stopping.marginal`); runs start from 0, where a step of the last update would
      first have to be undone;
    - the choice among iterates, and λ by ρ, by the best λ over the subspace of the run
      (`damping.searched`).

    Gradient, curvature and evaluation on the same data, all of it or large batches:

        value, grads = objective.value_and_grad(params, batch)
        tx.update(grads, state, params, batch=batch)

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update. It may be off by orders of magnitude:
        the first update finds its own (1: heuristic).
      max_iterations: of conjugate gradients in an update (250: Martens 2010; the rule
        ended all runs earlier where this was measured). Room is kept for 21 iterates.
      decay: of the factors' running average (0: each batch's own; 0.95 for small
        batches, see `preconditioners.kronecker`).
      interval: updates from one build of the factors to the next.

    Returns:
      The transformation, as `hessian_free` returns it.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> params, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[1.0], [-2.0]]))
      >>> tx = kronecker_factored(f)
      >>> grads = f.value_and_grad(params, batch)[1]
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> after = f.value(params + updates, batch) / f.value(params, batch)
      >>> print(bool(after < 0.02), int(state.info.cg_iterations))
      True 1
    """
    return hessian_free(
        objective,
        damping=damping.searched(init=initial_damping),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            stopping=stopping.marginal(),
            keep=iterates.grid(first=1, growth=1.3),
            warm_start_decay=None,
        ),
        preconditioner=preconditioners.kronecker(decay=decay, interval=interval),
        backtracking="auto",
        line_search=linesearch.armijo(),
    )
