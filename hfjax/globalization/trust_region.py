"""Trust regions: minimise M(x) = ½xᵀA x − bᵀx subject to ‖x‖ ≤ radius.

The method of Steihaug and Toint runs conjugate gradients from 0, whose iterates grow in
norm. If they leave the region, or meet negative curvature, it goes to the boundary and
stops. If A is positive semi-definite, the result gains at least half of what the best
point x* of the region does: M(x) ≤ ½ M(x*).

    >>> import jax.numpy as jnp
    >>> d, b = jnp.array([1.0, 2.0]), jnp.ones(2)
    >>> inside, at = (solve(lambda v: d * v, b, r) for r in (2.0, 0.5))
    >>> print(inside.x.round(3), inside.on_boundary)
    [1.  0.5] False
    >>> print(jnp.linalg.norm(at.x).round(6), at.on_boundary)
    0.5 True
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.arguments import as_product, as_vector
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Matvec, Number, Preconditioner, Tree
from hfjax._tracing import compiled
from hfjax.globalization.damping import levenberg_marquardt
from hfjax.globalization.rule import Damping, ReductionRatio, Verdict, if_evidence
from hfjax.solvers.cg import as_run, check_run
from hfjax.solvers.descent import Reason, Run, Solver, System
from hfjax.solvers.iterates import IterateRule, every, grid
from hfjax.solvers.pcg import CGResult, as_preconditioner, run
from hfjax.solvers.pcg_hooks import Region
from hfjax.solvers.stopping import StoppingRule, martens2010


class TrustRegionResult(NamedTuple):
    """The result of a run of Steihaug and Toint's method.

    Attributes:
      x: the solution, like `b`.
      on_boundary: bool scalar, whether ‖x‖ = radius.
      num_iterations: int32 scalar, the number of products.
      model_values: shape `[max_iterations + 1]`: M at 0 and after each iteration; the
        last value is repeated to the end.
      reason: int32 scalar, an `hfjax.cg.Reason`.
    """

    x: Tree
    on_boundary: jax.Array
    num_iterations: jax.Array
    model_values: jax.Array
    reason: jax.Array


def solve(
    matvec: Matvec,
    b: Tree,
    radius: Number,
    /,
    *,
    preconditioner: Preconditioner | None = None,
    norm: Matvec | None = None,
    max_iterations: int = 250,
    stopping: StoppingRule | None = None,
) -> TrustRegionResult:
    """Minimise M(x) = ½xᵀA x − bᵀx over xᵀP x ≤ radius², approximately.

    A may be indefinite. With a preconditioner, `norm` should be the P that it inverts.
    Only in that norm do the iterates grow, and does the bound of one half hold; with
    another norm, the run still ends where they first leave the region. The result has no
    derivative, just as that of `hfjax.cg.solve`.

    Args:
      matvec: `v -> A v`, on trees like `b`.
      b: the right-hand side, −∇f, real; integers are converted to floats.
      radius: r > 0.
      preconditioner: `r -> P⁻¹ r`; `None` is the identity.
      norm: `v -> P v`, which defines the region; `None` is the Euclidean ball.
      max_iterations: a Python integer.
      stopping: a rule of `hfjax.stopping`; `None` runs until the boundary, a residual of
        zero to rounding, or `max_iterations`.

    Returns:
      The result. On the boundary, ‖x‖ is the radius to rounding.

    Raises:
      TypeError: if `max_iterations` is not a Python integer, or another argument has the
        wrong type.
      ValueError: if `radius` is a plain number and not above 0, if `max_iterations` is
        negative, or if a product is not a tree like `b`.

    References:
      Martens & Sutskever (2012), section 8.6; Steihaug (1983); Toint (1981).
    """
    options.check_range("radius", radius, low=0.0, open_low=True)
    options.check_count("max_iterations", max_iterations, low=0)
    # In `Region`, `None` would mean the norm of the preconditioner.
    norm = (lambda v: v) if norm is None else as_product("norm", norm, matrix="P @ v")
    matvec = as_product("matvec", matvec)
    preconditioner = as_preconditioner(preconditioner)
    keep = every(max(1, max_iterations))

    def solved(b: Tree, radius: jax.Array) -> CGResult:
        region = Region(radius, norm)
        return _run(matvec, b, preconditioner, region, max_iterations, stopping, keep)

    result = compiled.run(solved, as_vector("b", b), jnp.asarray(radius))
    return TrustRegionResult(
        x=result.x,
        on_boundary=result.reason == Reason.BOUNDARY,
        num_iterations=result.num_iterations,
        model_values=result.model_values,
        reason=result.reason,
    )


def steihaug_toint(
    *,
    max_iterations: int = 250,
    stopping: StoppingRule | None = martens2010(),
    keep: IterateRule = grid(),
    elliptical: bool = True,
) -> Solver:
    """Solve for the direction in a trust region; for `damping=trust_region.radius()`.

    Runs start from 0, as the method requires. The `damping` of state and `info` is the
    radius.

    Args:
      max_iterations: the most iterations of a run; a Python integer.
      stopping: a rule of `hfjax.stopping`, or `None`.
      keep: which iterates backtracking may choose among.
      elliptical: whether the region is ‖x‖_P ≤ radius, with P the preconditioner, in
        whose norm the iterates grow, or the Euclidean ball.

    Returns:
      The solver.

    Raises:
      TypeError: if `max_iterations` is not a Python integer.
      ValueError: if it is less than 1, or if `keep` evaluates f.
    """
    options.check_count("max_iterations", max_iterations, low=1)
    if keep.evaluates:
        msg = "`keep` must not evaluate f: the region, not f, is to end a run."
        raise ValueError(msg)

    def solve_within(system: System, _: None) -> Run:
        preconditioner = system.preconditioner()
        # Without a preconditioner P = I, whose norm is computed directly, not by recurrence.
        plain = preconditioner is None or not elliptical
        region = Region(system.scalar, (lambda v: v) if plain else None)
        matvec, b = system.matvec, system.b
        found = _run(matvec, b, preconditioner, region, max_iterations, stopping, keep)
        return as_run(found)

    return Solver(
        start=lambda direction, count: None,
        solve=solve_within,
        scalar="radius",
        max_iterations=max_iterations,
    )


_SMALLEST = 1e-30
"""The smallest radius: the rule adapts its reciprocal, which must be finite in float32."""


def radius(
    init: Number = 1.0,
    *,
    shrink: Number = 2 / 3,
    grow: Number = 3 / 2,
    lower: Number = 1 / 4,
    upper: Number = 3 / 4,
    maximum: Number = 1e18,
    ratio: ReductionRatio = ReductionRatio(),
) -> Damping:
    """Adapt the radius to how well M predicts f, by the Levenberg-Marquardt rule.

    radius ← `grow` · radius if ρ > `upper` and the region limited the step; radius ←
    `shrink` · radius if ρ < `lower`, or if the update was rejected. This is the rule for
    λ, applied to 1 / radius. A = B: nothing is added to the curvature.

    Args:
      init: first radius > 0, in the norm of the region.
      shrink: factor in (0, 1].
      grow: factor ≥ 1.
      lower: threshold for ρ.
      upper: threshold for ρ.
      maximum: the largest radius.
      ratio: how to measure ρ.

    Returns:
      The rule, for `hessian_free(damping=…, solver=trust_region.steihaug_toint())` or
      `solver=sample_space.trust_region()`.

    Raises:
      ValueError: if a plain number is out of range.

    Example:
      >>> rule = radius(init=1.0)
      >>> for rho, limited in ((0.9, True), (0.5, True), (0.9, False)):
      ...     verdict = Verdict(rho, on_boundary=limited)
      ...     print(float(rule.update(rule.init(), verdict)))
      1.5
      1.0
      1.0

    References:
      Martens & Sutskever (2012), section 8.6; growth at the boundary only: Nocedal &
      Wright (2006), algorithm 4.1.
    """
    options.check_range("init", init, low=0.0, open_low=True)
    options.check_range("shrink", shrink, low=0.0, high=1.0, open_low=True)
    options.check_range("grow", grow, low=1.0)
    options.check_range("maximum", maximum, low=0.0, open_low=True)
    # 1 / radius takes the place of λ, so `shrink` becomes `increase`.
    reciprocal = levenberg_marquardt(
        1.0,
        decrease=1 / jnp.asarray(grow),
        increase=1 / jnp.asarray(shrink),
        lower=lower,
        upper=upper,
        minimum=1 / jnp.asarray(maximum),
        ratio=ratio,
    )

    def update(radius: jax.Array, verdict: Verdict, _: Any = None) -> jax.Array:
        adapted = 1 / reciprocal.update(1 / radius, Verdict(verdict.ratio))
        # A step inside the region is no evidence for a larger radius.
        smaller = jnp.minimum(adapted, radius)
        adapted = jnp.where(verdict.on_boundary, adapted, smaller)
        return if_evidence(verdict, adapted, radius)

    def current(radius: jax.Array, _: jax.Array) -> jax.Array:
        # A user can set any radius in the state, and NaN would stay forever.
        first = options.like(init, radius)
        known = jnp.where(jnp.isfinite(radius), radius, first)
        return jnp.clip(known, _SMALLEST, options.like(maximum, radius))

    return Damping(
        init=lambda: jnp.asarray(init),
        current=current,
        update=update,
        ratio=ratio,
        matrix=None,
        scalar="radius",
    )


def _run(
    matvec: Matvec,
    b: Tree,
    preconditioner: Preconditioner | None,
    region: Region,
    max_iterations: int,
    stopping: StoppingRule | None,
    keep: IterateRule,
) -> CGResult:
    check_run(stopping, keep)
    result = run(
        matvec,
        b,
        preconditioner,
        keep,
        max_iterations=max_iterations,
        stopping=stopping,
        region=region,
    )
    return without_derivative("A run of conjugate gradients", result)
