"""The exact damped step, from a matrix in sample space (kernel or Woodbury form) or J̃ᵀJ̃.

Let G = J̃ᵀJ̃ + weight_decay · I, where J̃ has a row for each output of each example, let
μ = λ + weight_decay, and −∇f = J̃ᵀc + d. The step solves (J̃ᵀJ̃ + μI) δ = −∇f. By the
push-through identity, it is

    δ = J̃ᵀ(J̃J̃ᵀ + μI)⁻¹(c − J̃d/μ) + d/μ.

If parameters have different weight decays, β in place of the number, μ is λ plus the
least of them. Let W be 1 + (β − min β)/μ on its diagonal; then

    δ = W⁻¹J̃ᵀ(J̃W⁻¹J̃ᵀ + μI)⁻¹(c − J̃W⁻¹d/μ) + W⁻¹d/μ.

By default, the smaller of both matrices is used. J̃ is stored if it has at most 5e8 numbers;
a larger one is computed in parts, as often as it is needed, so that any number of examples
and parameters will do as long as one of both is at most some 10,000.
Each other λ costs one Cholesky factor, so `hfjax.damping.searched` works here, too. The
same factor corrects the step for the nonlinearity of the outputs (`corrections`), and one
update then goes as far as tens without. Use it for fits to 1e-6 and far below, where G is
ill-conditioned, as it is for differential equations.

These matrices are squares of J̃, and a square has half of the digits: its rounding hides
singular values of J̃ below √ε of the largest. Where λ is as small as that rounding, J̃
itself is decomposed into singular values, which serve all λ of the update.
"""

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import NumberOrSchedule, Tree
from hfjax.solvers._exact_steps import solved, solved_within
from hfjax.solvers.descent import Run, Solver, System

# 200 and the momentum were measured on differential equations
# (`benchmarks/results/equations.md`).
_WORTH = 200
"""For `"auto"`, the matrix may cost as many multiplications as this many products."""
_NOTHING = 10**7
"""Multiplications that `"auto"` neglects: some milliseconds."""
_MOST_STORED = 5 * 10**8
"""The most numbers of J̃ that are stored: 4 GB in float64."""
_LARGEST = 10**4
"""For `"auto"`, the most rows of the matrix: 800 MB in float64, and its factor."""
_MOMENTUM = 0.5
"""The momentum for `"auto"`."""


def cholesky(
    *,
    space: str = "smaller",
    momentum: NumberOrSchedule | None = None,
    corrections: int = 16,
    stored: int = _MOST_STORED,
) -> Solver:
    """Solve for the direction exactly, by a Cholesky factor, or by singular values.

    (G + λD) δ = −∇f + λDφ, where φ = `momentum` · (the last step): λ keeps the step near φ
    instead of near 0. G is the Gauss-Newton matrix. D is I, or the diagonal of G if the
    damping rule has `matrix="curvature_diagonal"`, as in the classical method of Levenberg
    and Marquardt. No preconditioner is built. The model needs derivatives in reverse mode
    only.

    The result is δ + c. With residuals r̃ such that J̃ᵀr̃ is the gradient of the loss, c
    corrects for the error of their linear model,

        c ← −(G + λI)⁻¹ J̃ᵀ (r̃(θ + δ + c) − r̃ − J̃(δ + c)),

    from c = 0, as long as the error changes less each time, and by more than a tenth of
    the residuals left. M and ρ refer to δ, and f to θ + δ + c; the line search goes along
    θ + αδ + α²c.

    Apart from f and ∇f, an update costs

    | what | operations |
    |---|---|
    | J̃ | a backward pass for each row of an example, mostly one for each output |
    | its matrix, n rows | 5/4 n · rows · params |
    | each λ | n³ / 3; with several weight decays and J̃J̃ᵀ, also that matrix |
    | each correction | a forward pass, 4 · rows · params and 2 n² |
    | singular values of J̃ | some 4 n · rows · params and 20 n³, and three copies of J̃ |

    All of it is in float32 or wider. J̃ is decomposed where λ starts below 1000 ε times the
    trace of the matrix, and J̃ has at most 1e8 numbers; λ may then go down to (10 ε)²
    times the largest eigenvalue of the matrix, otherwise to ε times its trace.

    Args:
      space: `"samples"`, J̃J̃ᵀ; `"parameters"`, J̃ᵀJ̃; or `"smaller"` of them.
      momentum: in [0, 1], a number or schedule, for batches that are drawn anew in each
        update; `None` is 0.
      corrections: the most corrections of a step; 0 takes the damped Gauss-Newton step
        itself. For squared errors and a model linear in θ, c = 0. Corrected steps are
        longer: if f has several minima, they may lead to another one than the nearest.
      stored: the most numbers, rows · params, of a J̃ that is kept in memory. A larger one
        is computed in parts of half as many, of whole examples and at most a microbatch: once
        for J̃ᵀJ̃, once for each pair of parts for J̃J̃ᵀ; and the model is run again in each
        correction. Then no singular values are computed. Arrays that are sharded by their
        type, structural damping, and f of a whole batch store J̃ whatever its size.

    Returns:
      The solver.

    Raises:
      TypeError: if `stored` or `corrections` is not a Python integer.
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
    options.check_count("stored", stored, low=0)

    def start(direction: Tree, count: jax.Array) -> Tree | None:
        if momentum is None:
            return None
        return trees.scale(options.read(momentum, count), direction)

    def solve(system: System, x0: Tree | None) -> Run:
        return solved(system, x0, space, corrections, stored)

    return Solver(start, solve, reads="jacobian")


def trust_region(*, corrections: int = 16, scaled: bool = False) -> Solver:
    """Solve exactly within a trust region, for `damping=hfjax.trust_region.radius()`.

    δ minimises M over ‖δ‖ ≤ radius. It is the step of `cholesky` for the least λ ≥ 0 with
    which it is so short, to a tenth of the radius. One decomposition of J̃, into singular
    values, finds λ; so λ may be as low as the rounding of J̃ allows. Of δ + c and δ, the one
    with the lower f is taken, and δ if c is longer than 0.375 ‖δ‖.

    Apart from f and ∇f, an update costs J̃, its singular values (some 10 · rows · params ·
    min(rows, params) operations, more with several weight decays), the corrections as in
    `cholesky`, and f twice. J̃ must fit on one device, with three copies. A search
    for λ costs more and takes longer steps; a region holds back steps into places that M
    knows nothing about. It is the better choice for models of few parameters that mean
    something, from a start that may be far off.

    Args:
      corrections: as in `cholesky`.
      scaled: measure δ by √D δ, where D is the diagonal of G: for parameters of very
        different scales.

    Returns:
      The solver.

    Raises:
      TypeError: if `corrections` is not a Python integer.
      ValueError: if it is negative.

    Example:
      A radius of 0.5, and a step of 1 without it:

      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> region = hfjax.trust_region.radius(init=0.5)
      >>> tx = hfjax.hessian_free(f, damping=region, solver=trust_region())
      >>> params, batch = jnp.zeros(1), (jnp.ones((1, 1)), jnp.ones((1, 1)))
      >>> value, grads = f.value_and_grad(params, batch)
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> print(updates.round(3), state.damping)  # the next radius
      [0.5] 0.75

    References:
      Moré (1978), "The Levenberg-Marquardt algorithm: implementation and theory".
    """
    options.check_count("corrections", corrections, low=0)

    def solve(system: System, _: Tree | None) -> Run:
        if scaled and system.root is None:
            system = system._replace(root=lambda d: jax.tree.map(jnp.sqrt, d))
        return solved_within(system, corrections)

    return Solver(lambda *_: None, solve, scalar="radius", reads="jacobian")


def where_small(otherwise: Solver) -> Solver:
    """Solve exactly if that is cheap, and else by `otherwise`; this is `solver="auto"`.

    The sizes decide, when the update is traced. The matrix of `cholesky` must have at most
    10,000 rows. It costs rows · params · min(rows, params) multiplications, which
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
    return worth and min(rows, columns) <= _LARGEST
