"""One run of conjugate gradients looked at; `hfjax.diagnostics` is the module to use."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, as_vector, describe
from hfjax._core.types import Batch, Number, Params, Tree
from hfjax._tracing import compiled
from hfjax.curvature import Curvature, ggn
from hfjax.globalization.damping import Damping, levenberg_marquardt
from hfjax.objectives.objective import Objective
from hfjax.preconditioners import PreconditionerRule, diagonal
from hfjax.solvers import cg, iterates
from hfjax.update.fitting import check_curvature, check_part
from hfjax.update.system import Point, assemble


class CGRun(NamedTuple):
    """f and M along one run of conjugate gradients.

    Attributes:
      num_iterations: int32 scalar.
      model_values: M at x₀, x₁, …, shape `[max_iterations + 1]`, the last repeated.
      iterations: int32, shape `[kept + 1]`, where f was evaluated, first at x₀; −1 where
        it was not.
      objective_changes: f(θ + x) − f(θ) there, shape `[kept + 1]`.
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
    """Run the conjugate gradients of an update, and evaluate f as they go.

    For looking at: where f turns while M still falls, iterations are wasted, λ is too
    small, or the batch is. It takes no stopping rule, and a value of f for each kept
    iterate, all of which are in memory at once.

    Args:
      objective: f, with its weight decay.
      params: θ.
      batch: what gradient and curvature are taken on.
      damping: λ, as `state.damping`.
      rule: whose D and μ to take; its rule for λ does not matter.
      preconditioner: of `hfjax.preconditioners`; `None` is the identity.
      curvature: of `hfjax.curvature`.
      x0: where to start, as 0.95 · `state.direction`; `None` is 0.
      eval_batch: on which f is evaluated; `None` is `batch`. Data that the run has not
        seen show how far it overfits.
      max_iterations: a Python integer; heuristic.
      interval: evaluate f at every so many iterations.
      seed: for a preconditioner or damping matrix that draws random numbers.

    Returns:
      The run.

    Raises:
      TypeError: if a count is no Python integer, or an argument is not of its kind.
      ValueError: if an option is out of range, if `rule` drives a radius, if it is
        structural and `objective` has no `hidden_loss`, or if `x0` is no tree like
        `params`.

    Example:
      Where f is quadratic, M without damping is f's change:

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
    if not isinstance(objective, Objective):
        msg = f"`objective` must be an `hfjax.Objective`, got {describe(objective)}."
        raise TypeError(msg)
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
        return _run(
            point, curvature, rule, preconditioner, x0, max_iterations, interval
        )

    eval_batch = batch if eval_batch is None else eval_batch
    return compiled.run(ran, params, batch, eval_batch, jnp.asarray(damping, dtype), x0)


def _run(
    point: Point,
    curvature: Curvature,
    rule: Damping,
    preconditioner: PreconditionerRule | None,
    x0: Tree | None,
    max_iterations: int,
    interval: int,
) -> CGRun:
    """Run, and evaluate f."""
    at = assemble(point, curvature, rule, preconditioner)
    system, start = at.system, None
    if x0 is not None:
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
    after = jax.lax.map(system.value, result.kept.iterates)
    return CGRun(
        num_iterations=result.num_iterations,
        model_values=result.model_values,
        iterations=jnp.append(0, result.kept.iterations),
        objective_changes=jnp.append(at_start, after) - before,
        coefficients=cast("jax.Array", result.coefficients),
    )
