"""A solver maps a scalar to a step: what it is given, and what it returns.

This is the split of optimistix: a *descent* maps a scalar, λ or a radius, to a step, and
a *search* picks the scalar by evidence. Solvers are descents (`hfjax.cg`,
`hfjax.trust_region`, `hfjax.krylov`, `hfjax.sample_space`); damping rules are searches
(`hfjax.damping`). Nothing else knows about λ.
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
    """It has not."""
    STOPPING_RULE = 0
    """The stopping rule was met."""
    RESIDUAL_ZERO = 1
    """‖A x − b‖ is zero, to rounding of ‖b‖."""
    MAX_ITERATIONS = 2
    """The limit was reached."""
    NONPOSITIVE_CURVATURE = 3
    """pᵀA p ≤ 0, or so small that rounding has it; the iterate is kept."""
    NONFINITE = 4
    """b, a product, the preconditioner or the next iterate is not finite; the last that
    was."""
    BOUNDARY = 5
    """The iterates left the trust region; x lies on its boundary."""
    OBJECTIVE_ROSE = 6
    """f, evaluated during the run, had got worse (`hfjax.iterates.guarded`)."""


class Step(NamedTuple):
    """A step, and the path that it is taken along: θ + αδ + α²c.

    Attributes:
      direction: δ, which lowers M.
      model: M(δ), of the run's own λ.
      iteration: int32 scalar, the number of the iterate that it is, or of the run's last.
      correction: c, like δ: what bends the path; no part of M. `None` is 0.
      undamped: M(δ) without any λ, where a search for λ asks for it.
    """

    direction: Tree
    model: jax.Array
    iteration: jax.Array
    correction: Tree | None = None
    undamped: jax.Array | None = None

    def at(self, alpha: jax.Array | None = None) -> Tree:
        """Return αδ + α²c; its slope at α = 0 is that of δ.

        Args:
          alpha: α; `None` is 1, the end of the path.

        Returns:
          A vector like δ.
        """
        if alpha is None:
            bent = self.correction
            return self.direction if bent is None else trees.add(self.direction, bent)
        straight = trees.scale(alpha, self.direction)
        if self.correction is None:
            return straight
        return trees.axpy(alpha**2, self.correction, straight)

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
        # The length of δ itself may be no float.
        return (alpha * size) * jnp.sqrt(trees.dot(unit, unit))


class System(NamedTuple):
    """What a solver is given: M(x) = ½xᵀA x − bᵀx with A = B + λD + μS, and f.

    Vectors are trees of arrays; an update packs the parameters' leaves into few.

    Attributes:
      matvec: v ↦ A v.
      b: −∇f.
      scalar: λ, or the radius of a trust region.
      count: updates so far.
      value: x ↦ f(θ + x) on the evaluation data.
      batch_value: the same on the curvature data.
      value_and_grad: x ↦ (f, ∇f)(θ + x) on the evaluation data.
      preconditioner: `() -> (r ↦ P⁻¹r)`, or `None` of it. P is made where it is called,
        and not at all if it is not: call it once, outside of loops.
      jacobian: `() -> (J̃, weight_decay)`, G written out (`hfjax.sample_space`), made where
        it is called.
      jacobian_size: `() -> (rows, columns, forward)`, its size, and the multiplications of
        a pass forward; Python integers.
      tikhonov: whether A = B + λI, so that the step for another λ can be told from a
        subspace.
    """

    matvec: Matvec
    b: Tree
    scalar: jax.Array
    count: jax.Array
    value: ValueFn
    batch_value: ValueFn
    value_and_grad: ValueAndGradFn
    preconditioner: Callable[[], Preconditioner | None] = lambda: None
    jacobian: Callable[[], tuple[Any, jax.Array]] | None = None
    jacobian_size: Callable[[], tuple[int, int, int]] | None = None
    tikhonov: bool = True


class RunStats(NamedTuple):
    """What is told of a run.

    Attributes:
      num_iterations: int32 scalar.
      reason: int32 scalar, a `Reason`.
      model_values: M after each iteration, shape `[max_iterations + 1]`.
      coefficients: α and β of each iteration of conjugate gradients, shape
        `[max_iterations, 2]`; `None` of solvers that have none.
    """

    num_iterations: jax.Array
    reason: jax.Array
    model_values: jax.Array
    coefficients: jax.Array | None = None


class Run(NamedTuple):
    """What a solver returns.

    Attributes:
      last: the step that it came to.
      stats: of the run.
      iterates: those that were kept, for backtracking; `None` if there is only the last.
      at_damping: another λ ↦ the step for it; `None` of a solver that cannot tell.
      anchor: what steps tend to as λ grows, as momentum's; `None` is 0.
    """

    last: Step
    stats: RunStats
    iterates: Iterates | None = None
    at_damping: Callable[[jax.Array], Step] | None = None
    anchor: Tree | None = None


class Solver(NamedTuple):
    """How an update finds its step.

    Attributes:
      start: `(direction, count) -> x0`, from the direction carried over; or `None`.
      solve: `(system, x0) -> Run`.
      carry: `(run, chosen) -> direction` to carry over to the next update.
      scalar: what it takes `System.scalar` for: a `"damping"` λ; a λ that is to be
        `"fixed"`, as it looks for one by itself; or the `"radius"` of a trust region.
        `hfjax.hessian_free` compares it with the damping rule's.
      reads: `"products"`, A and the preconditioner; or the `"jacobian"`, so that no other
        curvature, no damping matrix and no preconditioner go with it.
      max_iterations: that the state's record of a run has room for; 0 is no record.
    """

    start: Callable[[Tree, jax.Array], Tree | None]
    solve: Callable[[System, Tree | None], Run]
    carry: Callable[[Run, Tree], Tree] = lambda run, chosen: chosen
    scalar: str = "damping"
    reads: str = "products"
    max_iterations: int = 0
