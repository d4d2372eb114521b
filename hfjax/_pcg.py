"""The loop of preconditioned conjugate gradients, on a right-hand side near 1.

`hfjax.cg` and `hfjax.trust_region` are the rooms to use; here is their algorithm, named
as in the report.
"""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _sharding, _tree
from hfjax._path import Solution
from hfjax._types import Matvec, Preconditioner, Tree, exact_of
from hfjax.iterates import Keeper, Kept
from hfjax.stopping import Progress, StoppingRule

_SHORTEST = 1e-30
"""Radius, in units of b and of P⁻¹b, below which nothing but b matters."""


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
    """pᵀA p ≤ 0, or so small that rounding has it; the iterate is kept."""
    NONFINITE = 4
    """b, a product, the preconditioner or the next iterate is not finite; the last that
    was."""
    BOUNDARY = 5
    """The iterates left the trust region; x lies on its boundary."""
    OBJECTIVE_ROSE = 6
    """f, evaluated during the run, had got worse (`hfjax.iterates.guarded`)."""


class CGResult(NamedTuple):
    """What a run of conjugate gradients found.

    Attributes:
      x: the last iterate, like `b`.
      num_iterations: int32 scalar, how many iterates follow x₀.
      model_values: shape `[max_iterations + 1]`, float32 or wider: M at x₀, x₁, …;
        entries past the last repeat it.
      kept: the kept iterates.
      reason: int32 scalar, a `Reason`.
      coefficients: shape `[max_iterations, 2]`, like `model_values`: α and β of each
        iteration, which make the tridiagonal matrix of Lanczos
        (`hfjax.spectrum.ritz_values`); zeros from where there is no more of it.
        `None` of solvers that have none.
      other: of a solver that knows it: another λ ↦ the `Solution` with it. `None` else;
        no part of a result that leaves `jit`.
      pulled: whether λ pulls steps towards another than 0, as with momentum.
      correction: as in `Solution`, of `x`.
    """

    x: Tree
    num_iterations: jax.Array
    model_values: jax.Array
    kept: Kept
    reason: jax.Array
    coefficients: jax.Array | None = None
    other: Callable[[jax.Array], Solution] | None = None
    pulled: bool = False
    correction: Tree | None = None


class Record(NamedTuple):
    """What a state keeps of the last run, where its solver is told to `record`.

    Attributes:
      model_values: as in `CGResult`; 0 where one is not finite.
      coefficients: as in `CGResult`, for `hfjax.spectrum.ritz_values`.
    """

    model_values: jax.Array
    coefficients: jax.Array


class Region(NamedTuple):
    """A trust region, {x : xᵀQ x ≤ radius²}.

    Attributes:
      radius: r > 0.
      norm: v ↦ Q v; `None` is the preconditioner's own P.
    """

    radius: jax.Array
    norm: Matvec | None


class Problem(NamedTuple):
    """What stays the same through a run."""

    matvec: Matvec
    precondition: Preconditioner
    b: Tree
    of_b: Tree  # P⁻¹b
    rhs_norm: jax.Array
    x_size: jax.Array  # x is in units of it.
    max_iterations: int  # Sizes the history of M.
    limit: jax.Array | int  # At most that; may be traced.
    min_iterations: int
    stopping: StoppingRule | None
    keeper: Keeper
    region: Region | None = None
    replace_every: int | None = None
    exact: Matvec = lambda v: v  # By which the residual is replaced.


class State(NamedTuple):
    """What changes, named as in algorithm 2: x, r, p and rᵀy with y = P⁻¹r.

    `lengths` are xᵀPx, xᵀPp and pᵀPp by their recurrences, as P itself is not at hand
    (Conn, Gould & Toint 2000, section 7.5.1); from x₀ = 0. In a region x is in units of
    its radius there, whose square may be no float. `steepest` is the largest pᵀAp / pᵀPp
    so far.
    """

    i: jax.Array
    x: Tree
    r: Tree
    p: Tree
    ry: jax.Array
    model_values: jax.Array
    kept: Kept
    reason: jax.Array
    lengths: tuple[jax.Array, jax.Array, jax.Array]
    steepest: jax.Array
    coefficients: jax.Array


def run(
    matvec: Matvec,
    b: Tree,
    x0: Tree | None,
    preconditioner: Preconditioner | None,
    keeper: Keeper,
    *,
    max_iterations: int,
    limit: jax.Array | int,
    min_iterations: int,
    stopping: StoppingRule | None,
    region: Region | None = None,
    replace_every: int | None = None,
) -> CGResult:
    """Run algorithm 2 on A x = b from `x0`, or from 0; within a region from 0 only."""
    # All runs on b / size: a power of two, so exact, and the squares of tiny or huge
    # right-hand sides stay in range (0/0 after underflow elsewhere: jax#40254).
    scaled, size = _tree.normalised(b)
    size = jnp.where(jnp.isfinite(size), size, 1)
    precondition, of_b, p_size = _of_unit_size(preconditioner, scaled)
    x_size = size
    if region is not None:
        stretch = jnp.sqrt(p_size) if region.norm is None else 1
        given = jnp.asarray(region.radius, size.dtype) * stretch
        radius = jnp.clip(given / size, _SHORTEST, 1 / _SHORTEST)
        region = region._replace(radius=radius)
        # Beside one as short as that there is no curvature: the step is b, cut short.
        x_size = jnp.where(given / size < _SHORTEST, given / _SHORTEST, size)
    problem = Problem(
        matvec=matvec,
        precondition=precondition,
        b=scaled,
        of_b=of_b,
        rhs_norm=jnp.sqrt(_tree.dot(scaled, scaled)),
        x_size=x_size,
        max_iterations=max_iterations,
        limit=limit,
        min_iterations=min_iterations,
        stopping=stopping,
        keeper=keeper,
        region=region,
        replace_every=replace_every,
        exact=matvec if replace_every is None else exact_of(matvec),
    )
    end = jax.lax.while_loop(
        lambda state: state.reason == Reason.RUNNING,
        lambda state: _step(problem, state),
        _start(problem, None if x0 is None else _tree.scale(1 / size, x0)),
    )
    coefficients = end.coefficients
    if replace_every is not None:  # Lanczos' matrix ends there.
        coefficients = coefficients.at[replace_every:].set(0)
    return CGResult(
        x=_tree.scale(x_size, end.x),
        num_iterations=end.i,
        model_values=size * (x_size * end.model_values),  # size² may be no float.
        kept=end.kept,
        reason=end.reason,
        # With P⁻¹ / p_size in place of P⁻¹, α is p_size times as large.
        coefficients=coefficients.at[:, 0].divide(p_size),
    )


def _start(problem: Problem, x0: Tree | None) -> State:
    b = problem.b
    if x0 is None:
        x, r = _sharding.zeros_like(b), jax.tree.map(jnp.negative, b)
        model = jnp.zeros((), problem.x_size.dtype)
        y = jax.tree.map(jnp.negative, problem.of_b)
    else:
        x, (r, model) = x0, _afresh(problem, x0)
        y = problem.precondition(r)
    ry = _tree.dot(r, y)
    i = jnp.zeros((), jnp.int32)
    model_values = jnp.full(problem.max_iterations + 1, model)
    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(jnp.isfinite(ry) & jnp.isfinite(model), reason, Reason.NONFINITE)
    model_values = jnp.where(jnp.isnan(model_values), jnp.inf, model_values)
    kept = problem.keeper.init(_tree.scale(problem.x_size, x))
    p = jax.tree.map(jnp.negative, y)
    lengths = (jnp.zeros_like(ry), jnp.zeros_like(ry), ry)
    steepest = jnp.zeros_like(ry)
    coefficients = jnp.full((problem.max_iterations, 2), jnp.zeros_like(model))
    return State(
        i, x, r, p, ry, model_values, kept, reason, lengths, steepest, coefficients
    )


def _step(problem: Problem, state: State) -> State:
    product = problem.matvec(state.p)
    curvature = _tree.dot(state.p, product)
    positive = (curvature > 0) & (state.ry > 0)
    slope = state.ry
    if problem.replace_every is not None:
        # −rᵀp is rᵀy only where r is orthogonal to the last p: without this, what
        # replacing brings in grows without bound.
        slope = -_tree.dot(state.r, state.p)
    alpha = jnp.where(positive, slope / jnp.where(positive, curvature, 1), 1)
    finite = jnp.isfinite(curvature) & jnp.isfinite(state.ry)
    # None, too, is curvature so small that α is no float, or that the rounding of p has
    # it: down the null space of A, where b is not of its range.
    pp = state.lengths[2]
    steepest = jnp.maximum(state.steepest, curvature / jnp.where(pp > 0, pp, 1))
    rounding = jnp.square(8 * jnp.finfo(pp.dtype).eps)
    positive &= jnp.isfinite(alpha) & (curvature > rounding * steepest * pp)
    alpha = jnp.where(positive, alpha, 1)
    lanczos = jnp.where(positive & finite, alpha, 0)
    moves = finite & (positive | ((state.i == 0) & (state.ry > 0)))
    leaves = jnp.zeros((), bool)
    if problem.region is not None:
        # Down a direction of negative curvature, too, the boundary is the best point.
        moves = finite & (state.ry > 0)
        alpha, leaves = _within(problem.region, state, alpha, positive)
    beyond = _tree.axpy(alpha, state.p, state.x)
    finite &= ~moves | _tree.is_finite(
        _tree.scale(problem.x_size, _tree.maxima(beyond))
    )
    moves &= finite
    i = state.i + moves.astype(state.i.dtype)

    # `select`, not alpha = 0: what is not finite must not touch x.
    x = _tree.select(moves, beyond, state.x)
    r = _tree.axpy(alpha, product, state.r)
    # Not α²: of curvature 1e-30 or 1e30 it is no float32.
    gain = alpha * (slope - 0.5 * (alpha * curvature))
    gain = jnp.where(moves, gain, 0)
    model = state.model_values[state.i] - gain
    due = None
    if problem.replace_every is not None:
        due = moves & (i % problem.replace_every == 0)
        r, fresh = jax.lax.cond(due, lambda: _afresh(problem, x), lambda: (r, model))
        finite &= jnp.isfinite(fresh)
        model = jnp.where(finite, fresh, model)
    y = problem.precondition(r)
    ry = _tree.dot(r, y)
    beta = ry / jnp.where(state.ry > 0, state.ry, 1)
    if due is not None:
        # The same number where r is the recurrence's. Beside a far smaller one of before,
        # ry / state.ry would make the next p the old one, and again.
        conjugate = _tree.dot(y, product) / jnp.where(positive, curvature, 1)
        beta = jnp.where(due, conjugate, beta)
    p = _tree.axpy(beta, state.p, jax.tree.map(jnp.negative, y))
    later = jnp.arange(problem.max_iterations + 1, dtype=i.dtype) >= i
    model_values = jnp.where(later, model, state.model_values)

    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(positive, reason, Reason.NONPOSITIVE_CURVATURE)
    reason = jnp.where(leaves, Reason.BOUNDARY, reason)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    is_last = reason != Reason.RUNNING
    kept = problem.keeper.update(state.kept, i, _tree.scale(problem.x_size, x), is_last)
    worse = (reason == Reason.RUNNING) & problem.keeper.stop(kept, i)
    reason = jnp.where(worse, Reason.OBJECTIVE_ROSE, reason).astype(jnp.int32)
    xx, xp, pp = state.lengths
    ahead = alpha if problem.region is None else alpha / problem.region.radius
    lengths = (
        xx + ahead * (2 * xp + ahead * pp),
        beta * (xp + ahead * pp),
        ry + beta**2 * pp,
    )
    found = jnp.stack([lanczos, jnp.where(lanczos > 0, beta, 0)])
    numbers = jnp.arange(problem.max_iterations, dtype=i.dtype)
    here = numbers[:, None] == state.i
    coefficients = jnp.where(here, found[None], state.coefficients)
    return State(
        i, x, r, p, ry, model_values, kept, reason, lengths, steepest, coefficients
    )


def _afresh(problem: Problem, x: Tree) -> tuple[Tree, jax.Array]:
    """Return A x − b and M(x) by a product."""
    product = problem.exact(x)
    r = jax.tree.map(jnp.subtract, product, problem.b)
    return r, 0.5 * _tree.dot(x, product) - _tree.dot(problem.b, x)


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

    Steihaug and Toint: τ > 0 with ‖x + τp‖ = r.
    """
    xx, xp, pp = state.lengths
    if region.norm is not None:
        x = _tree.scale(1 / region.radius, state.x)
        norm_p = region.norm(state.p)
        pp, xp = _tree.dot(state.p, norm_p), _tree.dot(x, norm_p)
        xx = _tree.dot(x, region.norm(x))
    # In units of the radius and of ‖p‖, whose squares may leave float32.
    length = jnp.sqrt(jnp.where(pp > 0, pp, 1))
    cosine = xp / length
    room = jnp.maximum(1 - xx, 0)
    root = jnp.sqrt(cosine**2 + room)
    # Of the two forms of the root, the one that subtracts nothing.
    tau = jnp.where(cosine > 0, room / (cosine + root), root - cosine)
    tau = region.radius * (tau / length)
    leaves = (~positive | (alpha >= tau)) & (state.ry > 0)
    return jnp.where(leaves, tau, alpha), leaves


def _of_unit_size(
    preconditioner: Preconditioner | None, b: Tree
) -> tuple[Preconditioner, Tree, jax.Array | int]:
    """Scale P⁻¹, whose scale does not matter, so that P⁻¹b is near 1.

    Returns it, P⁻¹b and the scale. From x₀ one application more in a run; else rᵀP⁻¹r
    of a P far from 1 leaves float32.
    """
    if preconditioner is None:
        return lambda r: r, b, 1
    of_b = preconditioner(b)
    size = _tree.magnitude(of_b)
    size = jnp.where(jnp.isfinite(size), size, 1)

    def precondition(r: Tree) -> Tree:
        return _tree.scale(1 / size, preconditioner(r))

    return precondition, _tree.scale(1 / size, of_b), size
