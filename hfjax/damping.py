"""Damping: A = B + λI, and how λ is chosen.

λ stands on the scale of the mean objective's curvature (Martens' program adds it
to G divided by the number of cases). The Levenberg-Marquardt rule (report,
section 8.5, equation 10) watches how well the quadratic model predicts,

    ρ = (f(θ + δ) − f(θ)) / M(δ),    M(δ) = ∇fᵀδ + ½δᵀB δ,

and raises λ where ρ < `lower`, lowers it where ρ > `upper`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _tree
from hfjax._types import Matvec, Number, NumberOrSchedule, Tree

_LARGEST = 1e18
"""λ goes no higher: 1/λ is then below the rounding of any step, and λ‖δ‖² finite."""


class ReductionRatio(NamedTuple):
    """What ρ is the ratio of; implementations disagree.

    Attributes:
      model: `"undamped"`, M with B alone (report, equation 10; Martens' program), or
        `"damped"`, with A (section 8.5: "will give similar results").
      step: δ as `"chosen"` by backtracking (Martens' program), the `"last"` iterate
        of CG, or as `"taken"`, after the line search.
      data: that f is measured on: `"batch"`, the curvature data (Martens' program),
        or `"eval_batch"`.
    """

    model: str = "undamped"
    step: str = "chosen"
    data: str = "batch"


class Damping(NamedTuple):
    """A rule for λ.

    Attributes:
      init: `() -> λ` before the first update.
      current: `(λ, count) -> λ` that this update uses, given the state's.
      update: `(λ, ρ) -> λ` afterwards; a rejected update hands in ρ = −∞.
      ratio: what ρ is the ratio of.
    """

    init: Callable[[], jax.Array]
    current: Callable[[jax.Array, jax.Array], jax.Array]
    update: Callable[[jax.Array, jax.Array], jax.Array]
    ratio: ReductionRatio


def constant(value: NumberOrSchedule) -> Damping:
    """Damp with a given λ: A = B + λI.

    Args:
      value: λ ≥ 0. A schedule or an array (as `optax.inject_hyperparams` passes) is
        read anew in each update. A plain number is where the state's `damping`
        starts, and stays until the caller sets it there.

    Returns:
      The rule.

    Raises:
      ValueError: if a plain number is negative.

    References:
      Martens & Sutskever (2012), section 8.1 (Tikhonov damping).
    """
    _options.check_range("value", value, low=0.0)
    settable = _options.is_plain_number(value)
    zero = jnp.zeros((), jnp.int32)
    return Damping(
        init=lambda: _options.read(value, zero),
        current=lambda state, count: state if settable else _options.read(value, count),
        update=lambda state, ratio: state,
        ratio=ReductionRatio(),
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
) -> Damping:
    """Adapt λ in A = B + λI to how well the model predicts.

    λ ← `decrease` · λ if ρ > `upper`; λ ← `increase` · λ if ρ < `lower`, or if ρ is
    NaN or the update was rejected. At the thresholds λ stays.

    Args:
      init: first λ > 0, on the scale of the mean objective's curvature. 1 is a
        heuristic (Martens' program: 45, for losses summed over 784 outputs).
      decrease: factor in (0, 1] (report, section 8.5).
      increase: factor ≥ 1 (ibid.).
      lower: threshold (ibid.).
      upper: threshold (ibid.).
      minimum: floor of λ. None by default: Martens' run on CURVES ended at 1.9e-18.
      ratio: what ρ is the ratio of.

    Returns:
      The rule.

    Raises:
      ValueError: if a plain number is out of range.

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

    def update(damping: jax.Array, ratio: jax.Array) -> jax.Array:
        # Written so that NaN raises: both comparisons are false.
        grown = jnp.where(ratio >= lower, damping, damping * increase)
        adapted = jnp.where(ratio > upper, damping * decrease, grown)
        # Zero would never rise again.
        tiny = jnp.finfo(damping.dtype).tiny
        return jnp.clip(adapted, jnp.maximum(minimum, tiny), _LARGEST).astype(
            damping.dtype
        )

    return Damping(
        init=lambda: jnp.asarray(init),
        current=lambda state, count: state,
        update=update,
        ratio=ratio,
    )


def tikhonov(matvec: Matvec, damping: jax.Array) -> Matvec:
    """Return v ↦ B v + λ v (report, section 8.1).

    Args:
      matvec: v ↦ B v.
      damping: λ, a scalar.

    Returns:
      The damped product.
    """

    def damped(v: Tree) -> Tree:
        return _tree.axpy(damping, v, matvec(v))

    return damped


def measured_ratio(
    change: jax.Array, predicted: jax.Array, value: jax.Array
) -> jax.Array:
    """Compute ρ = change / predicted, guarded where both are below the noise of f.

    A step so small that f cannot show its gain would read as a bad one, and λ, once
    too high, would rise for ever. So η = 10 ε |f| (ε the rounding of f's dtype) of
    decrease is added to both, and ρ tends to 1 for such steps (Conn, Gould & Toint
    2000, section 17.4.2). Changes much larger than η are not affected.

    Args:
      change: f(θ + δ) − f(θ).
      predicted: M(δ).
      value: f(θ).

    Returns:
      ρ, or −∞ if anything is not finite.
    """
    noise = rounding_noise(value)
    denominator = predicted - noise
    ratio = (change - noise) / jnp.where(denominator == 0, 1, denominator)
    sound = jnp.isfinite(change) & jnp.isfinite(predicted) & (denominator != 0)
    return jnp.where(sound, ratio, -jnp.inf)


def rounding_noise(value: jax.Array) -> jax.Array:
    """Return how much of f(θ) may be rounding: 10 ε |f|."""
    return 10 * jnp.finfo(value.dtype).eps * jnp.abs(value)
