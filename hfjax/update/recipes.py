"""Complete optimizers, each with all options of one published or recommended set-up.

| recipe | gradient | curvature | step | CG stops when |
|---|---|---|---|---|
| `kronecker_factored` | all data | same | best λ over CG subspace | gain is too small |
| `martens2010` | all data | a part | best kept iterate | M stalls |
| `curvature_guarded` | larger batch | a batch | best iterate on other data | f rises |
| `momentum_like` | small batch | same | last iterate | M stalls, or at 50 |
| `stochastic` | small batch | averaged | P⁻¹∇f with momentum | (it is not used) |

Use `kronecker_factored` by default; it is what `hessian_free` does without options. Use
`stochastic` if batches are small and drawn anew in each update. The rest are the three of
Martens & Sutskever (2012), section 13: Gauss-Newton matrix, warm starts, the preconditioner (diag + λ)^0.75, and the Levenberg-Marquardt rule for λ.
Initialise the network well (`hfjax.initializers`). A small weight decay may help if a
schedule turns it off near the end; take `grads` of `objective.at(state.count)` then.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hfjax import preconditioners
from hfjax._core import options
from hfjax._core.types import Number, NumberOrSchedule
from hfjax.globalization import backtracking, damping, linesearch
from hfjax.objectives.objective import Objective
from hfjax.solvers import cg, iterates, stopping
from hfjax.update.transform import hessian_free


def martens2010(
    objective: Objective, *, initial_damping: Number = 45.0, max_iterations: int = 250
) -> optax.GradientTransformationExtraArgs:
    """Reproduce the program published with Martens (2010).

    That program evaluates gradient, preconditioner, iterates and line search on all
    training data, but curvature and ρ on one quarter of the data, taken in turn:

        value, grads = objective.value_and_grad(params, everything)
        tx.update(grads, state, params, batch=quarter, eval_batch=everything)

    Its weight decay, 2e-5 on weights and biases, is an option of `hfjax.Objective`.

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update, in units of the curvature of f. The
        default is for losses that are summed over 784 outputs.
      max_iterations: largest number of CG iterations per update. The default is for deep
        autoencoders from a random start.

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
    # All constants are written out, so that changed defaults elsewhere do not matter.
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
        sampling=None,
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
    """Stop CG when f rises on the curvature batch, and choose the step on other data.

    CG stops as soon as f on the curvature batch is significantly higher than `interval`
    iterations ago. The step is the kept iterate with the lowest f on `eval_batch`, which
    should not contain the curvature batch (but by default is that batch):

        value, grads = objective.value_and_grad(params, larger)
        tx.update(grads, state, params, batch=batch, eval_batch=other)

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update, as in `martens2010`.
      max_iterations: largest number of CG iterations per update.
      interval: number of CG iterations from one evaluation of f to the next.
      tolerance: how much higher is significant, see `hfjax.iterates.guarded`.
      evaluated_cases: number of examples of `eval_batch` on which iterates are compared;
        `None` is all.

    Returns:
      The transformation, as `hessian_free` returns it.

    References:
      Martens & Sutskever (2012), section 13, second recipe, where "the highest objective
      function value" should read "the lowest".
    """
    # The next run starts from the iterate with the lowest f on the curvature batch, not
    # from the step: it is close to the last iterate.
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
        sampling=None,
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
    """Run CG briefly on small batches, each run continuing the one before.

    Gradient and curvature are from the same small batch. A run starts from ζ times the
    last solution and takes at most 25 to 50 iterations, so that the work on one
    quadratic model is spread over many updates, as with momentum:

        value, grads = objective.value_and_grad(params, batch)
        tx.update(grads, state, params, batch=batch)

    The last iterate is the step, without backtracking or line search; it is rejected if
    it raises f on the batch. To converge at the end of training, use schedules that
    lower `learning_rate` and `limit`, raise `warm_start_decay` towards 0.999, and let the
    batch grow (`hfjax.minibatching.growing`).

    Args:
      objective: f, with its weight decay.
      learning_rate: α, a number or schedule.
      initial_damping: λ before the first update, as in `martens2010`.
      max_iterations: largest number of CG iterations per update.
      limit: a lower limit on CG iterations, a number or schedule, or `None`.
      warm_start_decay: ζ, a number or schedule.

    Returns:
      The transformation, as `hessian_free` returns it.

    References:
      Martens & Sutskever (2012), sections 10 and 13, third recipe; Sutskever et al.
      (2013), appendix A.6.
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
        sampling=None,
    )


def kronecker_factored(
    objective: Objective,
    *,
    initial_damping: Number = 1.0,
    max_iterations: int = 250,
    decay: Number = 0.0,
    interval: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Run CG with a Kronecker-factored preconditioner, and search for the best λ.

    This is what `hessian_free` does by default. It differs from the other recipes in
    four ways: the curvature of a large batch is of a part of it, which grows
    (`sampling.growing`); the preconditioner is `preconditioners.kronecker`; a run starts
    from 0 and stops when an iteration gains less than it costs (`stopping.marginal`); step
    and λ are chosen together, with the lowest f over the subspace of the run
    (`damping.searched`).
    Gradient, curvature and f are from the same data, all of it or a large batch:

        value, grads = objective.value_and_grad(params, batch)
        tx.update(grads, state, params, batch=batch)

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update, in units of the curvature of f. It may
        be wrong by orders of magnitude, since the first update corrects it.
      max_iterations: largest number of CG iterations per update, rarely reached.
      decay: of the factors' running average: 0 uses only the current batch; 0.95 is for
        small batches, see `preconditioners.kronecker`.
      interval: number of updates from one computation of the factors to the next.

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
    # No warm start: CG would first have to undo the last step.
    return hessian_free(
        objective,
        damping=damping.searched(init=initial_damping),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            stopping=stopping.marginal(),
            keep=iterates.at_most(6),
            warm_start_decay=None,
        ),
        preconditioner=preconditioners.kronecker(decay=decay, interval=interval),
        backtracking="auto",
        line_search=linesearch.armijo(),
        sampling="auto",
    )


def stochastic(
    objective: Objective,
    learning_rate: NumberOrSchedule = 0.1,
    *,
    damping: NumberOrSchedule = 0.1,
    momentum: Number = 0.9,
    max_change: Number | None = 1e-3,
    decay: Number = 0.95,
    interval: int = 20,
    cases: int | None = 2000,
) -> optax.GradientTransformationExtraArgs:
    """Train on small batches drawn anew in each update: K-FAC with a given learning rate.

        m ← μ m + min(1, √κ / (α √(gᵀP⁻¹g))) P⁻¹g,    θ ← θ − α m

    g is the gradient of the batch, and P of Kronecker factors that are built, and averaged,
    from the batch of every `interval`-th update. Products, a search for λ and values of f
    follow the noise of small batches, so nothing else is computed.

        value, grads = objective.value_and_grad(params, batch)
        tx.update(grads, state, params, batch=batch)

    Near the end lower `learning_rate` by a schedule, or hand over to `hessian_free` on all
    data, which finds λ and the length of its steps by itself.

    Args:
      objective: f, with its weight decay.
      learning_rate: α, a number or a schedule of the number of updates.
      damping: λ, in units of the curvature of f; a number or a schedule. Too small a λ
        amplifies the noise of the batch.
      momentum: μ in [0, 1].
      max_change: κ, the largest δᵀPδ of a step before momentum, in units of f. If the loss
        is −log p, that is about twice the KL divergence from the outputs before the step. The
        default is for some nats an example; raise it for losses that are summed over
        many outputs. `None` for no bound.
      decay: of the average over builds, as in `preconditioners.kronecker`.
      interval: number of updates from one build of the factors to the next.
      cases: number of examples that factors are estimated on at least; `None` for all.

    Returns:
      The transformation, a chain of `scale_by_preconditioner`, `optax.trace` and
      `optax.scale_by_learning_rate`.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an option is out of range.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
      >>> tx = stochastic(f, 0.2, damping=1e-3, max_change=None)
      >>> w, state = jnp.zeros((2, 1)), tx.init(jnp.zeros((2, 1)))
      >>> for n in range(200):
      ...     x = jax.random.normal(jax.random.key(n), (32, 2)) * jnp.logspace(0, 2, 2)
      ...     batch = (x, x @ jnp.array([[1.0], [-2.0]]))
      ...     grads = f.value_and_grad(w, batch)[1]
      ...     updates, state = tx.update(grads, state, w, batch=batch)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w.ravel().round(2))
      [ 1. -2.]

    References:
      Martens & Grosse (2015); Ba, Grosse & Martens (2017), section 5, for κ.
    """
    options.check_range("learning_rate", learning_rate, low=0.0)
    options.check_range("momentum", momentum, low=0.0, high=1.0)
    if max_change is not None:
        options.check_range("max_change", max_change, low=0.0, open_low=True)

    def bound(count: jax.Array) -> jax.Array:
        rate = options.read(learning_rate, count).astype(float)
        return jnp.sqrt(jnp.asarray(max_change, rate.dtype)) / rate

    factors = preconditioners.kronecker(decay=decay, interval=interval, cases=cases)
    scaled = preconditioners.scale_by_preconditioner(
        objective,
        preconditioner=factors,
        damping=damping,
        bound=None if max_change is None else bound,
    )
    rate: Any = learning_rate
    by_rate = optax.scale_by_learning_rate(rate)
    return optax.chain(scaled, optax.trace(momentum), by_rate)
