"""Preconditioned conjugate gradients on M(x) = ½xᵀA x − bᵀx.

This is algorithm 2 of Martens & Sutskever (2012), as one compiled loop with one product
per iteration. It differs from `jax.scipy.sparse.linalg.cg` in that it

1. stops on the progress of M, by a rule of `hfjax.stopping`;
2. returns M at every iterate and keeps some of the iterates (`hfjax.iterates`);
3. stops if pᵀA p ≤ 0 or a product is not finite, and reports which;
4. works for right-hand sides whose squares overflow or underflow;
5. sums in float32 or wider, and never gathers a sharded array.

    >>> import jax.numpy as jnp
    >>> d = jnp.array([1.0, 2.0, 4.0])  # three eigenvalues, three steps
    >>> run = solve(lambda v: d * v, jnp.ones(3), stopping=None)
    >>> print(run.x.round(3), run.num_iterations, Reason(int(run.reason)).name)
    [1.   0.5  0.25] 3 RESIDUAL_ZERO
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.arguments import as_product, as_vector, check_function, describe
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Matvec, NumberOrSchedule, Preconditioner, Tree, ValueFn
from hfjax._tracing import compiled
from hfjax.solvers._inverse import inverse as inverse
from hfjax.solvers._subspace import subspace
from hfjax.solvers.descent import Reason as Reason
from hfjax.solvers.descent import Run as Run
from hfjax.solvers.descent import RunStats as RunStats
from hfjax.solvers.descent import Solver as Solver
from hfjax.solvers.descent import Step as Step
from hfjax.solvers.descent import System as System
from hfjax.solvers.iterates import IterateRule, at_most, grid
from hfjax.solvers.pcg import CGResult as CGResult
from hfjax.solvers.pcg import as_preconditioner, run
from hfjax.solvers.stopping import RULES, StoppingRule, marginal, martens2010


def solve(
    matvec: Matvec,
    b: Tree,
    /,
    *,
    x0: Tree | None = None,
    preconditioner: Preconditioner | None = None,
    max_iterations: int = 250,
    min_iterations: int = 1,
    stopping: StoppingRule | None = martens2010(),
    keep: IterateRule = grid(),
    value_fn: ValueFn | None = None,
    limit: jax.Array | int | None = None,
    replace_every: int | None = None,
) -> CGResult:
    """Minimise M(x) = ½xᵀA x − bᵀx, for symmetric positive semi-definite A.

    Complex numbers are not supported. If pᵀA p ≤ 0 for a direction p, so that M falls
    along p without bound, the run ends at the current iterate. In the very first
    iteration it then takes a step along p = P⁻¹(b − A x₀), about as long as b.

    The result has no derivative, because a run that stops early is not a smooth function
    of `b`; differentiating it raises an error. `inverse` can be differentiated.

    Args:
      matvec: `v -> A v`, on trees like `b`.
      b: the right-hand side, real; integers are converted to floats.
      x0: the starting point; `None` is 0 and saves a product.
      preconditioner: `r -> P⁻¹ r`, of any scale; `None` is the identity.
      max_iterations: a Python integer, because it sets the size of `model_values`.
      min_iterations: iterations to run before the stopping rule is first consulted.
      stopping: a rule of `hfjax.stopping`; `None` runs until `max_iterations`, or until
        the residual is zero to rounding.
      keep: which iterates to keep, a rule of `hfjax.iterates`.
      value_fn: `x -> f`, for `hfjax.iterates.best` and `.guarded`.
      limit: a limit below `max_iterations`, as a number that may be traced.
      replace_every: recompute the residual as A x − b, and M with it, every so many
        iterations and at `x0`. Each time costs one more product, `matvec.exact` if
        `matvec` is an `Approximate`. `coefficients` end at the first time. `None` is
        never.

    Returns:
      The result; its `x` has the dtypes of `b`.

    Raises:
      TypeError: if an iteration limit is not a Python integer, or another argument has
        the wrong type.
      ValueError: if a limit is negative, or if `x0` or a product is not a tree like `b`.

    References:
      Martens & Sutskever (2012), section 4, algorithm 2; van der Vorst & Ye (2000),
      "Residual replacement strategies for Krylov subspace iterative methods".
    """
    options.check_count("max_iterations", max_iterations, low=0)
    options.check_count("min_iterations", min_iterations, low=0)
    if replace_every is not None:
        options.check_count("replace_every", replace_every, low=1)
    options.check_range("limit", limit, low=0)
    check_run(stopping, keep)
    if value_fn is not None:
        check_function("value_fn", value_fn, "x -> f")
    matvec, b = as_product("matvec", matvec), as_vector("b", b)
    # The loop carries x in the dtypes of b, so x0 must start with them.
    if x0 is not None:
        x0 = trees.cast_like(as_vector("x0", x0, like=b, whose="`b`"), b)
    preconditioner = as_preconditioner(preconditioner)

    def solved(b: Tree, x0: Tree | None) -> CGResult:
        return run(
            matvec,
            b,
            preconditioner,
            keep,
            max_iterations=max_iterations,
            stopping=stopping,
            x0=x0,
            value_fn=value_fn,
            limit=limit,
            min_iterations=min_iterations,
            replace_every=replace_every,
        )

    result = compiled.run(solved, b, x0)
    return without_derivative("A run of conjugate gradients", result)


def check_run(stopping: StoppingRule | None, keep: IterateRule) -> None:
    """Raise an error unless both rules of a run have the right type.

    Args:
      stopping: a rule of `hfjax.stopping`, or `None`.
      keep: a rule of `hfjax.iterates`.

    Raises:
      TypeError: if one of them is something else.
    """
    if stopping is not None:
        check_function("stopping", stopping, "progress -> bool")
        if stopping in RULES:
            name = stopping.__name__
            msg = f"`stopping` is the function `{name}`: call it, as in `{name}(…)`."
            raise TypeError(msg)
    if not isinstance(keep, IterateRule):
        msg = (
            "`keep` must be an `IterateRule` of `hfjax.iterates`, as `grid()`, got "
            f"{describe(keep)}."
        )
        raise TypeError(msg)


def conjugate_gradient(
    *,
    max_iterations: int = 250,
    min_iterations: int = 1,
    stopping: StoppingRule | None = marginal(),
    keep: IterateRule = at_most(),
    warm_start_decay: NumberOrSchedule | None = None,
    warm_start_from: str = "last",
    limit: NumberOrSchedule | None = None,
    replace_every: int | None = None,
) -> Solver:
    """Solve for the direction by `solve`, from 0 or from the last update's solution.

    A warm start is x₀ = `warm_start_decay` · (the direction carried over), where M may be
    positive. Stopping rules on the progress of M then wait until M < 0. If something else
    ends the run before that, such as `max_iterations`, the run is repeated from 0.

    The solver of Martens & Sutskever (2012) is

        conjugate_gradient(stopping=martens2010(), keep=grid(), warm_start_decay=0.95)

    The defaults were faster with Kronecker factors, on every problem that was compared
    (`benchmarks/results/autoencoders.md`).

    Args:
      max_iterations: the most iterations of a run; a Python integer.
      min_iterations: iterations to run before the stopping rule is first consulted.
      stopping: a rule of `hfjax.stopping`, or `None`.
      keep: which iterates backtracking may choose among: `at_most`, `grid`, `every`,
        `best` or `guarded` of `hfjax.iterates`. Each is a vector like the parameters.
      warm_start_decay: a factor in [0, 1], a number or schedule; `None` starts from 0,
        which saves a product.
      warm_start_from: what to carry over: the `"last"` iterate of the run, the one
        `"chosen"` by backtracking, or, if `keep` evaluates f, the `"best"` one, with the
        lowest f. Without a warm start, `"last"` carries the chosen one, too.
      limit: a limit below `max_iterations`, a number or schedule; for instance to shorten
        runs near the end of training, so that they do not overfit small batches.
      replace_every: as in `solve`, for products in low precision
        (`hfjax.curvature.with_precision`).

    Returns:
      The solver.

    Raises:
      TypeError: if a count is not a Python integer.
      ValueError: if an option is out of range.

    References:
      Martens & Sutskever (2012), sections 8.5, 10, 12.2 (`limit`) and 13 (`"best"`).
    """
    options.check_count("max_iterations", max_iterations, low=1)
    options.check_count("min_iterations", min_iterations, low=0)
    options.check_range("warm_start_decay", warm_start_decay, low=0.0, high=1.0)
    sources = ("last", "chosen", "best") if keep.evaluates else ("last", "chosen")
    options.check_choice("warm_start_from", warm_start_from, sources)
    options.check_range("limit", limit, low=1)
    if replace_every is not None:
        options.check_count("replace_every", replace_every, low=1)

    def start(direction: Tree, count: jax.Array) -> Tree | None:
        if warm_start_decay is None:
            return None
        return trees.scale(options.read(warm_start_decay, count), direction)

    def solve_from(system: System, x0: Tree | None) -> Run:
        run_from = functools.partial(
            solve,
            system.matvec,
            system.b,
            preconditioner=system.preconditioner(),
            max_iterations=max_iterations,
            min_iterations=min_iterations,
            stopping=stopping,
            keep=keep,
            # Only called if `keep` evaluates f.
            value_fn=system.batch_value if keep.data == "batch" else system.value,
            limit=None if limit is None else _limit(limit, system.count),
            replace_every=replace_every,
        )
        result = run_from() if x0 is None else _or_from_zero(run_from, x0)
        found = as_run(result)
        # Steps before and after a replacement of the residual are not conjugate.
        if not system.tikhonov or keep.evaluates or replace_every is not None:
            return found
        space = subspace(result.kept, result.model_values, system.b, system.scalar)

        def at_damping(damping: jax.Array) -> Step:
            direction, model, undamped = space.solve(damping)
            return Step(direction, model, result.num_iterations, undamped=undamped)

        return found._replace(at_damping=at_damping)

    def carry(run: Run, chosen: Tree) -> Tree:
        if warm_start_from == "best" and run.iterates is not None:
            values = run.iterates.values
            best = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
            return trees.row(run.iterates.iterates, best)
        # Without a warm start no run reads what is carried over, and the chosen step is
        # in memory anyway.
        last = warm_start_from == "last" and warm_start_decay is not None
        return run.last.direction if last else chosen

    return Solver(start, solve_from, carry, max_iterations=max_iterations)


def as_run(result: CGResult) -> Run:
    """Convert the result of conjugate gradients to what a solver returns.

    Args:
      result: of a run from 0 or from a warm start.

    Returns:
      The last step and the kept iterates, without `at_damping`.
    """
    stats = RunStats(
        result.num_iterations, result.reason, result.model_values, result.coefficients
    )
    model = result.model_values[result.num_iterations]
    return Run(Step(result.x, model, result.num_iterations), stats, result.kept)


def _limit(limit: NumberOrSchedule, count: jax.Array) -> jax.Array:
    return jnp.asarray(jnp.floor(options.read(limit, count)), jnp.int32)


def _or_from_zero(run: Callable[..., CGResult], x0: Tree) -> CGResult:
    """Run from x0, and once more from 0 if M has not become negative."""
    # A loop of one or two rounds, so that the run is compiled only once.
    zero = sharding.zeros_like(x0)
    unknown = sharding.zeros(jax.eval_shape(lambda: run(x0=x0)))

    def unfinished(carry: tuple[jax.Array, Tree, CGResult]) -> jax.Array:
        rounds, _, result = carry
        stuck = ~(result.model_values[-1] < 0) & (result.reason != Reason.NONFINITE)
        return (rounds == 0) | ((rounds == 1) & stuck)

    def again(carry: tuple[jax.Array, Tree, CGResult]) -> tuple:
        rounds, x0, _ = carry
        return rounds + 1, zero, run(x0=x0)

    start = (jnp.zeros((), jnp.int32), x0, unknown)
    return jax.lax.while_loop(unfinished, again, start)[2]
