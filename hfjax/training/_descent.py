"""A whole run of nonlinear least squares as one loop, which `jit` and `vmap` take.

In each round, J and r are computed, the tests of MINPACK and one for rounding are made,
and an update of `hfjax.hessian_free` is done, whose solver is handed this J.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax._core import trees
from hfjax._core.packing import packing
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import compiled
from hfjax.curvature.jacobian import Jacobian, jacobian
from hfjax.globalization.damping import Damping
from hfjax.globalization.linesearch import armijo
from hfjax.solvers.descent import Reason as SolverReason
from hfjax.solvers.descent import Run as RunOfSolver
from hfjax.solvers.descent import Solver, System
from hfjax.training._factors import as_matrix, column_lengths, gauss_newton
from hfjax.training._residuals import Args, Residuals
from hfjax.training._run import History, Reason, empty_history
from hfjax.update.point import rounding_noise
from hfjax.update.state import HessianFreeInfo, HessianFreeState
from hfjax.update.transform import hessian_free

_Ended = tuple[Params, jax.Array]  # a step, and f at its end
_HIDDEN = 30
"""So many updates in a row that rounding hides end a run."""
_QUIET = 3
"""So many of them in which the gradient has not fallen do, if λ has not either."""
_FALLS = 0.5
"""The gradient has fallen if it is below this share of the lowest one."""
_ROUNDINGS = 10
"""f is off by several times what a rounding of the parameters changes."""
_PART = 0.05
"""λ has no part in a step if it is less than this of what the slope promises."""
_REJECTED, _SHRUNK = 30, 10
"""So many failed updates in a row end a run; the second if rounding now hides steps."""


class Tolerances(NamedTuple):
    """When a run ends; see `hfjax.least_squares`."""

    gtol: jax.Array
    xtol: jax.Array
    ftol: jax.Array


class Run(NamedTuple):
    """A run so far: what a fit holds, and what its tests count."""

    params: Params
    state: Any  # a `HessianFreeState`
    value: jax.Array
    history: History
    reason: jax.Array
    count: jax.Array
    hidden: jax.Array  # updates in a row that rounding hides
    quiet: jax.Array  # those since the gradient last fell, as far as it can be seen to
    lowest: jax.Array  # the cosine then
    rejected: jax.Array  # updates in a row that were to lower f visibly, and did not


class Problem(NamedTuple):
    """What defines a run, apart from arrays."""

    residual_fn: Callable[..., Tree]
    loss: str
    scale: float
    mode: str
    solver: Solver
    damping: Damping
    max_updates: int

    def objective(self) -> Residuals:
        """Return f."""
        return Residuals(
            self.residual_fn, loss=self.loss, scale=self.scale, mode=self.mode
        )

    def optimizer(
        self, solver: Solver | None = None
    ) -> optax.GradientTransformationExtraArgs:
        """Return what does an update, perhaps with a solver that is handed J."""
        solver = self.solver if solver is None else solver
        # A step that raises f is evidence about the region, not about its own length.
        search = None if solver.scalar == "radius" else armijo()
        return hessian_free(
            self.objective(), damping=self.damping, solver=solver, line_search=search
        )

    def start(self, params: Params, state: HessianFreeState | None) -> Run:
        """Return the run before its first update."""
        dtype = trees.scalar_dtype(params)
        if state is None:
            # No solver here has a preconditioner. Its place in the state is for D, so that
            # a run that goes on from its state does so with the same D.
            state = cast("HessianFreeState", self.optimizer().init(params))
            lengths = jnp.zeros(optax.tree.size(params), dtype)
            state = state._replace(preconditioner=lengths)
        return Run(
            params=params,
            state=state,
            value=jnp.full((), jnp.nan, dtype),
            history=empty_history(self.max_updates, dtype),
            reason=jnp.zeros((), jnp.int32),
            count=jnp.zeros((), jnp.int32),
            hidden=jnp.zeros((), jnp.int32),
            quiet=jnp.zeros((), jnp.int32),
            lowest=jnp.full((), jnp.inf, dtype),
            rejected=jnp.zeros((), jnp.int32),
        )

    def linear(self, params: Params, args: Args) -> tuple[Tree, jax.Array]:
        """Return J, a tree like the parameters that leads with the residuals, and r."""

        def linear(params: Params, args: Args) -> tuple[Tree, jax.Array]:
            objective = self.objective()
            return jacobian(objective, params, objective.batch(params, args))[:2]

        return compiled.run(linear, params, args)


def runner(problem: Problem) -> Callable[..., Run]:
    """Return `(run, args, tolerances, limit) -> run`, which ends a run or interrupts it.

    It is the same function for the same problem, so that it is traced once.
    """
    try:
        return _kept(problem)
    except TypeError:  # A function or a component that has no hash.
        return _kept.__wrapped__(problem)


@functools.lru_cache(maxsize=64)
def _kept(problem: Problem) -> Callable[..., Run]:
    return compiled.once(functools.partial(_advance, problem))


def _advance(
    problem: Problem, run: Run, args: Args, tolerances: Tolerances, limit: jax.Array
) -> Run:
    objective = problem.objective()
    batch = objective.batch(run.params, args)

    def going(run: Run) -> jax.Array:
        return (run.reason == Reason.RUNNING) & (run.count < limit)

    def step(run: Run) -> Run:
        found = jacobian(objective, run.params, batch)
        here = _place(objective, run.params, batch, found)
        run = _in_region(problem.solver, run, here.lengths)
        tx = problem.optimizer(_handed(problem.solver, found, run))
        return _updated(problem, tx, run, batch, here, tolerances)

    return jax.lax.while_loop(going, step, run)


def _in_region(solver: Solver, run: Run, lengths: jax.Array) -> Run:
    """Let D hold the largest ‖Jⱼ‖ so far, and multiply the first radius by ‖D θ‖."""
    d = run.state.preconditioner
    d = jnp.fmax(d, lengths.astype(d.dtype))  # NaN must not stay.
    state = run.state._replace(preconditioner=d)
    if solver.scalar == "radius":
        size = trees.norm(jnp.where(d > 0, d, 1) * _flat(run.params))
        first = (state.count == 0) & (size > 0)
        times = jnp.where(first, size, 1).astype(state.damping.dtype)
        state = state._replace(damping=times * state.damping)
    return run._replace(state=state)


def _handed(solver: Solver, found: Jacobian, run: Run) -> Solver:
    """Return a solver that reads a Jacobian that is known, and the D of the whole run."""
    packed = packing(trees.widen(run.params))
    rows = found.after(packed.unpack, packed.pack)
    root = packed.pack(_like(run.params, run.state.preconditioner))

    def solve(system: System, x0: Tree | None) -> RunOfSolver:
        if solver.scalar == "radius" or system.root is not None:
            system = system._replace(root=lambda _: root)
        return solver.solve(system._replace(jacobian=lambda _: (rows, None)), x0)

    return solver._replace(solve=solve)


class _Place(NamedTuple):
    """What J and r tell of the present parameters."""

    gradient: Params
    cosine: jax.Array  # the largest |Jⱼᵀr| / (‖Jⱼ‖ ‖r‖)
    lengths: jax.Array  # ‖Jⱼ‖
    square: jax.Array  # ½ ‖e‖², with e how far rounding θ moves r
    noise: jax.Array  # how far e moves f
    known: jax.Array  # whether f is finite
    finite: jax.Array  # whether J is, too
    # A step, f at its end, a limit ↦ the same, or the step without damping and f there if
    # that is below the limit.
    polished: Callable[[Params, jax.Array, jax.Array], _Ended]


def _place(
    objective: Residuals, params: Params, batch: Batch, found: Jacobian
) -> _Place:
    matrix = as_matrix(found.rows)
    r = found.residuals.astype(matrix.dtype)
    lengths = column_lengths(matrix)
    gradient = found.transpose(r)
    product = lengths * trees.norm(r)
    cosines = jnp.abs(_flat(gradient)) / jnp.where(product > 0, product, 1)
    # Each parameter is off by up to half of its rounding, and so is what a model computes
    # from it: e is the order of magnitude of both.
    roundings = jax.tree.map(
        lambda x: float(jnp.finfo(x.dtype).eps) * jnp.abs(x), params
    )
    theta = _flat(roundings).astype(matrix.dtype)
    errors = jnp.matmul(jnp.abs(matrix), theta)
    square = 0.5 * jnp.sum(jnp.square(errors))

    def polished(step: Params, value: jax.Array, limit: jax.Array) -> _Ended:
        last = gauss_newton(found.rows, r, params)
        there = objective.value(optax.apply_updates(params, last), batch)
        there = there.astype(value.dtype)
        # NaN is not good either.
        return trees.select(there <= limit, (last, there), (step, value))

    return _Place(
        gradient=trees.cast_like(gradient, params),
        cosine=jnp.max(cosines, initial=0),
        lengths=lengths,
        square=square,
        noise=_ROUNDINGS * (square + trees.norm(r * errors)),
        known=jnp.isfinite(jnp.sum(r * r)),
        finite=jnp.isfinite(jnp.sum(lengths)) & jnp.isfinite(jnp.sum(r * r)),
        polished=polished,
    )


def _updated(
    problem: Problem,
    tx: optax.GradientTransformationExtraArgs,
    run: Run,
    batch: Batch,
    here: _Place,
    tolerances: Tolerances,
) -> Run:
    """Test whether the run ends here, and if not, update."""
    given = run.state._replace(preconditioner=None)
    step, new = tx.update(here.gradient, given, run.params, batch=batch)
    state = cast("HessianFreeState", new)
    state = state._replace(preconditioner=run.state.preconditioner)
    before, info = state.info.value_before, state.info
    noise = rounding_noise(before) + here.noise.astype(before.dtype)
    early = _first(
        (~here.finite, Reason.NONFINITE),
        (before <= here.square, Reason.ZERO),
        (here.cosine <= tolerances.gtol, Reason.GRADIENT),
    )
    settled = state.damping >= run.state.damping
    settled |= _is_undamped(here, step, info)
    if problem.solver.scalar == "radius":  # At a minimum it holds no step back.
        settled = info.cg_reason != int(SolverReason.BOUNDARY)
    after = info.value_after
    # Where f shows no more, the gradient does: Gauss-Newton steps without damping bring it
    # down to its own rounding.
    step, after = jax.lax.cond(
        run.hidden > 0,
        lambda: here.polished(step, after, before + noise),
        lambda: (step, after),
    )
    hidden = (-info.predicted_change <= noise) & (before - info.value_after <= noise)
    falls = here.cosine < _FALLS * run.lowest
    lowest = jnp.where(falls, here.cosine, run.lowest)
    lowest = jnp.where(hidden, lowest, jnp.inf).astype(run.lowest.dtype)
    quiet = jnp.where(hidden & ~falls, run.quiet + 1, 0)
    hidden = jnp.where(hidden, run.hidden + 1, 0)
    fell = before - info.value_after > noise
    rejected = run.rejected + (hidden == 0).astype(jnp.int32)
    rejected = jnp.where(fell, 0, rejected)
    late = _first(
        (settled & _is_short(here, run.params, step, tolerances.xtol), Reason.STEP),
        (settled & _has_stopped(info, tolerances.ftol), Reason.VALUE),
        (rejected >= jnp.where(hidden > 0, _SHRUNK, _REJECTED), Reason.STUCK),
        ((quiet >= _QUIET) & settled | (hidden >= _HIDDEN), Reason.ROUNDING),
    )
    nan = jnp.full_like(before, jnp.nan)
    row = History(before, here.cosine, state.damping, trees.norm(step), nan)
    history = jax.tree.map(
        lambda kept, x: kept.at[run.count].set(x.astype(kept.dtype)), run.history, row
    )
    new = Run(
        params=optax.apply_updates(run.params, step),
        state=state,
        value=after.astype(run.value.dtype),
        history=history,
        reason=late,
        count=run.count + 1,
        hidden=hidden.astype(jnp.int32),
        quiet=quiet.astype(jnp.int32),
        lowest=lowest,
        rejected=rejected.astype(jnp.int32),
    )
    value = jnp.where(here.known, before, jnp.nan).astype(run.value.dtype)
    ended = run._replace(reason=early, value=value)
    return trees.select(early == Reason.RUNNING, new, ended)


def _first(*tests: tuple[jax.Array, Reason]) -> jax.Array:
    """Return the reason of the first test that holds, or `RUNNING`."""
    reason = jnp.zeros((), jnp.int32)
    for holds, code in reversed(tests):
        reason = jnp.where(holds, jnp.int32(code), reason)
    return reason


def _is_undamped(here: _Place, step: Params, info: HessianFreeInfo) -> jax.Array:
    """Return whether λ had no part in a step, which is then no shorter for it."""
    # From (G + λD) δ = −g, M(δ) = ½ gᵀδ − ½ λ δᵀDδ. Without λ, M is half of gᵀδ, and if λ
    # is all that matters, it is all of it.
    slope = trees.dot(here.gradient, step)
    return info.accepted & (info.predicted_change >= (0.5 + _PART) * slope)


def _is_short(here: _Place, params: Params, step: Params, xtol: jax.Array) -> jax.Array:
    """Return whether ‖D δ‖ ≤ xtol ‖D θ‖ for a step that is not 0."""
    delta, theta = (trees.norm(here.lengths * _flat(x)) for x in (step, params))
    return (delta > 0) & (delta <= xtol * theta)


def _has_stopped(info: HessianFreeInfo, ftol: jax.Array) -> jax.Array:
    """Return whether f has fallen by at most ftol · f, and was expected to."""
    fall, least = info.value_before - info.value_after, ftol * info.value_before
    return info.accepted & (fall <= least) & (-info.predicted_change <= least)


def _flat(params: Params) -> jax.Array:
    return as_matrix(jax.tree.map(lambda x: x[None], params))[0]


def _like(params: Params, flat: jax.Array) -> Params:
    """Return a vector of numbers as a tree like the parameters."""
    with jax.numpy_dtype_promotion("standard"):
        like, unravel = ravel_pytree(trees.widen(params))
        return unravel(flat.astype(like.dtype))
