"""The line search: how far to go along the chosen direction.

Armijo's condition (report, section 8.8),

    f(θ + αδ) ≤ f(θ) + sufficient_decrease · α · ∇fᵀδ,

with α = first, first · shrink, first · shrink², … until it holds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options
from hfjax._types import Number


class StepSize(NamedTuple):
    """What a line search found.

    Attributes:
      step_size: α; 0 if the search failed.
      value: f(θ + αδ) at the last α tried; +∞ if it is not finite.
      success: whether the condition held.
    """

    step_size: jax.Array
    value: jax.Array
    success: jax.Array


class LineSearch(NamedTuple):
    """A rule for α.

    Attributes:
      search: `(along, value, slope, first, first_value) -> StepSize`, from `along`,
        `α -> f(θ + αδ)`; `value`, f(θ); `slope`, ∇fᵀδ; `first`, the first α; and
        `first_value`, f there if it is known, else `None`.
    """

    search: Callable[
        [
            Callable[[jax.Array], jax.Array],
            jax.Array,
            jax.Array,
            jax.Array,
            jax.Array | None,
        ],
        StepSize,
    ]


def armijo(
    *,
    sufficient_decrease: Number = 1e-2,
    shrink: Number = 0.8,
    max_tries: int = 60,
) -> LineSearch:
    """Shrink α until f has fallen by a part of what the slope promises.

    Args:
      sufficient_decrease: in (0, 1) (Martens' program: 1e-2).
      shrink: factor in (0, 1) (ibid.: 0.8).
      max_tries: how many α are tried, after which the search has failed (ibid.: 60).

    Returns:
      The rule.

    Raises:
      ValueError: if an option is out of range.

    Example:
      On f(α) = (α − 0.25)², from 0.0625 with slope −0.5:

      >>> value, slope, first = jnp.array([0.0625, -0.5, 1.0])
      >>> rule = armijo(shrink=0.5)
      >>> found = rule.search(lambda a: (a - 0.25) ** 2, value, slope, first, None)
      >>> print(found.step_size, bool(found.success))
      0.25 True
    """
    _options.check_range("sufficient_decrease", sufficient_decrease, low=0.0, high=1.0)
    _options.check_range("shrink", shrink, low=0.0, high=1.0, open_low=True)
    _options.check_count("max_tries", max_tries, low=1)

    def enough(
        alpha: jax.Array, at: jax.Array, value: jax.Array, slope: jax.Array
    ) -> jax.Array:
        # False for NaN.
        return at <= value + sufficient_decrease * alpha * slope

    def search(
        along: Callable[[jax.Array], jax.Array],
        value: jax.Array,
        slope: jax.Array,
        first: jax.Array,
        first_value: jax.Array | None,
    ) -> StepSize:
        def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            tries, alpha, at = carry
            # Up a slope, or along one that is not a number, nothing need be tried.
            return (slope < 0) & (tries < max_tries) & ~enough(alpha, at, value, slope)

        def shorter(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
            tries, alpha, _ = carry
            alpha = jnp.where(tries == 0, first, alpha * shrink)
            return tries + 1, alpha, along(alpha).astype(value.dtype)

        known = first_value is not None
        start = (
            jnp.full((), 1 if known else 0, jnp.int32),
            jnp.asarray(first, value.dtype),
            first_value if known else jnp.full_like(value, jnp.inf),
        )
        _, alpha, at = jax.lax.while_loop(unfinished, shorter, start)
        success = (slope < 0) & enough(alpha, at, value, slope) & jnp.isfinite(at)
        at = jnp.where(jnp.isfinite(at), at, jnp.inf)
        return StepSize(jnp.where(success, alpha, 0), at, success)

    return LineSearch(search)


def whole() -> LineSearch:
    """Take the first α unless f rises there: what `line_search=None` stands for.

    Returns:
      The rule.
    """

    def search(
        along: Callable[[jax.Array], jax.Array],
        value: jax.Array,
        slope: jax.Array,
        first: jax.Array,
        first_value: jax.Array | None,
    ) -> StepSize:
        del slope
        at = along(first) if first_value is None else first_value
        success = (at <= value) & jnp.isfinite(at)
        at = jnp.where(jnp.isfinite(at), at, jnp.inf)
        return StepSize(jnp.where(success, first, 0), at, success)

    return LineSearch(search)
