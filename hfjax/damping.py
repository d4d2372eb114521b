"""Damping: A = B + λD + μS, and how λ and μ are chosen.

D is a matrix of `hfjax.damping_matrices`, by default I; λ stands on the scale of the
mean objective's curvature (Martens' program adds it to G divided by the number of
cases). S, with structural damping (report, section 8.4), is the Gauss-Newton matrix of
the hidden states' mean distance, `Objective(hidden_loss=…)`; μ is its strength.

The Levenberg-Marquardt rule (report,
section 8.5, equation 10) watches how well the quadratic model predicts,

    ρ = (f(θ + δ) − f(θ)) / M(δ),    M(δ) = ∇fᵀδ + ½δᵀB δ,

and raises λ where ρ < `lower`, lowers it where ρ > `upper`. `searched` takes the λ with
which f is lowest instead, as `hfjax.backtracking.redamped` finds it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _tree, damping_matrices
from hfjax._types import (
    Approximate,
    Matvec,
    Number,
    NumberOrSchedule,
    Tree,
    exact_of,
)
from hfjax.damping_matrices import Builder, DampingMatrix, identity

_RAISED_TO = 1e18
"""λ is raised no higher: 1/λ is then below the rounding of steps of any usual scale."""
_SET_TO = 1e30
"""What a caller may set λ to, for a loss of such a scale: λ‖p‖² is finite in float32."""


class ReductionRatio(NamedTuple):
    """What ρ is the ratio of; implementations disagree.

    Attributes:
      model: `"undamped"`, M with B alone (report, equation 10; Martens' program), or
        `"damped"`, with A (section 8.5: "will give similar results").
      step: δ as `"chosen"` by backtracking (Martens' program), the `"last"` iterate
        of CG, or as `"taken"`, after the line search.
      data: that f is measured on: `"batch"`, the curvature data (Martens' program),
        or `"eval_batch"`.
      expected: the share of M(δ) that f is expected to fall by, which ρ is divided
        by: 1, or with data other than the curvature batch about that batch's share
        of all training data (section 12.2: aim for "a more modest reduction").
    """

    model: str = "undamped"
    step: str = "chosen"
    data: str = "batch"
    expected: Number = 1.0


class Structural(NamedTuple):
    """How strong structural damping is.

    Attributes:
      strength: μ, or μ / λ if tied; a number or schedule.
      tied: whether μ = strength · λ, so that both adapt.
    """

    strength: NumberOrSchedule
    tied: bool

    def at(self, damping: jax.Array, count: jax.Array) -> jax.Array:
        """Return μ of an update.

        Args:
          damping: its λ.
          count: updates so far.

        Returns:
          μ, a scalar.
        """
        strength = _options.read(self.strength, count).astype(damping.dtype)
        return strength * damping if self.tied else strength


class Damping(NamedTuple):
    """A rule for λ, or for the radius of a trust region.

    Attributes:
      init: `() -> λ` before the first update.
      current: `(λ, count) -> λ` that this update uses, given the state's.
      update: `(λ, ρ, on_boundary) -> λ` afterwards; a rejected update hands in
        ρ = −∞, unless its step was only too small to be seen in f. `on_boundary` says
        whether a trust region held the step back; the update always hands it in.
      ratio: what ρ is the ratio of.
      matrix: D; `None` is A = B + μS, where "λ" is read by the solver alone.
      structural: μ, or `None`.
      limit: `(found, λ) -> λ` for the next update, of a rule that takes what
        `hfjax.backtracking.redamped` has found; `None` of one that goes its own way.
      scalar: what it drives: a `"damping"` λ, or the `"radius"` of a trust region.
        `hfjax.hessian_free` compares it with the solver's.
      adapts: whether λ moves by what came of a step, and not by the caller alone.
    """

    init: Callable[[], jax.Array]
    current: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[..., jax.Array]
    ratio: ReductionRatio
    matrix: DampingMatrix | None = identity()
    structural: Structural | None = None
    limit: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    scalar: str = "damping"
    adapts: bool = False


def constant(
    value: NumberOrSchedule,
    *,
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Damp with a given λ: A = B + λD + μS.

    Args:
      value: λ ≥ 0. A schedule or an array (as `optax.inject_hyperparams` passes) is
        read anew in each update. A plain number is where the state's `damping`
        starts, and stays until the caller sets it there.
      matrix: D, as in `levenberg_marquardt`.
      structural: μ, as in `levenberg_marquardt`.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` is nothing of the kind.
      ValueError: if a plain number is negative, if a name is not known, or if
        `structural` is tied to a λ of 0.

    References:
      Martens & Sutskever (2012), section 8.1 (Tikhonov damping).
    """
    _options.check_range("value", value, low=0.0)
    settable = _options.is_plain_number(value)
    if settable and value == 0 and tied and structural is not None:
        msg = (
            "`structural` is tied to λ, and λ is 0: nothing would be damped. Pass "
            "`tied=False`, so that `structural` is μ itself, or a λ above 0."
        )
        raise ValueError(msg)

    def first() -> jax.Array:  # No array here: JAX may not have begun.
        return _options.read(value, jnp.zeros((), jnp.int32))

    def current(state: jax.Array, count: jax.Array) -> jax.Array:
        if not settable:
            return _options.read(value, count)
        # A caller may have set it to anything, and NaN would stay for ever.
        return jnp.where(jnp.isfinite(state), state, first().astype(state.dtype))

    return Damping(
        init=first,
        current=current,
        update=lambda state, ratio, on_boundary=None: state,
        ratio=ReductionRatio(),
        matrix=damping_matrices.as_matrix(matrix),
        structural=_structural(structural, tied),
    )


def levenberg_marquardt(
    init: Number = 1.0,
    *,
    decrease: Number = 2 / 3,
    increase: Number = 3 / 2,
    lower: Number = 1 / 4,
    upper: Number = 3 / 4,
    minimum: Number = 0.0,
    ratio: ReductionRatio = ReductionRatio(),
    matrix: str | DampingMatrix | Builder = "identity",
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Adapt λ in A = B + λD + μS to how well the model predicts.

    λ ← `decrease` · λ if ρ > `upper`; λ ← `increase` · λ if ρ < `lower`, or if ρ is
    NaN or the update was rejected. At the thresholds λ stays. It is raised to 1e18 at
    most; a caller may set it to 1e30.

    Of a step too small to be seen in f, ρ is 1, rejected or not; and λ stays where it has
    no part in such a step.

    Args:
      init: first λ > 0, on the scale of the mean objective's curvature. 1 is a
        heuristic (Martens' program: 45, for losses summed over 784 outputs).
      decrease: factor in (0, 1] (report, section 8.5).
      increase: factor ≥ 1 (ibid.).
      lower: threshold (ibid.).
      upper: threshold (ibid.).
      minimum: floor of λ. None by default: Martens' run on CURVES ended at 1.9e-18.
      ratio: what ρ is the ratio of.
      matrix: D, one of `hfjax.damping_matrices`; by name `"identity"`,
        `"curvature_diagonal"` or `"curvature"`; or the caller's `(objective, params,
        batch) -> (v -> D v, its diagonal)`.
      structural: μ ≥ 0, a number or schedule; needs `Objective(hidden_loss=…)`.
        `None` is without (Martens & Sutskever 2011 used 0.03, tied).
      tied: whether `structural` is μ / λ, so that λ's rule scales both, as in their
        program; else μ itself.

    Returns:
      The rule.

    Raises:
      TypeError: if `matrix` is nothing of the kind.
      ValueError: if a plain number is out of range, or a name is not known.

    Example:
      >>> rule = levenberg_marquardt(init=9.0)
      >>> print(
      ...     [float(rule.update(rule.init(), jnp.float32(r))) for r in (0.8, 0.5, 0.2)]
      ... )
      [6.0, 9.0, 13.5]
    """
    _options.check_range("init", init, low=0.0, open_low=True)
    _options.check_range("decrease", decrease, low=0.0, high=1.0, open_low=True)
    _options.check_range("increase", increase, low=1.0)
    _options.check_range("lower", lower)
    if isinstance(lower, float | int) and isinstance(upper, float | int):
        _options.check_range("upper", upper, low=lower)
    _options.check_range("minimum", minimum, low=0.0)
    _options.check_choice("ratio.model", ratio.model, ("undamped", "damped"))
    _options.check_choice("ratio.step", ratio.step, ("chosen", "last", "taken"))
    _options.check_choice("ratio.data", ratio.data, ("batch", "eval_batch"))
    _options.check_range("ratio.expected", ratio.expected, low=0.0, open_low=True)

    def update(
        damping: jax.Array, ratio: jax.Array, on_boundary: jax.Array | None = None
    ) -> jax.Array:
        del on_boundary
        # Written so that NaN raises: both comparisons are false.
        more, less = (_options.like(x, damping) for x in (increase, decrease))
        low, high = (_options.like(x, ratio) for x in (lower, upper))
        grown = jnp.where(ratio >= low, damping, damping * more)
        adapted = jnp.where(ratio > high, damping * less, grown)
        return _limited(adapted, damping, minimum)

    def current(damping: jax.Array, count: jax.Array) -> jax.Array:
        del count
        # A caller may have set it to anything, and NaN would stay for ever.
        first = _options.like(init, damping)
        known = jnp.where(jnp.isfinite(damping), damping, first)
        return jnp.clip(known, 0, _SET_TO)

    return Damping(
        init=lambda: jnp.asarray(init),
        current=current,
        update=update,
        ratio=ratio,
        matrix=damping_matrices.as_matrix(matrix),
        structural=_structural(structural, tied),
        adapts=True,
    )


def searched(
    init: Number = 1.0,
    *,
    minimum: Number = 0.0,
    structural: NumberOrSchedule | None = None,
    tied: bool = True,
) -> Damping:
    """Take the λ that `hfjax.backtracking.redamped` finds by looking at f.

    Where another rule of backtracking is used, and for a step that is rejected or too
    small to be seen in f, λ goes by ρ as in `levenberg_marquardt`.

    Args:
      init: first λ > 0; it may be off by orders of magnitude (1: heuristic).
      minimum: as in `levenberg_marquardt`.
      structural: as in `levenberg_marquardt`; in a search μ stays as it was in the run.
      tied: as in `levenberg_marquardt`.

    Returns:
      The rule; D is I.

    Raises:
      ValueError: if a plain number is out of range.

    Example:
      >>> rule = searched(minimum=0.5)
      >>> print(rule.limit(jnp.float32([0.1, 7.0]), rule.init()))
      [0.5 7. ]
    """
    rule = levenberg_marquardt(init, minimum=minimum, structural=structural, tied=tied)
    return rule._replace(limit=lambda found, now: _limited(found, now, minimum))


def _limited(found: jax.Array, damping: jax.Array, minimum: Number) -> jax.Array:
    # Zero would never rise again.
    lowest = jnp.maximum(_options.like(minimum, damping), jnp.finfo(damping.dtype).tiny)
    # Where a caller has set it higher.
    highest = jnp.maximum(damping, _RAISED_TO)
    return jnp.clip(found, lowest, highest).astype(damping.dtype)


def damped(matvec: Matvec, damping: jax.Array, matrix: Matvec | None = None) -> Matvec:
    """Return v ↦ B v + λ D v (report, sections 8.1 and 8.3).

    Args:
      matvec: v ↦ B v.
      damping: λ, a scalar.
      matrix: v ↦ D v; `None` is the identity.

    Returns:
      The damped product, `Approximate` where v ↦ B v is.
    """

    def product(v: Tree) -> Tree:
        d_v = v if matrix is None else matrix(v)
        return _tree.axpy(jnp.asarray(damping), d_v, matvec(v))

    if not isinstance(matvec, Approximate):
        return product
    exact = damped(matvec.exact, damping, None if matrix is None else exact_of(matrix))
    return Approximate(product, exact)


def measured_ratio(
    change: jax.Array, predicted: jax.Array, noise: jax.Array
) -> jax.Array:
    """Compute ρ = change / predicted, guarded where both are below the noise of f.

    A step so small that f cannot show its gain would read as a bad one, and λ, once
    too high, would rise for ever. So η, the noise, of decrease is added to both, and ρ
    tends to 1 for such steps (Conn, Gould & Toint 2000, section 17.4.2). Changes much
    larger than η are not affected.

    Args:
      change: f(θ + δ) − f(θ).
      predicted: M(δ).
      noise: η, how much of `change` may be rounding.

    Returns:
      ρ, or −∞ if anything is not finite.
    """
    denominator = predicted - noise
    ratio = (change - noise) / jnp.where(denominator == 0, 1, denominator)
    sound = jnp.isfinite(change) & jnp.isfinite(predicted) & (denominator != 0)
    return jnp.where(sound, ratio, -jnp.inf)


def _structural(strength: NumberOrSchedule | None, tied: bool) -> Structural | None:
    _options.check_range("structural", strength, low=0.0)
    return None if strength is None else Structural(strength, tied)


def rounding_noise(value: jax.Array) -> jax.Array:
    """Return how much of f(θ) may be rounding: 10 ε |f|, or the least normal float.

    Args:
      value: f(θ).

    Returns:
      A scalar above 0; the 10 is a heuristic.
    """
    limits = jnp.finfo(value.dtype)
    return jnp.maximum(10 * limits.eps * jnp.abs(value), limits.tiny)
