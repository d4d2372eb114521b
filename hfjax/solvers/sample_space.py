"""The damped step solved exactly, by one matrix: of as many rows as outputs, or parameters.

With G = J̃ᵀJ̃ + weight_decay · I, J̃ a row for each output of each case, μ = λ +
weight_decay and −∇f = J̃ᵀc + d,

    (J̃ᵀJ̃ + μI) δ = −∇f

is solved with a matrix of the outputs (the push-through identity),

    δ = J̃ᵀ(J̃J̃ᵀ + μI)⁻¹(c − J̃d/μ) + d/μ,

or with J̃ᵀJ̃ + μI itself, whichever is smaller. Other λ cost a Cholesky factor each, so
that `hfjax.damping.searched` finds λ here, too. The same factor then puts right what
the step misses as the outputs bend along it (`corrections`), for little more than a pass
forward each: an update then goes as far as tens without. Fits to 1e-6 and far below are
what this is for, where G is ill-conditioned as differential equations make it.
J̃ is written out: memory of rows · parameters.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax._core import options, sharding, trees
from hfjax._core.refusal import without_derivative
from hfjax._core.types import NumberOrSchedule, Tree
from hfjax._tracing import linalg
from hfjax.curvature.jacobian import Jacobian
from hfjax.solvers._correction import corrected
from hfjax.solvers.descent import Reason, Run, RunStats, Solver, Step, System

_ROUNDING = 100
"""Of −∇f − J̃ᵀc, in units of ε of its terms, that counts as nothing (heuristic)."""
_RAISE, _TRIES = 10.0, 20
"""μ is raised so, and so often at most, until a Cholesky factor is finite (heuristic)."""

_WORTH = 200
"""Products that the matrix may cost as many multiplications as, for `"auto"`; measured."""
_NOTHING = 10**7
"""Multiplications that count as none, for `"auto"`: some milliseconds (heuristic)."""
_MOST_NUMBERS = 5 * 10**8
"""Of J̃, for `"auto"`: 4 GB in float64 (heuristic)."""
_MOMENTUM = 0.5
"""Of `"auto"`; measured, as above."""


def cholesky(
    *,
    space: str = "smaller",
    momentum: NumberOrSchedule | None = None,
    corrections: int = 16,
) -> Solver:
    """Solve for the direction exactly, by a Cholesky factor.

    (G + λI) δ = −∇f + λφ, with φ = `momentum` · (the last step): the step that stays as
    near to φ as λ says, rather than to 0. G is the Gauss-Newton matrix, D = I, and no
    preconditioner is made. λ, ρ, line search and rejection are as with conjugate
    gradients. The model needs reverse-mode derivatives only.

    The step is δ + c, corrected for what its linear model misses: with J̃ and r̃ as above,

        c ← −(G + λI)⁻¹ J̃ᵀ (r̃(θ + δ + c) − r̃ − J̃(δ + c)),

    from c = 0, for as long as what is missed changes less each time and by more than a
    tenth of the residuals left (heuristic). M and ρ are of δ, f is of θ + δ + c, and the
    line search goes along θ + αδ + α²c.

    An update costs, besides f and ∇f, a pass back for each output of a case; 2 · rows² ·
    params operations in `"samples"`, 2 · rows · params² in `"parameters"`; and for each λ
    that is looked at a third of the smaller one's cube, and for each of its corrections a
    pass forward, 4 · rows · params operations and 2 · the smaller one's square. It holds
    rows · params numbers, in float32 or wider. λ below the rounding of the matrix counts
    as that, ε times its trace.

    Args:
      space: `"samples"`, J̃J̃ᵀ; `"parameters"`, J̃ᵀJ̃; or `"smaller"`, that of fewer rows.
      momentum: in [0, 1], a number or schedule; for batches that are drawn anew in each
        update (Goldshlager et al. 2024: 0.99 for wave functions; measured on differential
        equations, `benchmarks/results/step7.md`: 0.5). `None` is without.
      corrections: of a step, at most; 0 is the damped Gauss-Newton step itself. Nothing
        where the model is linear in θ (16: measured, ibid.). Corrected steps are longer:
        where f has several minima they may lead to another than the nearest.

    Returns:
      The solver.

    Raises:
      TypeError: if `corrections` is no Python integer.
      ValueError: if an option is out of range, or nothing of the kind.

    Example:
      One update solves linear least squares, of 2 cases and 3 parameters:

      >>> import hfjax, jax.numpy as jnp, optax
      >>> x, t = jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), jnp.array([3.0, 2.0])
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> tx = hfjax.hessian_free(
      ...     objective, damping=hfjax.damping.constant(1e-6), solver=cholesky()
      ... )
      >>> params, batch = jnp.zeros(3), (x, t)
      >>> value, grads = objective.value_and_grad(params, batch)
      >>> updates, _ = tx.update(grads, tx.init(params), params, batch=batch)
      >>> print(updates.round(3), jnp.linalg.lstsq(x, t)[0].round(3))  # the shortest
      [0.333 1.333 0.667] [0.333 1.333 0.667]

    References:
      Ren & Goldfarb (2019), "Efficient subsampled Gauss-Newton and natural gradient
      methods"; Chen & Heyl (2024); Goldshlager, Abrahamsen & Lin (2024), "A
      Kaczmarz-inspired approach to accelerate the optimization of neural network wave
      functions" (SPRING); Guzmán-Cordero et al. (2025), of differential equations. Of
      corrections: Transtrum & Sethna (2012), "Improvements to the Levenberg-Marquardt
      algorithm for nonlinear least-squares minimization" (the first of them); Kelley
      (2003), "Solving nonlinear equations with Newton's method", 1.3 (the chord method).
    """
    options.check_choice("space", space, ("smaller", "samples", "parameters"))
    options.check_range("momentum", momentum, low=0.0, high=1.0)
    options.check_count("corrections", corrections, low=0)

    def start(direction: Tree, count: jax.Array) -> Tree | None:
        if momentum is None:
            return None
        return trees.scale(options.read(momentum, count), direction)

    def solve(system: System, x0: Tree | None) -> Run:
        return _solve(system, x0, space, corrections)

    return Solver(start, solve, reads="jacobian")


def where_small(otherwise: Solver) -> Solver:
    """Solve exactly where that is cheap, and else otherwise: what `solver="auto"` is.

    Which is known by sizes alone, when the update is traced. The matrix of `cholesky` costs
    rows · params · min(rows, params) multiplications. A product with G costs three passes
    forward, and conjugate gradients need many where G is ill-conditioned; a matrix product
    runs at several times the speed of a pass. So it is solved exactly where that is at
    most 200 products' multiplications (matrix products' and convolutions', as counted in
    the traced model), or 1e7, and J̃ has at most 5e8 numbers (measured on differential
    equations: `benchmarks/results/step7.md`).

    Args:
      otherwise: what solves where a matrix would cost more.

    Returns:
      The solver: `cholesky(momentum=0.5)` (ibid.: level with none or ahead of it, but for
      one of four comparisons), or `otherwise`.

    Example:
      300 rows of as many parameters are few; 3,000 would cost conjugate gradients' time:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> bare = {"backtracking": None, "line_search": None}
      >>> tx = hfjax.hessian_free(f, solver="auto", **bare)
      >>> reason = []
      >>> for units in (1, 10):
      ...     params = jnp.zeros((300, units))
      ...     batch = (jnp.ones((300, 300)), jnp.ones((300, units)))
      ...     _, state = tx.update(params - 1, tx.init(params), params, batch=batch)
      ...     reason.append(hfjax.cg.Reason(int(state.info.cg_reason)).name)
      >>> print(reason)
      ['RESIDUAL_ZERO', 'STOPPING_RULE']
    """
    exactly = cholesky(momentum=_MOMENTUM)

    def solve(system: System, x0: Tree | None) -> Run:
        chosen = exactly if _is_small(system) else otherwise
        return chosen.solve(system, chosen.start(x0, system.count))

    def carry(run: Run, chosen: Tree) -> Tree:
        return chosen if run.iterates is None else otherwise.carry(run, chosen)

    return otherwise._replace(
        start=lambda direction, count: direction, solve=solve, carry=carry
    )


def _is_small(system: System) -> bool:
    """Return whether an exact solution costs less than conjugate gradients may."""
    assert system.jacobian_size is not None, "made by every update"
    rows, columns, forward = system.jacobian_size()
    cost = rows * columns * min(rows, columns)
    worth = cost <= max(_WORTH * 3 * forward, _NOTHING)
    return worth and rows * columns <= _MOST_NUMBERS


def _solve(system: System, before: Tree | None, space: str, corrections: int) -> Run:
    """Solve with the run's λ; the run tells of others, too."""
    assert system.jacobian is not None, "made by every update"
    jacobian, decay = system.jacobian()
    rows, columns = len(jacobian.residuals), optax.tree.size(system.b)
    in_samples = space == "samples" or (space == "smaller" and rows <= columns)
    build = _in_samples if in_samples else _in_parameters
    matrix = build(jacobian, decay, system.b, before)
    b, dtype = system.b, trees.scalar_dtype(system.b)

    def undamped(step: Tree) -> jax.Array:
        curved = jnp.sum(jnp.square(jacobian.product(step)))
        curved += decay * trees.dot(step, step)
        return (0.5 * curved - trees.dot(b, step)).astype(dtype)

    def at_damping(damping: jax.Array) -> Step:
        change, inverse = matrix.solve(damping)
        step = change if before is None else trees.add(change, before)
        correction = None
        if corrections:
            correction = corrected(jacobian, inverse, step, corrections)
        found = undamped(step)
        penalty = 0.5 * system.scalar * trees.dot(step, step)
        model = found + penalty.astype(dtype)
        return Step(step, model, jnp.ones((), jnp.int32), correction, found)

    # Not of the step: if other λ are tried, that for this one is never used.
    finite = jnp.isfinite(matrix.trace) & jnp.isfinite(jnp.sum(jacobian.residuals))
    reason = jnp.where(finite, Reason.RESIDUAL_ZERO, Reason.NONFINITE)
    last = without_derivative("A corrected step", at_damping(system.scalar))
    models = jnp.stack([jnp.zeros((), dtype), last.model])
    stats = RunStats(jnp.ones((), jnp.int32), reason.astype(jnp.int32), models)
    return Run(last, stats, at_damping=at_damping, anchor=before)


class _System(NamedTuple):
    """(J̃ᵀJ̃ + μI) δ = −∇f, for any λ.

    Attributes:
      solve: λ ↦ δ − φ, and u ↦ (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu by the same factor.
      trace: of the matrix.
    """

    solve: Callable[[jax.Array], tuple[Tree, Callable[[jax.Array], Tree]]]
    trace: jax.Array


def _in_samples(
    jacobian: Jacobian, decay: jax.Array, b: Tree, before: Tree | None
) -> _System:
    """By J̃J̃ᵀ."""
    # Residuals have the outputs' dtype, rows that of the parameters.
    within = -jacobian.residuals.astype(trees.scalar_dtype(jacobian.rows))
    # −∇f of other data, or the decay's part. What is only rounding would count 1/μ times.
    spanned = trees.cast_like(jacobian.transpose(within), b)
    beyond = jax.tree.map(jnp.subtract, b, spanned)
    eps = jnp.finfo(within.dtype).eps
    size = trees.norm(b) + trees.norm(spanned)
    seen = trees.norm(beyond) > _ROUNDING * eps * size
    beyond = jax.tree.map(lambda x: jnp.where(seen, x, 0), beyond)
    if before is not None:
        within -= jacobian.product(before).astype(within.dtype)
        beyond = trees.axpy(-decay, before, beyond)
    along = jacobian.product(beyond)
    matrix = trees.gram(jacobian.rows, jacobian.rows)

    def solve(damping: jax.Array) -> tuple[Tree, Callable[[jax.Array], Tree]]:
        factor, mu = _factor(matrix, damping + decay)

        def inverse(u: jax.Array) -> Tree:
            u = u.astype(matrix.dtype)
            solved = jacobian.transpose(linalg.cho_solve(factor, u))
            return sharding.like(trees.cast_like(solved, beyond), beyond)

        return trees.axpy(1 / mu, beyond, inverse(within - along / mu)), inverse

    return _System(solve, jnp.trace(matrix))


def _in_parameters(
    jacobian: Jacobian, decay: jax.Array, b: Tree, before: Tree | None
) -> _System:
    """By J̃ᵀJ̃: of few parameters, laid out in one vector."""
    dtype = trees.widest(*(leaf.dtype for leaf in jax.tree.leaves((jacobian.rows, b))))

    def in_one(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(in_one(jacobian.rows))
    matrix = sharding.contracted(rows, rows, ((0,), (0,)), trees.EXACT)
    rhs, unravel = ravel_pytree(in_one(b))
    if before is not None:
        phi = ravel_pytree(in_one(before))[0]
        rhs -= jnp.matmul(matrix, phi, precision=trees.EXACT) + decay * phi

    def solve(damping: jax.Array) -> tuple[Tree, Callable[[jax.Array], Tree]]:
        factor, _ = _factor(matrix, damping + decay)

        def solved(rhs: jax.Array) -> Tree:
            found = unravel(linalg.cho_solve(factor, rhs).astype(rhs.dtype))
            return trees.cast_like(found, b)

        def inverse(u: jax.Array) -> Tree:
            return solved(ravel_pytree(in_one(jacobian.transpose(u)))[0])

        return solved(rhs), inverse

    return _System(solve, jnp.trace(matrix))


def _factor(matrix: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the Cholesky factor of matrix + μI, and μ, raised where it has none."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    rounding = jnp.finfo(matrix.dtype).eps * jnp.trace(matrix)

    def attempt(mu: jax.Array) -> jax.Array:
        return linalg.cholesky(matrix + mu * identity)

    def failed(tried: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        factor, _, tries = tried
        return ~jnp.isfinite(factor[-1, -1]) & (tries < _TRIES)

    def again(tried: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        _, mu, tries = tried
        return attempt(_RAISE * mu), _RAISE * mu, tries + 1

    mu = jnp.maximum(mu.astype(matrix.dtype), rounding)
    # Of no curvature at all, and no damping.
    mu = jnp.where(mu > 0, mu, jnp.finfo(matrix.dtype).tiny)
    start = (jnp.full_like(matrix, jnp.nan), mu / _RAISE, jnp.zeros((), jnp.int32))
    factor, mu, _ = jax.lax.while_loop(failed, again, start)
    return factor, mu
