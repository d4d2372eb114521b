"""A solver maps a scalar to a step: what it is given, and what it returns.

As in optimistix, a *descent* maps a scalar, λ or a radius, to a step, and a *search*
picks the scalar. Solvers are descents (`hfjax.cg`, `hfjax.trust_region`, `hfjax.krylov`,
`hfjax.sample_space`); damping rules are searches (`hfjax.damping`).
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.types import Matvec, Preconditioner, Tree, ValueAndGradFn, ValueFn
from hfjax.solvers.iterates import Iterates


class Reason(enum.IntEnum):
    """Why a run of a solver ended."""

    RUNNING = -1
    """The run has not ended."""
    STOPPING_RULE = 0
    """The stopping rule was met."""
    RESIDUAL_ZERO = 1
    """‖A x − b‖ is zero, to the rounding of ‖b‖."""
    MAX_ITERATIONS = 2
    """The limit on the number of iterations was reached."""
    NONPOSITIVE_CURVATURE = 3
    """pᵀA p is not positive beyond rounding; x stays, except in the first iteration."""
    NONFINITE = 4
    """b, a product, P⁻¹ or the next iterate is not finite; x is the last finite one."""
    BOUNDARY = 5
    """The iterates left the trust region; x lies on its boundary."""
    OBJECTIVE_ROSE = 6
    """f, evaluated during the run, had increased (`hfjax.iterates.guarded`)."""


class Step(NamedTuple):
    """A step, and the path along which it is taken: θ + αδ + α²c.

    Attributes:
      direction: δ, along which M falls.
      model: M(δ), with the λ of the run.
      iteration: int32 scalar, the number of this iterate, or of the last one of the run
        if the step is not an iterate.
      correction: c, like δ, which bends the path; not part of M. `None` is 0.
      undamped: M(δ) without λ, which a search for λ compares; `None` if unknown.
    """

    direction: Tree
    model: jax.Array
    iteration: jax.Array
    correction: Tree | None = None
    undamped: jax.Array | None = None

    def at(self, alpha: jax.Array | None = None) -> Tree:
        """Return αδ + α²c, whose slope at α = 0 is that of αδ.

        Args:
          alpha: α; `None` is 1, the end of the path.

        Returns:
          A vector like δ.
        """
        delta, bent = self.direction, self.correction
        straight = delta if alpha is None else trees.scale(alpha, delta)
        if bent is None:
            return straight
        if alpha is None:
            return trees.add(straight, bent)
        return trees.axpy(alpha**2, bent, straight)

    def length(self, alpha: jax.Array) -> jax.Array:
        """Return ‖αδ + α²c‖.

        Args:
          alpha: α ≥ 0.

        Returns:
          A scalar.
        """
        if self.correction is not None:
            return trees.norm(self.at(alpha))
        unit, size = trees.normalised(trees.widen(self.direction))
        # In this order, because ‖δ‖ may overflow even if α‖δ‖ does not.
        return (alpha * size) * jnp.sqrt(trees.dot(unit, unit))


class System(NamedTuple):
    """What a solver is given: M(x) = ½xᵀA x − bᵀx with A = B + λD + μS, and f.

    Vectors are trees of arrays, into which an update packs the leaves of the parameters.

    Attributes:
      matvec: v ↦ A v.
      b: −∇f.
      scalar: λ, or the radius of a trust region.
      count: the number of updates so far.
      value: x ↦ f(θ + x) on the evaluation data.
      batch_value: x ↦ f(θ + x) on the curvature data.
      value_and_grad: x ↦ (f, ∇f)(θ + x) on the evaluation data.
      preconditioner: `() -> (r ↦ P⁻¹r)`, or `() -> None`. The call builds P, so make it
        once, outside of loops; P is not built without it.
      jacobian: `stored -> (J̃, weight_decay)`; the call computes the Jacobian of
        `hfjax.sample_space`, and stores it if it has at most so many numbers; `None` is
        no limit. `weight_decay` is a number, a vector like `b`, or `None`.
      jacobian_size: `() -> (rows, columns, multiplications of a forward pass)`, as Python
        integers.
      tikhonov: whether D = I, so that steps for other λ can be found in a subspace.
      root: diag(J̃ᵀJ̃) ↦ √D, if D is diagonal and made of that; else `None`.
    """

    matvec: Matvec
    b: Tree
    scalar: jax.Array
    count: jax.Array
    value: ValueFn
    batch_value: ValueFn
    value_and_grad: ValueAndGradFn
    preconditioner: Callable[[], Preconditioner | None] = lambda: None
    jacobian: Callable[[int | None], tuple[Any, Tree | None]] | None = None
    jacobian_size: Callable[[], tuple[int, int, int]] | None = None
    tikhonov: bool = True
    root: Callable[[Tree], Tree] | None = None


class RunStats(NamedTuple):
    """The statistics of a run.

    Attributes:
      num_iterations: int32 scalar.
      reason: int32 scalar, a `Reason`.
      model_values: M after each iteration, shape `[max_iterations + 1]`.
      coefficients: α and β of each iteration of conjugate gradients, shape
        `[max_iterations, 2]`; `None` for other solvers.
    """

    num_iterations: jax.Array
    reason: jax.Array
    model_values: jax.Array
    coefficients: jax.Array | None = None


class Run(NamedTuple):
    """What a solver returns.

    Attributes:
      last: the step at the end of the run.
      stats: the statistics of the run.
      iterates: the kept iterates, for backtracking; `None` if there is only the last.
      at_damping: `λ -> Step` for other λ; `None` if the solver does not support it.
      anchor: the step as λ → ∞, for instance the momentum; `None` is 0.
    """

    last: Step
    stats: RunStats
    iterates: Iterates | None = None
    at_damping: Callable[[jax.Array], Step] | None = None
    anchor: Tree | None = None


class Solver(NamedTuple):
    """How an update finds its step.

    Attributes:
      start: `(direction, count) -> x0`, given the direction carried over; may return
        `None`.
      solve: `(system, x0) -> Run`.
      carry: `(run, chosen) -> direction` to carry over to the next update.
      scalar: what the solver takes `System.scalar` for: `"damping"`, λ; `"fixed"`, a λ
        that must not be adapted, because the solver searches over λ itself; or
        `"radius"`, the radius of a trust region. `hfjax.hessian_free` compares it with
        the damping rule.
      reads: `"products"`, A and the preconditioner; or `"jacobian"`, so that no
        preconditioner and no other curvature or damping matrix can be used.
      max_iterations: the number of iterations that the record in the state has space for;
        0 keeps no record.
    """

    start: Callable[[Tree, jax.Array], Tree | None]
    solve: Callable[[System, Tree | None], Run]
    carry: Callable[[Run, Tree], Tree] = lambda run, chosen: chosen
    scalar: str = "damping"
    reads: str = "products"
    max_iterations: int = 0
