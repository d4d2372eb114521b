"""The loop of preconditioned conjugate gradients, on a right-hand side near 1.

`hfjax.cg` is the room to use; here is its algorithm, named as in the report.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _tree
from hfjax._types import Matvec, Preconditioner, Tree
from hfjax.iterates import Keeper, Kept
from hfjax.stopping import Progress, StoppingRule


class Reason(enum.IntEnum):
    """Why a run of conjugate gradients ended."""

    RUNNING = -1
    """It has not."""
    STOPPING_RULE = 0
    """The stopping rule was met."""
    RESIDUAL_ZERO = 1
    """‖A x − b‖ is zero, to rounding of ‖b‖."""
    MAX_ITERATIONS = 2
    """The limit was reached."""
    NONPOSITIVE_CURVATURE = 3
    """pᵀA p ≤ 0: A is not positive definite; the iterate is kept."""
    NONFINITE = 4
    """b, a product or the preconditioner is not finite; the last iterate that was."""
    BOUNDARY = 5
    """The iterates left the trust region; x lies on its boundary."""
    OBJECTIVE_ROSE = 6
    """f, evaluated during the run, had got worse (`hfjax.iterates.guarded`)."""


class Region(NamedTuple):
    """A trust region, {x : xᵀP x ≤ radius²}.

    Attributes:
      radius: r > 0.
      norm: v ↦ P v.
    """

    radius: jax.Array
    norm: Matvec


class Problem(NamedTuple):
    """What stays the same through a run."""

    matvec: Matvec
    precondition: Preconditioner
    b: Tree
    rhs_norm: jax.Array
    size: jax.Array
    max_iterations: int  # Sizes the history of M.
    limit: jax.Array | int  # At most that; may be traced.
    min_iterations: int
    stopping: StoppingRule | None
    keeper: Keeper
    region: Region | None = None


class State(NamedTuple):
    """What changes, named as in algorithm 2: x, r, p and rᵀy with y = P⁻¹r."""

    i: jax.Array
    x: Tree
    r: Tree
    p: Tree
    ry: jax.Array
    model_values: jax.Array
    kept: Kept
    reason: jax.Array


def run(problem: Problem, x0: Tree | None) -> State:
    """Run algorithm 2 from `x0`, or from 0."""
    return jax.lax.while_loop(
        lambda state: state.reason == Reason.RUNNING,
        lambda state: _step(problem, state),
        _start(problem, x0),
    )


def _start(problem: Problem, x0: Tree | None) -> State:
    b = problem.b
    if x0 is None:
        x, r = jax.tree.map(jnp.zeros_like, b), jax.tree.map(jnp.negative, b)
        model = jnp.zeros((), problem.size.dtype)
    else:
        x, product = x0, problem.matvec(x0)
        r = jax.tree.map(jnp.subtract, product, b)
        model = 0.5 * _tree.dot(x, product) - _tree.dot(b, x)
    y = problem.precondition(r)
    ry = _tree.dot(r, y)
    i = jnp.zeros((), jnp.int32)
    model_values = jnp.full(problem.max_iterations + 1, model)
    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(jnp.isfinite(ry) & jnp.isfinite(model), reason, Reason.NONFINITE)
    kept = problem.keeper.init(_tree.scale(problem.size, x))
    p = jax.tree.map(jnp.negative, y)
    return State(i, x, r, p, ry, model_values, kept, reason)


def _step(problem: Problem, state: State) -> State:
    product = problem.matvec(state.p)
    curvature = _tree.dot(state.p, product)
    positive = (curvature > 0) & (state.ry > 0)
    alpha = jnp.where(positive, state.ry / jnp.where(positive, curvature, 1), 1)
    finite = jnp.isfinite(curvature) & jnp.isfinite(state.ry) & jnp.isfinite(alpha)
    moves = finite & (positive | ((state.i == 0) & (state.ry > 0)))
    leaves = jnp.zeros((), bool)
    if problem.region is not None:
        # Down a direction of negative curvature, too, the boundary is the best point.
        moves = finite & (state.ry > 0)
        alpha, leaves = _within(problem.region, state, alpha, positive)
    i = state.i + moves

    # `select`, not alpha = 0: what is not finite must not touch x.
    x = _tree.select(moves, _tree.axpy(alpha, state.p, state.x), state.x)
    r = _tree.axpy(alpha, product, state.r)
    y = problem.precondition(r)
    ry = _tree.dot(r, y)
    beta = ry / jnp.where(state.ry > 0, state.ry, 1)
    p = _tree.axpy(beta, state.p, jax.tree.map(jnp.negative, y))

    gain = jnp.where(moves, alpha * state.ry - 0.5 * alpha**2 * curvature, 0)
    model = state.model_values[state.i] - gain
    later = jnp.arange(problem.max_iterations + 1) >= i
    model_values = jnp.where(later, model, state.model_values)

    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(positive, reason, Reason.NONPOSITIVE_CURVATURE)
    reason = jnp.where(leaves, Reason.BOUNDARY, reason)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    is_last = reason != Reason.RUNNING
    kept = problem.keeper.update(state.kept, i, _tree.scale(problem.size, x), is_last)
    worse = (reason == Reason.RUNNING) & problem.keeper.stop(kept, i)
    reason = jnp.where(worse, Reason.OBJECTIVE_ROSE, reason).astype(jnp.int32)
    return State(i, x, r, p, ry, model_values, kept, reason)


def _judge(
    problem: Problem, i: jax.Array, r: Tree, model_values: jax.Array
) -> jax.Array:
    """Return why to stop after iteration i, or RUNNING."""
    norm = jnp.sqrt(_tree.dot(r, r))
    met = jnp.zeros((), bool)
    if problem.stopping is not None:
        progress = Progress(i, model_values, norm, problem.rhs_norm)
        met = (i >= problem.min_iterations) & problem.stopping(progress)
    rounding = jnp.finfo(norm.dtype).eps * problem.rhs_norm
    reason = jnp.where(met, Reason.STOPPING_RULE, Reason.RUNNING)
    reason = jnp.where(i >= problem.limit, Reason.MAX_ITERATIONS, reason)
    reason = jnp.where(norm <= rounding, Reason.RESIDUAL_ZERO, reason)
    return reason.astype(jnp.int32)


def _within(
    region: Region, state: State, alpha: jax.Array, positive: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Shorten α to the region's boundary where x + αp is beyond, or M falls for ever.

    Steihaug and Toint: τ > 0 with ‖x + τp‖_P = r.
    """
    norm_p, norm_x = region.norm(state.p), region.norm(state.x)
    pp, xp = _tree.dot(state.p, norm_p), _tree.dot(state.x, norm_p)
    room = jnp.maximum(region.radius**2 - _tree.dot(state.x, norm_x), 0)
    root = jnp.sqrt(xp**2 + pp * room)
    # Of the two forms of the root, the one that subtracts nothing.
    tau = jnp.where(xp > 0, room / (xp + root), (root - xp) / jnp.where(pp > 0, pp, 1))
    leaves = ~positive | (alpha >= tau)
    return jnp.where(leaves, tau, alpha), leaves
