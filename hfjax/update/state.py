"""The optimizer state: what the next update needs, and a report on the last one.

The next update does not read the report, `info` and `record`: it is for users only.
"""

import enum
from typing import NamedTuple

import jax

from hfjax._core.types import Params, Tree


class Record(NamedTuple):
    """A record of the last run of conjugate gradients.

    Attributes:
      model_values: M at the start and after each iteration, shape `[max_iterations + 1]`;
        0 replaces values that are not finite.
      coefficients: α and β of each iteration, shape `[max_iterations, 2]`, 0 after the
        last iteration; for `hfjax.spectrum.ritz_values`.
    """

    model_values: jax.Array
    coefficients: jax.Array


class Sample(NamedTuple):
    """Which cases of the batch the curvature of the next update is computed from.

    Attributes:
      share: of all cases, from 0, as few as the rule allows, to 1.
      turn: the first of the batch's microbatches that it takes.
      agreement: the running mean of q in `hfjax.sampling.growing`; −1 before the first.
    """

    share: jax.Array
    turn: jax.Array
    agreement: jax.Array


class Rejection(enum.IntEnum):
    """Why an update was rejected, so that the parameters stay as they are."""

    NONE = 0
    """The update was accepted."""
    NONFINITE_GRADIENT = 1
    """`grads` holds NaN or infinity."""
    ZERO_GRADIENT = 2
    """`grads` is zero: there is nothing to do, and λ stays as it is."""
    NONFINITE_PRODUCT = 3
    """A curvature-vector product, P⁻¹, M or the step is NaN or infinite."""
    NONFINITE_VALUE = 4
    """f is NaN or infinite at the parameters, or at every candidate step."""
    NO_DESCENT = 5
    """The step does not point downhill: ∇fᵀδ ≥ 0."""
    NO_DECREASE = 6
    """The line search found no step that lowers f enough."""


class HessianFreeInfo(NamedTuple):
    """What the last update did, for users: no code reads it.

    All fields are finite scalars: 0 replaces values that are not finite.

    Attributes:
      value_before: f(θ) on the evaluation data.
      value_after: f at the new parameters, on the same data.
      reduction_ratio: ρ, the change of f divided by `predicted_change`; 1 if both are
        below the rounding error of f, otherwise −1e9 if the update was rejected.
      predicted_change: M(δ), the change of f that the quadratic model predicts.
      cg_iterations: number of CG iterations, int32.
      cg_reason: why CG ended, int32, an `hfjax.cg.Reason`.
      chosen_iteration: the CG iterate that became the step, int32; the last one if a
        search for λ combined several iterates.
      step_size: α, including the learning rate; 0 if rejected.
      accepted: whether the step was taken, bool.
      rejection: why it was not, int32, a `Rejection`.
      gradient_norm: ‖∇f‖, the norm of `grads`.
      update_norm: norm of the update αδ, or αδ + α²c with a correction c; 0 if rejected.

    References:
      Martens & Sutskever (2012), section 8.5 for ρ, section 8.8 for α.
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
    """The state of `hfjax.hessian_free`.

    Attributes:
      count: number of updates so far, an int32 scalar.
      damping: λ, or the radius of a trust region, for the next update; a scalar in
        float32 or the parameters' widest dtype. Read it with
        `optax.tree.get(state, "damping")`, and set it with `optax.tree.set`.
      direction: a tree like the parameters, in float32 or wider, from which the next
        run of CG starts if the solver uses warm starts.
      preconditioner: what the preconditioner keeps between updates, or `None`.
      scales: of the weights of a sum in the next update, shape `[terms]`, if its terms
        are balanced (`hfjax.objective.weighted_sum`), or `None`.
      sample: the cases of the next update's curvature, or `None` if it takes all.
      record: a record of the last run of CG, for users; `None` for other solvers.
      info: what the last update did, for users.

    Example:
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
    scales: jax.Array | None
    sample: Sample | None
    record: Record | None
    info: HessianFreeInfo
