"""The exact damped step, from a matrix in sample space (kernel or Woodbury form) or J̃ᵀJ̃.

Let G = J̃ᵀJ̃ + weight_decay · I, where J̃ has a row for each output of each example, let
μ = λ + weight_decay, and −∇f = J̃ᵀc + d. The step solves (J̃ᵀJ̃ + μI) δ = −∇f. By the
push-through identity, it is

    δ = J̃ᵀ(J̃J̃ᵀ + μI)⁻¹(c − J̃d/μ) + d/μ.

If parameters have different weight decays, β in place of the number, μ is λ plus the
least of them. Let W be 1 + (β − min β)/μ on its diagonal; then

    δ = W⁻¹J̃ᵀ(J̃W⁻¹J̃ᵀ + μI)⁻¹(c − J̃W⁻¹d/μ) + W⁻¹d/μ.

By default, the smaller of both matrices is used. J̃ is stored: rows · parameters numbers.
Each other λ costs one Cholesky factor, so `hfjax.damping.searched` works here, too. The
same factor corrects the step for the nonlinearity of the outputs (`corrections`), and one
update then goes as far as tens without. Use it for fits to 1e-6 and far below, where G is
ill-conditioned, as it is for differential equations.
"""

import functools
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
"""−∇f − J̃ᵀc counts as 0 below this many ε of its terms."""

# 200 and the momentum were measured on differential equations
# (`benchmarks/results/equations.md`).
_WORTH = 200
"""For `"auto"`, the matrix may cost as many multiplications as this many products."""
_NOTHING = 10**7
"""Multiplications that `"auto"` neglects: some milliseconds."""
_MOST_NUMBERS = 5 * 10**8
"""The most numbers of J̃ for `"auto"`: 4 GB in float64."""
_MOMENTUM = 0.5
"""The momentum for `"auto"`."""


def cholesky(
    *,
    space: str = "smaller",
    momentum: NumberOrSchedule | None = None,
    corrections: int = 16,
) -> Solver:
    """Solve for the direction exactly, by a Cholesky factor.

    (G + λI) δ = −∇f + λφ, where φ = `momentum` · (the last step): λ keeps the step near φ
    instead of near 0. G is the Gauss-Newton matrix and D = I; no preconditioner is built.
    The model needs derivatives in reverse mode only.

    The result is δ + c. With residuals r̃ such that J̃ᵀr̃ is the gradient of the loss, c
    corrects for the error of their linear model,

        c ← −(G + λI)⁻¹ J̃ᵀ (r̃(θ + δ + c) − r̃ − J̃(δ + c)),

    from c = 0, as long as the error changes less each time, and by more than a tenth of
    the residuals left. M and ρ refer to δ, and f to θ + δ + c; the line search goes along
    θ + αδ + α²c.

    Apart from f and ∇f, an update costs

    | what | operations |
    |---|---|
    | J̃ | a backward pass for each output of an example |
    | its matrix, n rows | 2 n · rows · params |
    | each λ | n³ / 3; with several weight decays and J̃J̃ᵀ, also that matrix |
    | each correction | a forward pass, 4 · rows · params and 2 n² |

    All of it is in float32 or wider. λ counts as at least ε times the trace of the
    matrix.

    Args:
      space: `"samples"`, J̃J̃ᵀ; `"parameters"`, J̃ᵀJ̃; or `"smaller"` of them.
      momentum: in [0, 1], a number or schedule, for batches that are drawn anew in each
        update; `None` is 0.
      corrections: the most corrections of a step; 0 takes the damped Gauss-Newton step
        itself. For squared errors and a model linear in θ, c = 0. Corrected steps are
        longer: if f has several minima, they may lead to another one than the nearest.

    Returns:
      The solver.

    Raises:
      TypeError: if `corrections` is not a Python integer.
      ValueError: if an option is out of range, or `space` is unknown.

    Example:
      One update solves linear least squares, for 2 examples and 3 parameters:

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
      functions" (SPRING, `momentum`); Guzmán-Cordero et al. (2025), for differential
      equations. Corrections: Transtrum & Sethna (2012), "Improvements to the
      Levenberg-Marquardt algorithm for nonlinear least-squares minimization" (the first);
      Kelley (2003), "Solving nonlinear equations with Newton's method", 1.3 (chord
      method).
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
    """Solve exactly if that is cheap, and else by `otherwise`; this is `solver="auto"`.

    The sizes decide, when the update is traced. J̃ must have at most 5e8 numbers. The
    matrix of `cholesky` costs rows · params · min(rows, params) multiplications, which
    may be at most 1e7, or those of 200 products with G, of three forward passes each
    (counted in the traced model, in matrix products and convolutions). Conjugate
    gradients may need as many products if G is ill-conditioned, and a matrix product runs
    several times as fast as a forward pass.

    Args:
      otherwise: the solver to use if the matrix costs more.

    Returns:
      The solver: `cholesky(momentum=0.5)` or `otherwise`.

    Example:
      A matrix for 300 rows and 300 parameters is cheap, one for 3,000 of both is not:

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

    # `cholesky` keeps no iterates, so this tells which of the two has solved.
    def carry(run: Run, chosen: Tree) -> Tree:
        return chosen if run.iterates is None else otherwise.carry(run, chosen)

    return otherwise._replace(
        start=lambda direction, count: direction, solve=solve, carry=carry
    )


def _is_small(system: System) -> bool:
    """Return whether an exact solution should cost less than conjugate gradients."""
    assert system.jacobian_size is not None, "every update provides it"
    rows, columns, forward = system.jacobian_size()
    cost = rows * columns * min(rows, columns)
    worth = cost <= max(_WORTH * 3 * forward, _NOTHING)
    return worth and rows * columns <= _MOST_NUMBERS


def _solve(system: System, before: Tree | None, space: str, corrections: int) -> Run:
    """Solve with the λ of the run, and return how to solve with others."""
    assert system.jacobian is not None, "every update provides it"
    jacobian, decays = system.jacobian()
    decay, excess = _split(decays)
    rows, columns = len(jacobian.residuals), optax.tree.size(system.b)
    in_samples = space == "samples" or (space == "smaller" and rows <= columns)
    build = _in_samples if in_samples else _in_parameters
    matrix = build(jacobian, decay, excess, system.b, before)
    b, dtype = system.b, trees.scalar_dtype(system.b)

    def at_damping(damping: jax.Array) -> Step:
        change, inverse = matrix.solve(damping)
        step = change if before is None else trees.add(change, before)
        correction = None
        if corrections:
            correction = corrected(jacobian, inverse, step, corrections)
        square = trees.dot(step, step)
        curved = jnp.sum(jnp.square(jacobian.product(step))) + decay * square
        if excess is not None:
            curved += trees.dot(step, _times(excess, step)).astype(curved.dtype)
        undamped = (0.5 * curved - trees.dot(b, step)).astype(dtype)
        model = undamped + (0.5 * system.scalar * square).astype(dtype)
        return Step(step, model, jnp.ones((), jnp.int32), correction, undamped)

    # The step is not tested: if other λ are tried, the one for this λ is never used.
    finite = jnp.isfinite(matrix.trace) & jnp.isfinite(jnp.sum(jacobian.residuals))
    reason = jnp.where(finite, Reason.RESIDUAL_ZERO, Reason.NONFINITE)
    last = without_derivative("A corrected step", at_damping(system.scalar))
    models = jnp.stack([jnp.zeros((), dtype), last.model])
    stats = RunStats(jnp.ones((), jnp.int32), reason.astype(jnp.int32), models)
    return Run(last, stats, at_damping=at_damping, anchor=before)


class _System(NamedTuple):
    """(J̃ᵀJ̃ + μI) δ = −∇f, for any λ."""

    # λ ↦ δ − φ, and u ↦ (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu by the same factor.
    solve: Callable[[jax.Array], tuple[Tree, Callable[[jax.Array], Tree]]]
    # That of the matrix, which tells whether all of it is finite.
    trace: jax.Array


def _split(decays: Tree) -> tuple[jax.Array, Tree | None]:
    """Return the least weight decay, and the excess of each parameter's, if any."""
    if jax.tree_util.all_leaves([decays]) and jnp.ndim(decays) == 0:
        return jnp.asarray(decays), None
    dtype = trees.scalar_dtype(decays)
    least = [jnp.min(x, initial=jnp.inf) for x in jax.tree.leaves(decays)]
    least = jnp.min(jnp.stack([x.astype(dtype) for x in least]))
    return least, jax.tree.map(lambda x: x - least.astype(x.dtype), decays)


def _times(numbers: Tree, vectors: Tree) -> Tree:
    """Multiply a vector, or a stack of them, entry by entry."""

    def leaf(number: jax.Array, x: jax.Array) -> jax.Array:
        number = number.astype(x.dtype)
        return (number if x.ndim == number.ndim else number[None]) * x

    return jax.tree.map(leaf, numbers, vectors)


def _in_samples(
    jacobian: Jacobian,
    decay: jax.Array,
    excess: Tree | None,
    b: Tree,
    before: Tree | None,
) -> _System:
    """Solve with J̃W⁻¹J̃ᵀ."""
    # `within` is c in the module's notation, and `beyond` is d. Residuals have the dtype
    # of the outputs, rows that of the parameters.
    within = -jacobian.residuals.astype(trees.scalar_dtype(jacobian.rows))
    # d is not 0 if ∇f is of other data than J̃, or has a part from weight decay. If it is
    # only rounding, it is set to 0, because the step contains d / μ.
    spanned = trees.cast_like(jacobian.transpose(within), b)
    beyond = jax.tree.map(jnp.subtract, b, spanned)
    eps = jnp.finfo(within.dtype).eps
    size = trees.norm(b) + trees.norm(spanned)
    seen = trees.norm(beyond) > _ROUNDING * eps * size
    beyond = jax.tree.map(lambda x: jnp.where(seen, x, 0), beyond)
    # For δ − φ, the right-hand side loses (J̃ᵀJ̃ + weight_decay · I) φ.
    if before is not None:
        within -= jacobian.product(before).astype(within.dtype)
        beyond = trees.axpy(-decay, before, beyond)
        if excess is not None:
            beyond = jax.tree.map(jnp.subtract, beyond, _times(excess, before))
    along = jacobian.product(beyond)
    matrix = trees.gram(jacobian.rows, jacobian.rows)

    def solve(damping: jax.Array) -> tuple[Tree, Callable[[jax.Array], Tree]]:
        weigh, scaled, along_d, mu = lambda x: x, matrix, along, damping + decay
        if excess is not None:
            # W depends on λ, and so does the matrix, which is computed again for each.
            mu = jnp.maximum(mu.astype(matrix.dtype), linalg.least_damping(matrix))
            weigh = functools.partial(_times, _inverse_weights(mu, excess))
            scaled = trees.gram(weigh(jacobian.rows), jacobian.rows)
            along_d = jacobian.product(weigh(beyond))
        factor, mu = linalg.damped_cholesky(scaled, mu)

        def inverse(u: jax.Array) -> Tree:
            u = u.astype(matrix.dtype)
            solved = jacobian.transpose(linalg.cho_solve(factor, u))
            return weigh(sharding.like(trees.cast_like(solved, beyond), beyond))

        step = trees.axpy(1 / mu, weigh(beyond), inverse(within - along_d / mu))
        return step, inverse

    return _System(solve, jnp.trace(matrix))


def _inverse_weights(mu: jax.Array, excess: Tree) -> Tree:
    """Return the diagonal of W⁻¹, for μ > 0."""
    return jax.tree.map(lambda x: mu.astype(x.dtype) / (mu.astype(x.dtype) + x), excess)


def _in_parameters(
    jacobian: Jacobian,
    decay: jax.Array,
    excess: Tree | None,
    b: Tree,
    before: Tree | None,
) -> _System:
    """Solve with J̃ᵀJ̃ + `excess`; the parameters, which are few, form one vector."""
    dtype = trees.widest(*(leaf.dtype for leaf in jax.tree.leaves((jacobian.rows, b))))

    def in_one(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(in_one(jacobian.rows))
    matrix = sharding.contracted(rows, rows, ((0,), (0,)), trees.EXACT)
    if excess is not None:
        matrix += jnp.diag(ravel_pytree(in_one(excess))[0])
    rhs, unravel = ravel_pytree(in_one(b))
    if before is not None:
        phi = ravel_pytree(in_one(before))[0]
        rhs -= jnp.matmul(matrix, phi, precision=trees.EXACT) + decay * phi

    def solve(damping: jax.Array) -> tuple[Tree, Callable[[jax.Array], Tree]]:
        factor, _ = linalg.damped_cholesky(matrix, damping + decay)

        def solved(rhs: jax.Array) -> Tree:
            found = unravel(linalg.cho_solve(factor, rhs).astype(rhs.dtype))
            return trees.cast_like(found, b)

        def inverse(u: jax.Array) -> Tree:
            return solved(ravel_pytree(in_one(jacobian.transpose(u)))[0])

        return solved(rhs), inverse

    return _System(solve, jnp.trace(matrix))
