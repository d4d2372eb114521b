"""Run conjugate gradients once and record f along the way, for `hfjax.diagnostics`."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, as_vector
from hfjax._core.types import Batch, Number, Params, Tree
from hfjax._tracing import compiled
from hfjax.curvature import Curvature, ggn
from hfjax.globalization.damping import Damping, levenberg_marquardt
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import check_objective
from hfjax.preconditioners import PreconditionerRule, diagonal
from hfjax.solvers import cg, iterates
from hfjax.update.fitting import check_curvature, check_part
from hfjax.update.point import Point
from hfjax.update.system import Assembled, assemble


class CGRun(NamedTuple):
    """The objective f and its quadratic model M along one run of conjugate gradients.

    Attributes:
      num_iterations: int32 scalar.
      model_values: M at x₀, x₁, …, the last repeated, shape `[max_iterations + 1]`.
      iterations: where f was evaluated, int32, shape `[kept + 1]`: 0 for x₀ comes
        first, and −1 marks unused entries.
      objective_changes: f(θ + x) − f(θ) at these iterates, shape `[kept + 1]`.
      coefficients: for `hfjax.spectrum.ritz_values`.
    """

    num_iterations: jax.Array
    model_values: jax.Array
    iterations: jax.Array
    objective_changes: jax.Array
    coefficients: jax.Array


def cg_run(
    objective: Objective,
    params: Params,
    batch: Batch,
    /,
    *,
    damping: Number,
    rule: Damping = levenberg_marquardt(),
    preconditioner: PreconditionerRule | None = diagonal(),
    curvature: Curvature = ggn,
    x0: Tree | None = None,
    eval_batch: Batch | None = None,
    max_iterations: int = 100,
    interval: int = 1,
    seed: int = 0,
) -> CGRun:
    """Run the conjugate gradients of one update, and evaluate f along the way.

    The run minimises M(x) = ∇fᵀx + ½ xᵀA x with A = B + λD + μS, as `hfjax.hessian_free`
    does, but without a stopping rule. If f(θ + x) rises while M still falls, later
    iterations are wasted, or λ or the batch is too small. Draw the result with
    `plot_cg_run`. All iterates at which f is evaluated are in memory at once.

    Args:
      objective: f.
      params: θ.
      batch: the data for ∇f and the curvature B.
      damping: λ ≥ 0, in units of the curvature of f, for example `state.damping`.
      rule: a damping rule, for D and μ; how it adapts λ does not matter.
      preconditioner: a rule of `hfjax.preconditioners`; `None` is the identity.
      curvature: makes B, a function of `hfjax.curvature`.
      x0: first iterate, like `params`, for example 0.95 · `state.direction`; `None` is 0.
      eval_batch: the data on which f is evaluated; `None` is `batch`. Other data show how
        far the step overfits `batch`.
      max_iterations: a Python integer.
      interval: number of iterations from one evaluation of f to the next.
      seed: for a preconditioner or damping matrix that draws random numbers.

    Returns:
      f and M along the run.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an option is out of range, `rule` adapts a trust-region radius or
        is structural without a `hidden_loss` of `objective`, or `x0` is unlike `params`.

    Example:
      If f is quadratic, M without damping is the change of f:

      >>> import hfjax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
      >>> batch = (x, x @ jnp.array([1.0, -1.0]))
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> run = cg_run(objective, jnp.zeros(2), batch, damping=0.0, preconditioner=None)
      >>> last = run.iterations[run.iterations >= 0].argmax()
      >>> print(jnp.allclose(run.objective_changes[last], run.model_values[-1]))
      True

    References:
      Martens & Sutskever (2012), figure 4 and section 8.7.
    """
    options.check_range("damping", damping, low=0.0)
    check_objective(objective)
    check_part("rule", rule, Damping)
    check_part("preconditioner", preconditioner, PreconditionerRule, none=True)
    check_curvature(objective, rule, curvature)
    if rule.scalar != "damping":
        msg = (
            "`rule` drives the radius of a trust region: conjugate gradients would run "
            "without damping. Pass the default, `rule=hfjax.damping."
            "levenberg_marquardt()`, or `damping.constant(0.0)` and `damping=0.0`."
        )
        raise ValueError(msg)
    params = as_params(params)
    if x0 is not None:
        x0 = as_vector("x0", x0, like=params, whose="`params`")
    dtype = trees.scalar_dtype(params)

    def ran(
        params: Params,
        batch: Batch,
        eval_batch: Batch,
        damping: jax.Array,
        x0: Tree | None,
    ) -> CGRun:
        point = Point(
            objective=objective,
            params=params,
            gradient=objective.value_and_grad(params, batch)[1],
            batch=batch,
            eval_batch=eval_batch,
            scalar=damping,
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
        )
        at = assemble(point, curvature, rule, preconditioner)
        return _run(at, x0, max_iterations, interval)

    eval_batch = batch if eval_batch is None else eval_batch
    return compiled.run(ran, params, batch, eval_batch, jnp.asarray(damping, dtype), x0)


def _run(at: Assembled, x0: Tree | None, max_iterations: int, interval: int) -> CGRun:
    """Run conjugate gradients, and evaluate f."""
    point, system, start = at.point, at.system, None
    if x0 is not None:
        # Solvers work on packed vectors, in float32 or wider.
        start = at.packing.pack(trees.cast_like(x0, trees.widen(point.params)))
    result = cg.solve(
        system.matvec,
        system.b,
        x0=start,
        preconditioner=system.preconditioner(),
        max_iterations=max_iterations,
        stopping=None,
        keep=iterates.every(interval),
    )
    before = point.value(point.eval_batch)
    at_start = before if start is None else system.value(start)
    # One iterate at a time, so that f needs no more memory than in an update.
    after = jax.lax.map(system.value, result.kept.iterates)
    return CGRun(
        num_iterations=result.num_iterations,
        model_values=result.model_values,
        iterations=jnp.append(0, result.kept.iterations),
        objective_changes=jnp.append(at_start, after) - before,
        coefficients=cast("jax.Array", result.coefficients),
    )
