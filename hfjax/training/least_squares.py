"""Nonlinear least squares: fit the parameters of a curve, or of any model, to rounding.

    fit = hfjax.least_squares(residual_fn, params, *args)     # min ½ Σ r², r = residual_fn(…)
    fit.params, fit.value, fit.reason.words
    fit.covariance(), fit.standard_errors()

Use it where all data fit into one call of the model: curves and spectra, inverse
problems, differential equations with unknown coefficients. For a network with batches use
`hfjax.fit`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, check_function, describe
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Params, Tree
from hfjax._tracing import compiled
from hfjax.globalization import trust_region
from hfjax.globalization.damping import Damping, searched
from hfjax.solvers import sample_space
from hfjax.solvers.descent import Solver
from hfjax.training import _factors
from hfjax.training._descent import Problem, Run, Tolerances, runner
from hfjax.training._residuals import RHO, Args
from hfjax.training._run import Fit, Reason, Watch, is_traced
from hfjax.update.fitting import check_part
from hfjax.update.state import HessianFreeState


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "state", "value", "history", "reason", "args"],
    meta_fields=["problem"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class LeastSquaresFit(Fit):
    """The result of `least_squares`.

    Attributes:
      args: the data that the residuals were given.
      problem: what else defines the residuals.
    """

    args: Args
    problem: Problem

    def covariance(self, *, scale: bool = True) -> jax.Array:
        """Return the covariance of the parameters, σ² (JᵀJ)⁻¹, with J at `params`.

        This is the covariance of the estimate if the residuals at the true parameters are
        independent and alike, and the model is close to linear within the errors.

        Args:
          scale: estimate σ² = 2f / (residuals − parameters). With `False`, σ = 1: the
            residuals have been divided by their known standard deviations.

        Returns:
          A matrix `[parameters, parameters]`, in the order of
          `jax.flatten_util.ravel_pytree(params)`. Under `jax.jit`, infinite for parameters
          that the residuals do not determine.

        Raises:
          ValueError: if there are too few residuals, or if they do not determine all
            parameters; the message names those.

        Example:
          The mean of 4 numbers, whose variance is that of a number divided by 4:

          >>> numbers = jnp.array([1.0, 2.0, 3.0, 6.0])
          >>> fit = least_squares(lambda mean, x: x - mean, jnp.zeros(()), numbers)
          >>> print(
          ...     fit.params,
          ...     fit.covariance().round(4),
          ...     (numbers.var(ddof=1) / 4).round(4),
          ... )
          3.0 [[1.1667]] 1.1667
        """
        rows, residuals = self.problem.linear(self.params, self.args)
        found = compiled.run(_factors.spread, rows, residuals)
        count = len(jax.tree.leaves(rows)[0])
        free = count - optax.tree.size(self.params)
        if free < int(scale):
            msg = (
                f"{count} residuals are too few for the covariance of "
                f"{count - free} parameters" + ", and to estimate σ." * scale
            )
            raise ValueError(msg)
        if not is_traced(found):
            _factors.check_known(found.share, self.params)
        variance = 2 * self.value / max(free, 1) if scale else jnp.ones(())
        return variance.astype(found.covariance.dtype) * found.covariance

    def standard_errors(self, *, scale: bool = True) -> Params:
        """Return the standard error of each parameter: the square roots of the variances.

        Args:
          scale: as in `covariance`.

        Returns:
          A tree like `params`.
        """
        variances = jnp.diag(self.covariance(scale=scale))
        with jax.numpy_dtype_promotion("standard"):
            flat, like = ravel_pytree(self.params)
            return like(jnp.sqrt(variances).astype(flat.dtype))


def least_squares(
    residual_fn: Callable[..., Tree],
    params: Params,
    *args: Tree,
    loss: str = "linear",
    scale: float = 1.0,
    jacobian: str = "auto",
    solver: Solver | None = None,
    damping: Damping | None = None,
    gtol: float = 0.0,
    xtol: float = 0.0,
    ftol: float = 0.0,
    max_updates: int = 1000,
    progress: bool | str | Callable[[str], Any] = False,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    state: HessianFreeState | None = None,
) -> LeastSquaresFit:
    """Minimise f(θ) = ½ Σ r², where r = `residual_fn(params, *args)`.

    Each update solves (JᵀJ + λD²) δ = −Jᵀr exactly, where J is the derivative of r, with
    the least λ ≥ 0 for which ‖D δ‖ is within a radius, and corrects δ for the nonlinearity
    of r (`hfjax.sample_space.trust_region`). D has the largest norm so far of each column
    of J on its diagonal, so that the units of parameters do not matter. The first radius
    is ‖D θ‖, or 1 if that is 0; it adapts to how well J predicts r
    (`hfjax.trust_region.radius`). By default a run goes on until rounding hides all further
    progress; a tolerance ends it sooner. Weights are yours to apply: return r / σ.

    The run is compiled once for each `residual_fn` and shapes of `params` and `args`: pass
    data as `args`, and the same function again. As with `jax.jit`, arrays that a function
    closes over are read when it is first called. Under `jax.vmap`, a call solves many
    problems at once; inside of `jit` and `vmap`, `reason` is a number, and `progress` and
    `callback` are not available.

    Args:
      residual_fn: `(params, *args) -> residuals`, an array of real floats of any shape,
        or a tree of them.
      params: where to start, an array of floats or a tree of them.
      *args: data for `residual_fn`, arrays or trees of them.
      loss: "linear"; or for data with outliers "soft_l1", "huber", "cauchy" or "arctan".
        Then f = ½ Σ s² ρ((r/s)²), with ρ as in SciPy's `least_squares`.
      scale: s: residuals beyond it count as outliers.
      jacobian: how to compute J: "forward", by a forward pass for each parameter;
        "reverse", by a backward pass for each residual; "auto", forward if there are
        fewer parameters than residuals. Forward mode also differentiates
        `jax.lax.while_loop`.
      solver: from `hfjax.sample_space`; `None` is `trust_region(scaled=True)`.
      damping: the rule for λ or the radius; `None` is `hfjax.damping.searched()`, or
        `hfjax.trust_region.radius(shrink=1 / 4, grow=2)`. A first radius counts in units
        of ‖D θ‖.
      gtol: end when the largest cosine between the residuals and their derivative by a
        parameter is at most this, |Jⱼᵀr| ≤ `gtol` ‖Jⱼ‖ ‖r‖ for all j.
      xtol: end when a step is at most this, ‖D δ‖ ≤ `xtol` ‖D θ‖.
      ftol: end when f falls by at most `ftol` · f, and was expected to.
      max_updates: the most updates.
      progress: as in `hfjax.fit`: `True` draws a bar or logs lines, "rich", "tqdm" and
        "lines" choose, and a function such as `print` is called with lines.
      callback: called after each update with a dictionary: `update`, `seconds`, the
        fields of `History`, and `params`. If it returns `True`, the run ends. Its
        method `close`, if it has one, is called at the end.
      state: `state` of an earlier fit, to go on from its `params`.

    Returns:
      A `LeastSquaresFit`.

    Raises:
      ImportError: if `progress` needs a package that is not installed.
      TypeError: if parameters or residuals are not real floats, or an option has the
        wrong type.
      ValueError: if there are no residuals, if they are not finite at the start, or if an
        option is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> def residual_fn(params, x, y):
      ...     return params["height"] * jnp.exp(-params["rate"] * x) - y
      >>> x = jnp.linspace(0.0, 3.0, 20)
      >>> y = 2.5 * jnp.exp(-1.3 * x)
      >>> fit = least_squares(residual_fn, {"height": 1.0, "rate": 1.0}, x, y)
      >>> print({name: round(float(p), 4) for name, p in fit.params.items()})
      {'height': 2.5, 'rate': 1.3}

      Three data sets at once:

      >>> import jax
      >>> one = lambda y: least_squares(residual_fn, {"height": 1.0, "rate": 1.0}, x, y)
      >>> fits = jax.vmap(one)(jnp.array([1.0, 2.0, 3.0])[:, None] * y)
      >>> print(fits.params["height"].round(3))
      [2.5 5.  7.5]

    References:
      Moré (1978), "The Levenberg-Marquardt algorithm: implementation and theory" (`gtol`,
      `xtol`, `ftol`); Triggs et al. (2000), "Bundle adjustment: a modern synthesis"
      (robust losses); Transtrum & Sethna (2012) (corrections).
    """
    problem = _problem(residual_fn, loss, scale, jacobian, solver, damping, max_updates)
    for name, tolerance in (("gtol", gtol), ("xtol", xtol), ("ftol", ftol)):
        options.check_range(name, tolerance, low=0.0)
    if not (state is None or isinstance(state, HessianFreeState)):
        msg = f"`state` must be that of an earlier fit, got {describe(state)}."
        raise TypeError(msg)
    watch = Watch(progress, callback)
    # Of no weak type, as the result is of none: the same program goes on from it.
    params = jax.tree.map(lambda x: x.astype(x.dtype), as_params(params))
    args = jax.tree.map(_as_array, args)
    start = problem.start(params, state)
    dtype = trees.scalar_dtype(params)
    tolerances = Tolerances(*(jnp.asarray(x, dtype) for x in (gtol, xtol, ftol)))
    run = runner(problem)

    def advance(now: Run, limit: int) -> Run:
        return run(now, args, tolerances, jnp.asarray(limit, jnp.int32))

    def result(end: Run) -> LeastSquaresFit:
        reached = (end.reason == Reason.RUNNING) & (end.count >= max_updates)
        reason = jnp.where(reached, Reason.UPDATES, end.reason)
        found = LeastSquaresFit(*end[:4], reason, args, problem)
        return without_derivative("A fit", found)

    # A function that closes over what is traced shows it only in what it returns.
    end = advance(start, 1 if watch.is_needed else max_updates)
    if is_traced(end, args):
        if watch.is_needed:
            msg = (
                "`progress` and `callback` are not available inside of `jit` or `vmap`."
            )
            raise ValueError(msg)
        return result(end)
    if watch.is_needed:
        with watch.over(None):
            end = _watched(end, advance, max_updates, watch)
    if end.reason == Reason.NONFINITE and end.count == 0:
        msg = (
            "The residuals, or their derivatives, are not finite at the start: "
            f"f is {end.value}. Start from other `params`."
        )
        raise ValueError(msg)
    found, updates = result(end), int(end.count)
    history = jax.tree.map(lambda x: x[:updates], found.history)
    return dataclasses.replace(found, reason=Reason(int(found.reason)), history=history)


def _problem(
    residual_fn: Callable[..., Tree],
    loss: str,
    scale: float,
    mode: str,
    solver: Solver | None,
    damping: Damping | None,
    max_updates: int,
) -> Problem:
    check_function("residual_fn", residual_fn, "(params, *args) -> residuals")
    options.check_choice("loss", loss, tuple(RHO))
    options.check_range("scale", scale, low=0.0, open_low=True)
    options.check_choice("jacobian", mode, ("auto", "forward", "reverse"))
    check_part("solver", solver, Solver, none=True)
    check_part("damping", damping, Damping, none=True)
    # The same parts in each call, or the run would be compiled again.
    solver = _within() if solver is None else solver
    if damping is None:
        damping = _region() if solver.scalar == "radius" else _search()
    options.check_count("max_updates", max_updates, low=1)
    if not options.is_plain_number(scale):
        msg = f"`scale` must be a Python number, got {describe(scale)}."
        raise TypeError(msg)
    return Problem(
        residual_fn, loss, float(scale), mode, solver, damping, int(max_updates)
    )


_search = functools.cache(searched)
_within = functools.cache(functools.partial(sample_space.trust_region, scaled=True))
_region = functools.cache(
    functools.partial(trust_region.radius, shrink=1 / 4, grow=2.0, maximum=1e30)
)


def _as_array(leaf: Any) -> jax.Array:
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        msg = (
            f"Every leaf of `args` must be an array of numbers, got {describe(leaf)}: let "
            "`residual_fn` close over anything else."
        )
        raise TypeError(msg) from error


def _watched(
    start: Run,
    advance: Callable[[Run, int], Run],
    max_updates: int,
    watch: Watch,
) -> Run:
    """Run on from the first update, outside of `jit`, one update at a time."""
    run, told, ended = start, 0, False
    while True:
        if run.count > told:
            told = int(run.count)
            row = jax.tree.map(lambda x, k=told - 1: x[k], run.history)
            ended = watch.tell(told, row, run.params, {})
        if ended or run.reason != Reason.RUNNING or run.count >= max_updates:
            break
        run = advance(run, told + 1)
    reason = Reason(int(run.reason))
    if reason == Reason.RUNNING:
        reason = Reason.CALLBACK if ended else Reason.UPDATES
    watch.end(reason.words)
    return run._replace(reason=jnp.asarray(int(reason), jnp.int32))
