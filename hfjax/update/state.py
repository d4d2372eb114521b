"""What an update hands to the next, and what it tells people.

The two are kept apart: `HessianFreeState.info` is the only part that no code reads
back.
"""

import enum
from typing import NamedTuple

import jax

from hfjax._core.types import Params, Tree


class Record(NamedTuple):
    """What a state keeps of the last run of conjugate gradients.

    Attributes:
      model_values: M at the start and after each iteration, shape `[max_iterations + 1]`;
        0 where one is not finite.
      coefficients: α and β of each iteration, shape `[max_iterations, 2]`, for
        `hfjax.spectrum.ritz_values`; 0 from the last iteration on.
    """

    model_values: jax.Array
    coefficients: jax.Array


class Rejection(enum.IntEnum):
    """Why an update was rejected: its updates are zero, the parameters stay."""

    NONE = 0
    """It was accepted."""
    NONFINITE_GRADIENT = 1
    """The gradient handed in holds NaN or infinity."""
    ZERO_GRADIENT = 2
    """The gradient is zero: there is nothing to do; λ stays."""
    NONFINITE_PRODUCT = 3
    """A curvature product, the preconditioner, M or the step became NaN or infinite."""
    NONFINITE_VALUE = 4
    """f at the parameters, or at every candidate, is NaN or infinite."""
    NO_DESCENT = 5
    """The step does not point downhill: ∇fᵀδ ≥ 0."""
    NO_DECREASE = 6
    """The line search found no step that lowers f enough."""


class HessianFreeInfo(NamedTuple):
    """What the last update did; for people, no code reads it back.

    Scalars, and finite: where a quantity is not, its sentinel stands in.

    Attributes:
      value_before: f(θ) on the evaluation data (sentinel 0).
      value_after: f at the new parameters, on the same data (sentinel 0).
      reduction_ratio: ρ (sentinel −1e9, also for −∞).
      predicted_change: M(δ), which ρ divides by (sentinel 0).
      cg_iterations: int32.
      cg_reason: int32, an `hfjax.cg.Reason`.
      chosen_iteration: int32, the CG iterate that became the step; the last one's number
        where the search for λ made the step of several.
      step_size: α, with the learning rate in it; 0 if rejected.
      accepted: bool.
      rejection: int32, a `Rejection`.
      gradient_norm: ‖∇f‖ as handed in (sentinel 0).
      update_norm: ‖αδ‖, or ‖αδ + α²c‖ of a corrected step; 0 if rejected.
    """

    value_before: jax.Array
    value_after: jax.Array
    reduction_ratio: jax.Array
    predicted_change: jax.Array
    cg_iterations: jax.Array
    cg_reason: jax.Array
    chosen_iteration: jax.Array
    step_size: jax.Array
    accepted: jax.Array
    rejection: jax.Array
    gradient_norm: jax.Array
    update_norm: jax.Array


class HessianFreeState(NamedTuple):
    """What the next update needs, and what the last one did.

    Attributes:
      count: int32 scalar, updates so far.
      damping: λ, or the radius of a trust region; a scalar in float32 or the
        parameters' widest dtype; read it with
        `optax.tree.get(state, "damping")`, set it with `optax.tree.set`.
      direction: like the parameters, in float32 or wider: what conjugate gradients
        found last, for the warm start; δ where runs start from 0.
      preconditioner: what it hands to the next update, or `None`.
      record: of the last run of conjugate gradients; `None` of other solvers; for people,
        as `info`.
      info: what the last update did.

    Example:
      Set λ, and read it:

      >>> import hfjax, jax.numpy as jnp, optax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> state = hfjax.hessian_free(f).init(jnp.zeros(1))
      >>> state = optax.tree.set(state, damping=jnp.float32(0.5))
      >>> print(optax.tree.get(state, "damping"), Rejection(int(state.info.rejection)))
      0.5 0
    """

    count: jax.Array
    damping: jax.Array
    direction: Params
    preconditioner: Tree
    record: Record | None
    info: HessianFreeInfo
