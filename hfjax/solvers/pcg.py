"""The loop of preconditioned conjugate gradients, on a right-hand side near 1.

`hfjax.cg` and `hfjax.trust_region` are the modules to use; this is the report's algorithm
2 as they share it. Its options are hooks (`hfjax.solvers.pcg_hooks`), chosen when the program is
built.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.arguments import as_product
from hfjax._core.types import Matvec, Preconditioner, Tree, exact_of
from hfjax.solvers.descent import Reason
from hfjax.solvers.iterates import Keeper, Kept
from hfjax.solvers.pcg_hooks import (
    Lengths,
    Line,
    Recurrence,
    Region,
    Replacement,
    Residual,
    Unbounded,
    by_product,
)
from hfjax.solvers.stopping import Progress, StoppingRule

_SHORTEST = 1e-30
"""Radius, in units of b and of P⁻¹b, below which nothing but b matters."""


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
    """

    x: Tree
    num_iterations: jax.Array
    model_values: jax.Array
    kept: Kept
    reason: jax.Array
    coefficients: jax.Array


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
    bounds: Unbounded | Region
    residuals: Recurrence | Replacement


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
    scaled, size = trees.normalised(b)
    size = jnp.where(jnp.isfinite(size), size, 1)
    precondition, of_b, p_size = _of_unit_size(preconditioner, scaled)
    x_size, bounds = size, Unbounded()
    if region is not None:
        stretch = jnp.sqrt(p_size) if region.norm is None else 1
        given = jnp.asarray(region.radius, size.dtype) * stretch
        radius = jnp.clip(given / size, _SHORTEST, 1 / _SHORTEST)
        bounds = region._replace(radius=radius)
        # Beside one as short as that there is no curvature: the step is b, cut short.
        x_size = jnp.where(given / size < _SHORTEST, given / _SHORTEST, size)
    problem = Problem(
        matvec=matvec,
        precondition=precondition,
        b=scaled,
        of_b=of_b,
        rhs_norm=jnp.sqrt(trees.dot(scaled, scaled)),
        x_size=x_size,
        max_iterations=max_iterations,
        limit=limit,
        min_iterations=min_iterations,
        stopping=stopping,
        keeper=keeper,
        bounds=bounds,
        residuals=Recurrence(matvec)
        if replace_every is None
        else Replacement(replace_every, exact_of(matvec), scaled),
    )
    end = jax.lax.while_loop(
        lambda state: state.reason == Reason.RUNNING,
        lambda state: _step(problem, state),
        _start(problem, None if x0 is None else trees.scale(1 / size, x0)),
    )
    coefficients = end.coefficients
    if replace_every is not None:  # Lanczos' matrix ends there.
        coefficients = coefficients.at[replace_every:].set(0)
    return CGResult(
        x=trees.scale(x_size, end.x),
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
        x, r = sharding.zeros_like(b), jax.tree.map(jnp.negative, b)
        model = jnp.zeros((), problem.x_size.dtype)
        y = jax.tree.map(jnp.negative, problem.of_b)
    else:
        x, (r, model) = x0, by_product(problem.residuals.product, b, x0)
        y = problem.precondition(r)
    ry = trees.dot(r, y)
    i = jnp.zeros((), jnp.int32)
    model_values = jnp.full(problem.max_iterations + 1, model)
    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(jnp.isfinite(ry) & jnp.isfinite(model), reason, Reason.NONFINITE)
    model_values = jnp.where(jnp.isnan(model_values), jnp.inf, model_values)
    kept = problem.keeper.init(trees.scale(problem.x_size, x))
    p = jax.tree.map(jnp.negative, y)
    lengths = (jnp.zeros_like(ry), jnp.zeros_like(ry), ry)
    steepest = jnp.zeros_like(ry)
    coefficients = jnp.full((problem.max_iterations, 2), jnp.zeros_like(model))
    return State(
        i, x, r, p, ry, model_values, kept, reason, lengths, steepest, coefficients
    )


def _step(problem: Problem, state: State) -> State:
    """Do one iteration: the core of algorithm 2, with M at each iterate."""
    product = problem.matvec(state.p)
    curvature = trees.dot(state.p, product)
    slope = problem.residuals.slope(state.r, state.p, state.ry)
    line, steepest = _line(state, curvature, slope)
    alpha, moves, leaves = problem.bounds.length(line)
    beyond = trees.axpy(alpha, state.p, state.x)
    reached = trees.is_finite(trees.scale(problem.x_size, trees.maxima(beyond)))
    finite = line.finite & (~moves | reached)
    moves &= finite
    i = state.i + moves.astype(state.i.dtype)

    # `select`, not alpha = 0: what is not finite must not touch x.
    x = trees.select(moves, beyond, state.x)
    # Not α²: for curvature of 1e-30 or 1e30 it is outside of float32.
    gain = jnp.where(moves, alpha * (slope - 0.5 * (alpha * curvature)), 0)
    found = Residual(
        r=trees.axpy(alpha, product, state.r),
        model=state.model_values[state.i] - gain,
        fresh=jnp.zeros((), bool),
    )
    r, model, fresh = problem.residuals.after(i, moves, x, found)
    finite &= ~fresh | jnp.isfinite(model)
    model = jnp.where(finite, model, found.model)
    y = problem.precondition(r)
    ry = trees.dot(r, y)
    before = jnp.where(state.ry > 0, state.ry, 1)
    positive = jnp.where(line.positive, curvature, 1)
    conjugate = trees.dot(y, product) / positive
    beta = problem.residuals.beta(ry, before, fresh, conjugate)
    p = trees.axpy(beta, state.p, jax.tree.map(jnp.negative, y))

    later = jnp.arange(problem.max_iterations + 1, dtype=i.dtype) >= i
    model_values = jnp.where(later, model, state.model_values)
    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(line.positive, reason, Reason.NONPOSITIVE_CURVATURE)
    reason = jnp.where(leaves, Reason.BOUNDARY, reason)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    kept, reason = _observed(problem, state.kept, i, x, reason)
    lanczos = jnp.where(line.positive & line.finite, line.alpha, 0)
    return State(
        i=i,
        x=x,
        r=r,
        p=p,
        ry=ry,
        model_values=model_values,
        kept=kept,
        reason=reason,
        lengths=_lengths(state.lengths, problem.bounds.relative(alpha), beta, ry),
        steepest=steepest,
        coefficients=_recorded(problem, state, lanczos, beta),
    )


def _line(
    state: State, curvature: jax.Array, slope: jax.Array
) -> tuple[Line, jax.Array]:
    """Find the minimum of M along p; return the largest pᵀAp / pᵀPp so far, too."""
    positive = (curvature > 0) & (state.ry > 0)
    alpha = jnp.where(positive, slope / jnp.where(positive, curvature, 1), 1)
    # Curvature does not count as positive either where α would overflow, or where the
    # rounding of p accounts for it: down the null space of A, if b is not in its range.
    pp = state.lengths[2]
    steepest = jnp.maximum(state.steepest, curvature / jnp.where(pp > 0, pp, 1))
    rounding = jnp.square(8 * jnp.finfo(pp.dtype).eps)
    positive &= jnp.isfinite(alpha) & (curvature > rounding * steepest * pp)
    line = Line(
        first=state.i == 0,
        x=state.x,
        p=state.p,
        ry=state.ry,
        lengths=state.lengths,
        alpha=jnp.where(positive, alpha, 1),
        positive=positive,
        finite=jnp.isfinite(curvature) & jnp.isfinite(state.ry),
    )
    return line, steepest


def _observed(
    problem: Problem, kept: Kept, i: jax.Array, x: Tree, reason: jax.Array
) -> tuple[Kept, jax.Array]:
    """Offer an iterate to be kept; f, where it is evaluated there, may end the run."""
    is_last = reason != Reason.RUNNING
    kept = problem.keeper.update(kept, i, trees.scale(problem.x_size, x), is_last)
    worse = (reason == Reason.RUNNING) & problem.keeper.stop(kept, i)
    return kept, jnp.where(worse, Reason.OBJECTIVE_ROSE, reason).astype(jnp.int32)


def _lengths(
    lengths: Lengths, alpha: jax.Array, beta: jax.Array, ry: jax.Array
) -> Lengths:
    """Return xᵀPx, xᵀPp and pᵀPp of the next iteration."""
    xx, xp, pp = lengths
    return (
        xx + alpha * (2 * xp + alpha * pp),
        beta * (xp + alpha * pp),
        ry + beta**2 * pp,
    )


def _recorded(
    problem: Problem, state: State, alpha: jax.Array, beta: jax.Array
) -> jax.Array:
    """Write α and β of this iteration into Lanczos' coefficients."""
    found = jnp.stack([alpha, jnp.where(alpha > 0, beta, 0)])
    numbers = jnp.arange(problem.max_iterations, dtype=state.i.dtype)
    here = numbers[:, None] == state.i
    return jnp.where(here, found[None], state.coefficients)


def _judge(
    problem: Problem, i: jax.Array, r: Tree, model_values: jax.Array
) -> jax.Array:
    """Return why to stop after iteration i, or RUNNING."""
    norm = jnp.sqrt(trees.dot(r, r))
    met = jnp.zeros((), bool)
    if problem.stopping is not None:
        progress = Progress(i, model_values, norm, problem.rhs_norm)
        met = (i >= problem.min_iterations) & problem.stopping(progress)
    rounding = jnp.finfo(norm.dtype).eps * problem.rhs_norm
    reason = jnp.where(met, Reason.STOPPING_RULE, Reason.RUNNING)
    reason = jnp.where(i >= problem.limit, Reason.MAX_ITERATIONS, reason)
    reason = jnp.where(norm <= rounding, Reason.RESIDUAL_ZERO, reason)
    return reason.astype(jnp.int32)


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
    size = trees.magnitude(of_b)
    size = jnp.where(jnp.isfinite(size), size, 1)

    def precondition(r: Tree) -> Tree:
        return trees.scale(1 / size, preconditioner(r))

    return precondition, trees.scale(1 / size, of_b), size


def as_preconditioner(preconditioner: Preconditioner | None) -> Preconditioner | None:
    """Return a user's P⁻¹, which says so where what it returns is no vector."""
    if preconditioner is None:
        return None
    return as_product("preconditioner", preconditioner, matrix="P⁻¹ v")
