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
from hfjax.solvers.iterates import IterateBuffer, Iterates
from hfjax.solvers.pcg_hooks import (
    Lengths,
    Line,
    Memory,
    Recurrence,
    Region,
    Replacement,
    Residual,
    Unbounded,
    by_product,
)
from hfjax.solvers.stopping import Progress, StoppingRule


class CGResult(NamedTuple):
    """What a run of conjugate gradients found.

    Attributes:
      x: the last iterate, like `b`.
      num_iterations: int32 scalar, how many iterates follow x₀.
      model_values: shape `[max_iterations + 1]`, float32 or wider: M at x₀, x₁, …;
        entries past the last repeat it.
      kept: the kept iterates.
      reason: int32 scalar, a `Reason`.
      coefficients: shape `[max_iterations, 2]`, like `model_values`: α of each iteration
        and β from it to the next, which make the tridiagonal matrix of Lanczos
        (`hfjax.spectrum.ritz_values`); zeros from where there is no more of it.
    """

    x: Tree
    num_iterations: jax.Array
    model_values: jax.Array
    kept: Iterates
    reason: jax.Array
    coefficients: jax.Array


class Problem(NamedTuple):
    """What stays the same through a run."""

    matvec: Matvec
    precondition: Preconditioner | None
    b: Tree  # In units of `size`.
    size: jax.Array
    rhs_norm: jax.Array
    max_iterations: int  # Sizes the history of M.
    limit: jax.Array | int  # At most that; may be traced.
    min_iterations: int
    stopping: StoppingRule | None
    buffer: IterateBuffer
    bounds: Unbounded | Region
    residuals: Recurrence | Replacement


class State(NamedTuple):
    """What changes, named as in algorithm 2: x, r, and of the last iteration p and rᵀy.

    y = P⁻¹r is found where an iteration begins, so that P⁻¹ is in the program once, and
    is not applied to the residual that a run ends with. `p_size` is the scale of P⁻¹,
    which does not matter: of the first y, so that no square leaves the floats.

    `lengths` are xᵀPx, xᵀPp and pᵀPp by their recurrences, as P itself is not at hand
    (Conn, Gould & Toint 2000, section 7.5.1); from x₀ = 0. In a region x is in units of
    its radius there, whose square may be no float. `steepest` is the largest pᵀAp / pᵀPp
    so far; `memory` what the residuals' hook asks for.
    """

    i: jax.Array
    x: Tree
    r: Tree
    p: Tree
    ry: jax.Array
    p_size: jax.Array
    model_values: jax.Array
    kept: Iterates
    reason: jax.Array
    lengths: tuple[jax.Array, jax.Array, jax.Array]
    steepest: jax.Array
    coefficients: jax.Array
    memory: Memory


def run(
    matvec: Matvec,
    b: Tree,
    x0: Tree | None,
    preconditioner: Preconditioner | None,
    buffer: IterateBuffer,
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
    problem = Problem(
        matvec=matvec,
        precondition=preconditioner,
        b=scaled,
        size=size,
        rhs_norm=jnp.sqrt(trees.dot(scaled, scaled)),
        max_iterations=max_iterations,
        limit=limit,
        min_iterations=min_iterations,
        stopping=stopping,
        buffer=buffer,
        bounds=Unbounded() if region is None else region,
        residuals=Recurrence(matvec)
        if replace_every is None
        else Replacement(replace_every, exact_of(matvec), scaled),
    )
    end = jax.lax.while_loop(
        lambda state: state.reason == Reason.RUNNING,
        lambda state: _step(problem, state),
        _start(problem, None if x0 is None else trees.scale(1 / size, x0)),
    )
    x_size, _ = problem.bounds.scaled(size, end.p_size)
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
        coefficients=coefficients.at[:, 0].divide(end.p_size),
    )


def _start(problem: Problem, x0: Tree | None) -> State:
    b = problem.b
    if x0 is None:
        x, r = sharding.zeros_like(b), jax.tree.map(jnp.negative, b)
        model = jnp.zeros((), problem.size.dtype)
    else:
        x, (r, model) = x0, by_product(problem.residuals.product, b, x0)
    one, zero = jnp.ones_like(problem.rhs_norm), jnp.zeros_like(problem.rhs_norm)
    i = jnp.zeros((), jnp.int32)
    model_values = jnp.full(problem.max_iterations + 1, model)
    reason = _judge(problem, i, r, model_values)
    finite = jnp.isfinite(model) & jnp.isfinite(problem.rhs_norm)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    model_values = jnp.where(jnp.isnan(model_values), jnp.inf, model_values)
    return State(
        i=i,
        x=x,
        r=r,
        p=sharding.zeros_like(b),
        ry=one,
        p_size=one,
        model_values=model_values,
        kept=problem.buffer.init(trees.scale(problem.size, x)),
        reason=reason,
        lengths=(zero, zero, zero),
        steepest=zero,
        coefficients=jnp.full((problem.max_iterations, 2), jnp.zeros_like(model)),
        memory=problem.residuals.start(b, one),
    )


def _step(problem: Problem, state: State) -> State:
    """Do one iteration: the core of algorithm 2, with M at each iterate."""
    y, p_size = _preconditioned(problem, state)
    ry = trees.dot(state.r, y)
    beta = problem.residuals.beta(ry, state.ry, y, state.memory)
    beta = jnp.where(state.i == 0, 0, beta)
    p = trees.axpy(beta, state.p, jax.tree.map(jnp.negative, y))
    product = problem.matvec(p)
    curvature = trees.dot(p, product)
    slope = problem.residuals.slope(state.r, p, ry)
    lengths = _lengths_of_p(state.lengths, beta, ry)
    line, steepest = _line(state, p, ry, lengths, curvature, slope)
    x_size, bounds = problem.bounds.scaled(problem.size, p_size)
    alpha, moves, leaves = bounds.length(line)
    beyond = trees.axpy(alpha, p, state.x)
    reached = trees.is_finite(trees.scale(x_size, trees.maxima(beyond)))
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

    later = jnp.arange(problem.max_iterations + 1, dtype=i.dtype) >= i
    model_values = jnp.where(later, model, state.model_values)
    reason = _judge(problem, i, r, model_values)
    reason = jnp.where(line.positive, reason, Reason.NONPOSITIVE_CURVATURE)
    reason = jnp.where(leaves, Reason.BOUNDARY, reason)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    kept, reason = _observed(problem, state.kept, i, trees.scale(x_size, x), reason)
    lanczos = jnp.where(line.positive & line.finite, line.alpha, 0)
    positive = jnp.where(line.positive, curvature, 1)
    return State(
        i=i,
        x=x,
        r=r,
        p=p,
        ry=ry,
        p_size=p_size,
        model_values=model_values,
        kept=kept,
        reason=reason,
        lengths=_lengths_of_x(lengths, bounds.relative(alpha)),
        steepest=steepest,
        coefficients=_recorded(state, lanczos, beta),
        memory=problem.residuals.memory(product, positive, fresh),
    )


def _preconditioned(problem: Problem, state: State) -> tuple[Tree, jax.Array]:
    """Return P⁻¹r in units of the first one's size, and that size."""
    if problem.precondition is None:
        return state.r, state.p_size
    y = problem.precondition(state.r)
    size = trees.magnitude(y).astype(state.p_size.dtype)
    first = jnp.where(jnp.isfinite(size), size, 1)
    size = jnp.where(state.i == 0, first, state.p_size)
    return trees.scale(1 / size, y), size


def _line(
    state: State,
    p: Tree,
    ry: jax.Array,
    lengths: Lengths,
    curvature: jax.Array,
    slope: jax.Array,
) -> tuple[Line, jax.Array]:
    """Find the minimum of M along p; return the largest pᵀAp / pᵀPp so far, too."""
    positive = (curvature > 0) & (ry > 0)
    alpha = jnp.where(positive, slope / jnp.where(positive, curvature, 1), 1)
    # Curvature does not count as positive either where α would overflow, or where the
    # rounding of p accounts for it: down the null space of A, if b is not in its range.
    pp = lengths[2]
    steepest = jnp.maximum(state.steepest, curvature / jnp.where(pp > 0, pp, 1))
    rounding = jnp.square(8 * jnp.finfo(pp.dtype).eps)
    positive &= jnp.isfinite(alpha) & (curvature > rounding * steepest * pp)
    line = Line(
        first=state.i == 0,
        x=state.x,
        p=p,
        ry=ry,
        lengths=lengths,
        alpha=jnp.where(positive, alpha, 1),
        positive=positive,
        finite=jnp.isfinite(curvature) & jnp.isfinite(ry),
    )
    return line, steepest


def _observed(
    problem: Problem, kept: Iterates, i: jax.Array, x: Tree, reason: jax.Array
) -> tuple[Iterates, jax.Array]:
    """Offer an iterate to be kept; f, where it is evaluated there, may end the run."""
    is_last = reason != Reason.RUNNING
    kept = problem.buffer.update(kept, i, x, is_last)
    worse = (reason == Reason.RUNNING) & problem.buffer.stop(kept, i)
    return kept, jnp.where(worse, Reason.OBJECTIVE_ROSE, reason).astype(jnp.int32)


def _lengths_of_p(lengths: Lengths, beta: jax.Array, ry: jax.Array) -> Lengths:
    """Return xᵀPx, xᵀPp and pᵀPp of the next p."""
    xx, xp, pp = lengths
    return xx, beta * xp, ry + beta**2 * pp


def _lengths_of_x(lengths: Lengths, alpha: jax.Array) -> Lengths:
    """Return xᵀPx, xᵀPp and pᵀPp after x has moved by α p."""
    xx, xp, pp = lengths
    return xx + alpha * (2 * xp + alpha * pp), xp + alpha * pp, pp


def _recorded(state: State, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """Write α of this iteration, and β that follows from the last, for Lanczos.

    The last iteration of a run has no β: nothing follows.
    """
    numbers = jnp.arange(len(state.coefficients), dtype=state.i.dtype)
    alphas, betas = state.coefficients.T
    alphas = jnp.where(numbers == state.i, alpha, alphas)
    betas = jnp.where((numbers == state.i - 1) & (alphas > 0), beta, betas)
    return jnp.stack([alphas, betas], axis=1)


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


def as_preconditioner(preconditioner: Preconditioner | None) -> Preconditioner | None:
    """Return a user's P⁻¹, which says so where what it returns is no vector."""
    if preconditioner is None:
        return None
    return as_product("preconditioner", preconditioner, matrix="P⁻¹ v")
