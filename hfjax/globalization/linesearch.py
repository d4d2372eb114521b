"""The line search: how far to go along the chosen direction.

It tries α = first, first · shrink, first · shrink², … until Armijo's condition holds,

    f(θ + αδ) ≤ f(θ) + sufficient_decrease · α · ∇fᵀδ.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.types import Number


class StepSize(NamedTuple):
    """The result of a line search.

    Attributes:
      step_size: α; 0 if the search failed.
      value: f(θ + αδ) at the last α tried; +∞ if it is not finite.
      success: whether the condition held.
      first_value: f at the first α, +∞ if it is not finite or was not tried; `None` if the
        rule does not tell.
    """

    step_size: jax.Array
    value: jax.Array
    success: jax.Array
    first_value: jax.Array | None = None


Along: TypeAlias = Callable[[jax.Array], jax.Array]
"""α ↦ f(θ + αδ)."""


class _Tried(NamedTuple):
    count: jax.Array
    alpha: jax.Array  # the last α
    at: jax.Array  # f there
    good: jax.Array
    at_first: jax.Array

    def then(self, alpha: jax.Array, at: jax.Array, good: jax.Array) -> "_Tried":
        at_first = jnp.where(self.count == 0, at, self.at_first)
        return _Tried(self.count + 1, alpha, at, good, at_first)


def _start(value: jax.Array, first: jax.Array, first_value: jax.Array | None) -> _Tried:
    known = first_value is not None
    at = first_value.astype(value.dtype) if known else jnp.full_like(value, jnp.inf)
    return _Tried(
        jnp.full((), 1 if known else 0, jnp.int32),
        jnp.asarray(first, value.dtype),
        at,
        jnp.zeros((), bool),
        at,
    )


def _search(
    unfinished: Callable[[_Tried], jax.Array],
    next_try: Callable[[_Tried], _Tried],
    start: _Tried,
) -> StepSize:
    # The comparison is made inside a loop, so that there is one result. Outside, XLA may
    # recompute it for each use, with other rounding, and an update that counts as accepted
    # could be zero.
    tried = jax.lax.while_loop(
        lambda tried: ~tried.good & unfinished(tried), next_try, start
    )
    alpha, at = jnp.where(tried.good, tried.alpha, 0), trees.finite_or_inf(tried.at)
    return StepSize(alpha, at, tried.good, trees.finite_or_inf(tried.at_first))


def _full_step(
    along: Along,
    value: jax.Array,
    _: jax.Array,
    first: jax.Array,
    first_value: jax.Array | None,
) -> StepSize:
    at = along(first) if first_value is None else first_value

    def judge(tried: _Tried) -> _Tried:
        good = (at <= value) & jnp.isfinite(at)
        return tried.then(first, at.astype(value.dtype), good)

    # A loop of one round: see `_search`.
    start = _start(value, first, None)
    return _search(lambda tried: jnp.isfinite(value) & (tried.count == 0), judge, start)


class LineSearch(NamedTuple):
    """A rule for α.

    Attributes:
      search: `(along, value, slope, first, first_value) -> StepSize`, where `along(α)` is
        f(θ + αδ), `value` is f(θ), `slope` is ∇fᵀδ, `first` is the first α, and
        `first_value` is f there, or `None` if it is unknown. By default the first α is
        taken unless f rises there, which is also what `line_search=None` means.
    """

    search: Callable[
        [Along, jax.Array, jax.Array, jax.Array, jax.Array | None], StepSize
    ] = _full_step


def armijo(
    *, sufficient_decrease: Number = 1e-2, shrink: Number = 0.8, max_tries: int = 60
) -> LineSearch:
    """Shrink α until f has fallen by a fraction of what the slope promises.

    Args:
      sufficient_decrease: that fraction, in (0, 1).
      shrink: factor in (0, 1).
      max_tries: the most α to try before the search fails.

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

    References:
      Martens & Sutskever (2012), section 8.8.
    """
    options.check_range("sufficient_decrease", sufficient_decrease, low=0.0, high=1.0)
    options.check_range("shrink", shrink, low=0.0, high=1.0, open_low=True)
    options.check_count("max_tries", max_tries, low=1)

    def enough(
        alpha: jax.Array, at: jax.Array, value: jax.Array, slope: jax.Array
    ) -> jax.Array:
        # False for NaN, and for a slope ≥ 0, along which no α would do.
        part = options.like(sufficient_decrease, value)
        sufficient = at <= value + part * alpha * slope
        return sufficient & (slope < 0) & jnp.isfinite(at)

    def search(
        along: Along,
        value: jax.Array,
        slope: jax.Array,
        first: jax.Array,
        first_value: jax.Array | None,
    ) -> StepSize:
        def next_try(tried: _Tried) -> _Tried:
            shorter = tried.alpha * options.like(shrink, tried.alpha)
            alpha = jnp.where(tried.count == 0, first, shorter)
            at = along(alpha).astype(value.dtype)
            return tried.then(alpha, at, enough(alpha, at, value, slope))

        start = _start(value, first, first_value)
        if first_value is not None:
            start = start._replace(good=enough(first, first_value, value, slope))
        return _search(
            lambda tried: (slope < 0) & (tried.count < max_tries), next_try, start
        )

    return LineSearch(search)
