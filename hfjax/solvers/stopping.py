"""When conjugate gradients may stop: rules on the history of M.

A rule is called in every iteration with a `Progress`, and returns a boolean. Two of them
consider the relative progress over a window of the last k iterations,

    s_j = (M(x_j) − M(x_{j−k})) / M(x_j),     k = max(minimum_window, ⌈fraction · j⌉),

once `j > k` and M < 0. They compare it with different numbers:

| rule | source | stops when |
|---|---|---|
| `martens2010` | Martens (2010) and his program | s_j < 5e-4 · k |
| `martens_sutskever2012` | M&S (2012), equation 2 | s_j < 1e-4 |

The first is at least fifty times looser; early in training it stops after a dozen
iterations. `marginal` compares the gain of one more iteration with the cost of an update.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Number


class Progress(NamedTuple):
    """What a stopping rule sees after iteration j.

    The solver chooses the units, so that no square of a tiny or huge vector leaves the
    range of floats. So a rule compares M with M and a norm with a norm, as all rules here
    do, and never with a constant.

    Attributes:
      iteration: j, an int32 scalar; 0 at the start.
      model_values: M(x_0), M(x_1), …, M(x_j), in one unit; later entries are undefined.
      residual_norm: ‖A x_j − b‖, in another.
      rhs_norm: ‖b‖, in the unit of `residual_norm`.
    """

    iteration: jax.Array
    model_values: jax.Array
    residual_norm: jax.Array
    rhs_norm: jax.Array


StoppingRule: TypeAlias = Callable[[Progress], jax.Array]
"""`progress -> bool`, true to stop."""


def martens2010(
    tolerance: Number = 5e-4, *, fraction: Number = 0.1, minimum_window: int = 10
) -> StoppingRule:
    """Stop when the mean relative progress per iteration, s_j / k, is below `tolerance`.

    Args:
      tolerance: relative progress per iteration.
      fraction: length of the window, as a fraction of the iterations so far.
      minimum_window: the least length of the window, in iterations.

    Returns:
      The rule.

    Example:
      If M = −j / (j + 1), the last 10 of 60 iterations gained 0.0033 of M. This is less
      than 10 · 5e-4, so that this rule stops, but more than the 1e-4 of
      `martens_sutskever2012`:

      >>> j = jnp.arange(61)
      >>> here = Progress(j[-1], -j / (j + 1.0), jnp.ones(()), jnp.ones(()))
      >>> print(martens2010()(here), martens_sutskever2012()(here))
      True False
    """
    return _relative_progress(tolerance, fraction, minimum_window, per_iteration=True)


def martens_sutskever2012(
    tolerance: Number = 1e-4, *, fraction: Number = 0.1, minimum_window: int = 10
) -> StoppingRule:
    """Stop when the relative progress over the window, s_j, is below `tolerance`.

    Args:
      tolerance: relative progress over the window.
      fraction: as in `martens2010`.
      minimum_window: as in `martens2010`.

    Returns:
      The rule.
    """
    return _relative_progress(tolerance, fraction, minimum_window, per_iteration=False)


def marginal(*, cost: Number = 6.0, window: int = 4) -> StoppingRule:
    """Stop when an iteration gains less than the update does on average for its cost.

        (M(x_{j−k}) − M(x_j)) / k  <  −M(x_j) / (cost + j),      k = min(window, j)

    An update with j iterations costs `cost` + j products and lowers M by −M(x_j). This
    rate is highest when one more iteration gains exactly as much. Runs are therefore
    short while f falls fast, with at least `window` + 1 iterations, and long near a
    minimum. The rule is meant for runs from 0.

    Args:
      cost: the cost of an update apart from its iterations, in products: gradient,
        preconditioner, linearisation, evaluations of f.
      window: the number of iterations over which to average the gain, which fluctuates.

    Returns:
      The rule.

    Raises:
      TypeError: if `window` is not a Python integer.
      ValueError: if an option is out of range.

    Example:
      If M = −j / (j + 1), the rate j / (j + 1) / (cost + j) is highest at j = √cost:

      >>> j, rule = jnp.arange(9), marginal(cost=9.0, window=1)
      >>> here = [Progress(n, -j / (j + 1.0), jnp.ones(()), jnp.ones(())) for n in j]
      >>> print([n for n in range(1, 9) if rule(here[n])])
      [4, 5, 6, 7, 8]

    References:
      Charnov (1976), "Optimal foraging, the marginal value theorem".
    """
    options.check_range("cost", cost, low=0.0)
    options.check_count("window", window, low=1)

    def rule(progress: Progress) -> jax.Array:
        j, values = progress.iteration, progress.model_values
        k = jnp.minimum(j, window)
        gain, now = values[j - k] - values[j], values[j]
        spent = jnp.asarray(cost, now.dtype) + j.astype(now.dtype)
        # The inequality above, multiplied by both denominators.
        return (now < 0) & (gain * spent < -now * k.astype(now.dtype))

    return rule


def residual(tolerance: Number) -> StoppingRule:
    """Stop when ‖A x − b‖ ≤ `tolerance` · ‖b‖, as solvers of linear systems do.

    Args:
      tolerance: relative to ‖b‖.

    Returns:
      The rule.
    """
    options.check_range("tolerance", tolerance, low=0.0)

    def rule(progress: Progress) -> jax.Array:
        part = options.like(tolerance, progress.rhs_norm)
        return progress.residual_norm <= part * progress.rhs_norm

    return rule


RULES = (martens2010, martens_sutskever2012, marginal, residual)
"""The functions that make rules, to detect one that is passed without being called."""


def _relative_progress(
    tolerance: Number, fraction: Number, minimum_window: int, *, per_iteration: bool
) -> StoppingRule:
    options.check_range("tolerance", tolerance, low=0.0)
    options.check_range("fraction", fraction, low=0.0, high=1.0)
    options.check_range("minimum_window", minimum_window, low=1)

    def rule(progress: Progress) -> jax.Array:
        j, values = progress.iteration, progress.model_values
        share = jnp.asarray(fraction)
        window = jnp.ceil(share * j.astype(share.dtype)).astype(j.dtype)
        window = jnp.maximum(window, jnp.asarray(minimum_window).astype(j.dtype))
        now, before = values[j], values[jnp.maximum(j - window, 0)]
        bound = jnp.asarray(tolerance, now.dtype)
        bound = bound * window.astype(now.dtype) if per_iteration else bound
        # Martens' program requires M(x_{j−k}) < 0; as M falls, this implies M(x_j) < 0.
        started = (j > window) & (before < 0)
        # This is s_j < bound, with both sides multiplied by M(x_j) < 0.
        return started & (now - before > bound * now)

    return rule
