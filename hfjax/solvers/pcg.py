"""The loop of preconditioned conjugate gradients, algorithm 2 of M&S (2012).

Use it through `hfjax.cg` and `hfjax.trust_region`, which share it. Its options are hooks
of `hfjax.solvers.pcg_hooks`, chosen when the program is built.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.arguments import as_product
from hfjax._core.types import Matvec, Preconditioner, Tree, ValueFn, exact_of
from hfjax.solvers.descent import Reason
from hfjax.solvers.iterates import IterateBuffer, IterateRule, Iterates
from hfjax.solvers.pcg_hooks import (
    Lengths,
    Line,
    Memory,
    Region,
    Residual,
    Residuals,
    Unbounded,
    by_product,
)
from hfjax.solvers.stopping import Progress, StoppingRule


class CGResult(NamedTuple):
    """The result of a run of conjugate gradients.

    Attributes:
      x: the last iterate, like `b`.
      num_iterations: int32 scalar, the number of iterates after x₀.
      model_values: shape `[max_iterations + 1]`, float32 or wider: M at x₀, x₁, …; the
        last value is repeated to the end.
      kept: the kept iterates.
      reason: int32 scalar, a `Reason`.
      coefficients: shape `[max_iterations, 2]`, like `model_values`: α of each iteration
        and β from it to the next, which make up the tridiagonal matrix of Lanczos
        (`hfjax.spectrum.ritz_values`); zeros after its end.
    """

    x: Tree
    num_iterations: jax.Array
    model_values: jax.Array
    kept: Iterates
    reason: jax.Array
    coefficients: jax.Array


class Problem(NamedTuple):
    """What stays the same during a run."""

    matvec: Matvec
    precondition: Preconditioner | None
    b: Tree  # in units of `size`
    size: jax.Array
    rhs_norm: jax.Array
    max_iterations: int  # the size of the history of M
    limit: jax.Array | int  # at most that; may be traced
    min_iterations: int
    stopping: StoppingRule | None
    buffer: IterateBuffer
    bounds: Unbounded | Region
    residuals: Residuals


class State(NamedTuple):
    """The state of the loop, with the names of algorithm 2."""

    i: jax.Array
    x: Tree
    r: Tree
    rr: jax.Array  # rᵀr, for the stopping rules; without P it is the next rᵀP⁻¹r, too.
    # Those of the last iteration: the direction, and rᵀP⁻¹r.
    p: Tree
    ry: jax.Array
    # A power of two near the first rᵀP⁻¹r. P⁻¹ is divided by it, which changes no iterate,
    # so that rᵀP⁻¹r stays in the range of floats.
    p_size: jax.Array
    model_values: jax.Array
    kept: Iterates
    reason: jax.Array
    # xᵀPx, xᵀPp and pᵀPp, by recurrences (Conn, Gould & Toint 2000, section 7.5.1): P is
    # not available, only P⁻¹. In a region, x is here in units of the radius, whose square
    # may overflow.
    lengths: Lengths
    # The largest pᵀAp / pᵀPp so far.
    steepest: jax.Array
    coefficients: jax.Array
    # What the hook for residuals needs of the last iteration.
    memory: Memory


def run(
    matvec: Matvec,
    b: Tree,
    preconditioner: Preconditioner | None,
    keep: IterateRule,
    *,
    max_iterations: int,
    stopping: StoppingRule | None,
    x0: Tree | None = None,
    value_fn: ValueFn | None = None,
    limit: jax.Array | int | None = None,
    min_iterations: int = 1,
    region: Region | None = None,
    replace_every: int | None = None,
) -> CGResult:
    """Run algorithm 2 on A x = b from `x0` or 0; with a region, from 0 only."""
    # Everything is computed for b / size, so that the squares of tiny or huge right-hand
    # sides stay in range (jax#40254 is 0/0 after underflow). The size is a power of two,
    # so the division is exact.
    scaled, size = trees.normalised(b)
    size = jnp.where(jnp.isfinite(size), size, 1)
    product = matvec if replace_every is None else exact_of(matvec)
    problem = Problem(
        matvec=matvec,
        precondition=preconditioner,
        b=scaled,
        size=size,
        rhs_norm=jnp.sqrt(trees.dot(scaled, scaled)),
        max_iterations=max_iterations,
        limit=max_iterations if limit is None else jnp.minimum(limit, max_iterations),
        min_iterations=min_iterations,
        stopping=stopping,
        buffer=keep.build(max_iterations, value_fn),
        bounds=Unbounded() if region is None else region,
        residuals=Residuals(product, scaled, replace_every),
    )
    end = jax.lax.while_loop(
        lambda state: state.reason == Reason.RUNNING,
        lambda state: _step(problem, state),
        _start(problem, None if x0 is None else trees.scale(1 / size, x0)),
    )
    x_size, _ = problem.bounds.scaled(size, end.p_size)
    coefficients = end.coefficients
    # After a replacement, the coefficients no longer belong to one Lanczos matrix.
    if replace_every is not None:
        coefficients = coefficients.at[replace_every:].set(0)
    return CGResult(
        x=trees.scale(x_size, end.x),
        num_iterations=end.i,
        model_values=size * (x_size * end.model_values),  # as size² may overflow
        kept=end.kept,
        reason=end.reason,
        # The loop uses P⁻¹ / p_size, which makes α larger by a factor of p_size.
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
    rr = trees.dot(r, r)
    reason = _judge(problem, i, rr, model_values)
    finite = jnp.isfinite(model) & jnp.isfinite(problem.rhs_norm)
    reason = jnp.where(finite, reason, Reason.NONFINITE)
    model_values = jnp.where(jnp.isnan(model_values), jnp.inf, model_values)
    return State(
        i=i,
        x=x,
        r=r,
        rr=rr,
        p=sharding.zeros_like(b),
        ry=one,
        p_size=one,
        model_values=model_values,
        kept=problem.buffer.init(trees.scale(problem.size, x)),
        reason=reason,
        lengths=(zero, zero, zero),
        steepest=zero,
        coefficients=jnp.full((problem.max_iterations, 2), jnp.zeros_like(model)),
        memory=problem.residuals.start(one),
    )


def _step(problem: Problem, state: State) -> State:
    """Do one iteration: the core of algorithm 2, with M at each iterate."""
    # P⁻¹ is applied first: it is in the program once. At the start p = 0, whatever β is.
    y, ry, p_size = _preconditioned(problem, state)
    beta = problem.residuals.beta(ry, state.ry, y, state.memory)
    p = trees.axpy(beta, state.p, jax.tree.map(jnp.negative, y))
    product = problem.matvec(p)
    curvature = trees.dot(p, product)
    slope = problem.residuals.slope(state.r, p, ry)
    lengths = _lengths_of_p(state.lengths, beta, ry)
    line, steepest = _line(state, p, ry, lengths, curvature, slope)
    x_size, bounds = problem.bounds.scaled(problem.size, p_size)
    alpha, moves, leaves = bounds.length(line)
    beyond = trees.axpy(alpha, p, state.x)
    # x must also be finite in the units of the result.
    reached = trees.is_finite(trees.scale(x_size, trees.maxima(beyond)))
    finite = line.finite & (~moves | reached)
    moves &= finite
    i = state.i + moves.astype(state.i.dtype)

    # With α = 0 instead of `select`, 0 · ∞ would make x NaN.
    x = trees.select(moves, beyond, state.x)
    # In float32 the error of the sum stays below 1e-6 |M| for condition numbers up to 1e8
    # (`python -m benchmarks precision`). α² is not formed: it may leave the floats.
    gain = jnp.where(moves, alpha * (slope - 0.5 * (alpha * curvature)), 0)
    found = Residual(
        r=trees.axpy(alpha, product, state.r),
        model=state.model_values[state.i] - gain,
        fresh=jnp.zeros((), bool),
    )
    r, model, fresh = problem.residuals.after(i, moves, x, found)
    # If a replacement is not finite, the run ends with M from the recurrence.
    finite &= ~fresh | jnp.isfinite(model)
    model = jnp.where(finite, model, found.model)

    later = jnp.arange(problem.max_iterations + 1, dtype=i.dtype) >= i
    model_values = jnp.where(later, model, state.model_values)
    # Later lines overwrite earlier ones: of several reasons, the last one here wins.
    rr = trees.dot(r, r)
    reason = _judge(problem, i, rr, model_values)
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
        rr=rr,
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


def _preconditioned(
    problem: Problem, state: State
) -> tuple[Tree, jax.Array, jax.Array]:
    """Return y = P⁻¹r and rᵀy in units in which the first rᵀy is near 1, and the unit."""
    if problem.precondition is None:
        return state.r, state.rr, state.p_size
    y = trees.scale(1 / state.p_size, problem.precondition(state.r))
    ry = trees.dot(state.r, y)
    # The sum that an iteration needs anyway gives the unit. max |y| would be one more, and
    # on sharded parameters one more exchange between devices.
    size, most = jnp.abs(ry), jnp.finfo(ry.dtype).maxexp - 2
    unit = trees.power_of_two(jnp.where(jnp.isfinite(size), size, 1), most)
    unit = jnp.where(state.i == 0, unit, 1)
    return trees.scale(1 / unit, y), ry / unit, state.p_size * unit


def _line(
    state: State,
    p: Tree,
    ry: jax.Array,
    lengths: Lengths,
    curvature: jax.Array,
    slope: jax.Array,
) -> tuple[Line, jax.Array]:
    """Find the minimum of M along p; also return the largest pᵀAp / pᵀPp so far."""
    positive = (curvature > 0) & (ry > 0)
    alpha = jnp.where(positive, slope / jnp.where(positive, curvature, 1), 1)
    # Also treat curvature as non-positive if α would overflow, or if pᵀAp is within the
    # rounding of p: p then lies in the null space of A, because b is not in its range.
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
    """Offer an iterate to the buffer, which may end the run if it evaluates f."""
    is_last = reason != Reason.RUNNING
    kept = problem.buffer.update(kept, i, x, is_last)
    worse = (reason == Reason.RUNNING) & problem.buffer.stop(kept, i)
    return kept, jnp.where(worse, Reason.OBJECTIVE_ROSE, reason).astype(jnp.int32)


def _lengths_of_p(lengths: Lengths, beta: jax.Array, ry: jax.Array) -> Lengths:
    """Return xᵀPx, xᵀPp and pᵀPp for the next p."""
    # The next p is −P⁻¹r + βp, and r is orthogonal to x and to p, because x₀ = 0.
    xx, xp, pp = lengths
    return xx, beta * xp, ry + beta**2 * pp


def _lengths_of_x(lengths: Lengths, alpha: jax.Array) -> Lengths:
    """Return xᵀPx, xᵀPp and pᵀPp after x has moved by α p."""
    xx, xp, pp = lengths
    return xx + alpha * (2 * xp + alpha * pp), xp + alpha * pp, pp


def _recorded(state: State, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """Write this iteration's α to its row of the coefficients, and β to the row before."""
    numbers = jnp.arange(len(state.coefficients), dtype=state.i.dtype)
    alphas, betas = state.coefficients.T
    # The last iteration of a run therefore has no β.
    alphas = jnp.where(numbers == state.i, alpha, alphas)
    betas = jnp.where((numbers == state.i - 1) & (alphas > 0), beta, betas)
    return jnp.stack([alphas, betas], axis=1)


def _judge(
    problem: Problem, i: jax.Array, rr: jax.Array, model_values: jax.Array
) -> jax.Array:
    """Return why to stop after iteration i, or RUNNING."""
    norm = jnp.sqrt(rr)
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
    """Return a user-supplied P⁻¹, with a check that it returns vectors."""
    if preconditioner is None:
        return None
    return as_product("preconditioner", preconditioner, matrix="P⁻¹ v")
