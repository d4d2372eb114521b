"""When conjugate gradients may stop: rules on the history of M.

A rule is called in every iteration with a `Progress` and answers a boolean.
The report (section 4, equation 2) and Martens' own program both watch the
relative progress over a window of the last k iterations,

    s_j = (M(x_j) − M(x_{j−k})) / M(x_j),     k = max(minimum_window, fraction · j),

once `j > k` and M < 0; they differ in what they compare it with:

| rule | source | stops when |
|---|---|---|
| `martens2010` | Martens (2010) and his program | s_j < 5e-4 · k |
| `martens_sutskever2012` | the report, equation 2 | s_j < 1e-4 |

The first is at least fifty times looser; early in training it stops after a
dozen iterations. `marginal` asks another question: whether one more iteration still
pays, beside what an update costs before its first.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Number


class Progress(NamedTuple):
    """What a stopping rule sees, after iteration j.

    Attributes:
      iteration: j, an int32 scalar; the start is 0.
      model_values: M(x_0), M(x_1), …, up to j; what lies beyond is not defined.
      residual_norm: ‖A x_j − b‖.
      rhs_norm: ‖b‖.
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
    """Stop when the mean relative progress per iteration is below `tolerance`.

    s_j < `tolerance` · k with k = max(⌈`fraction` · j⌉, `minimum_window`).

    Args:
      tolerance: per iteration (Martens 2010, section 4.4: 0.0005).
      fraction: of the iterations so far that the window spans (ibid.: 0.1).
      minimum_window: in iterations (ibid.: 10).

    Returns:
      The rule.

    Example:
      Where M = −j / (j + 1), the last 10 of 60 iterations gained 0.0033 of it: less than
      10 · 5e-4, where Martens' program stops, and more than 1e-4, where the report does:

      >>> j = jnp.arange(61)
      >>> here = Progress(j[-1], -j / (j + 1.0), jnp.ones(()), jnp.ones(()))
      >>> print(martens2010()(here), martens_sutskever2012()(here))
      True False
    """
    return _relative_progress(tolerance, fraction, minimum_window, per_iteration=True)


def martens_sutskever2012(
    tolerance: Number = 1e-4, *, fraction: Number = 0.1, minimum_window: int = 10
) -> StoppingRule:
    """Stop when the relative progress over the whole window is below `tolerance`.

    s_j < `tolerance` with k = max(⌈`fraction` · j⌉, `minimum_window`).

    Args:
      tolerance: for the window (report, equation 2: 0.0001).
      fraction: of the iterations so far that the window spans (report, section 4).
      minimum_window: in iterations (ibid.).

    Returns:
      The rule.
    """
    return _relative_progress(tolerance, fraction, minimum_window, per_iteration=False)


def marginal(*, cost: Number = 6.0, window: int = 4) -> StoppingRule:
    """Stop when an iteration gains less than the update does for its price, on average.

        (M(x_{j−k}) − M(x_j)) / k  <  −M(x_j) / (cost + j),      k = min(window, j)

    With j iterations an update costs `cost` + j products and promises −M(x_j): that
    rate is highest where one more iteration gains just the rate itself. Short runs while
    f falls fast, of k + 1 iterations at least, long ones near a minimum, without a
    schedule. For runs from 0.

    Args:
      cost: of an update without its iterations, in products: gradient,
        preconditioner, linearisation, evaluations of f (6: heuristic; with Kronecker factors
        it was measured, `benchmarks/results/step6.md`).
      window: iterations that the gain is averaged over: it rises and falls from one to
        the next (4: ibid.; heuristic).

    Returns:
      The rule.

    Raises:
      TypeError: if `window` is no Python integer.
      ValueError: if an option is out of range.

    Example:
      Where M = −j / (j + 1), the rate j / (j + 1) / (cost + j) is highest at √cost:

      >>> j, rule = jnp.arange(9), marginal(cost=9.0, window=1)
      >>> values = -j / (j + 1.0)
      >>> [
      ...     int(n)
      ...     for n in j[1:]
      ...     if rule(Progress(n, values, jnp.ones(()), jnp.ones(())))
      ... ]
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
        return (now < 0) & (gain * spent < -now * k.astype(now.dtype))

    return rule


def residual(tolerance: Number) -> StoppingRule:
    """Stop when ‖A x − b‖ ≤ `tolerance` · ‖b‖, as solvers of linear systems do.

    Args:
      tolerance: relative to the right-hand side.

    Returns:
      The rule.
    """
    options.check_range("tolerance", tolerance, low=0.0)

    def rule(progress: Progress) -> jax.Array:
        part = options.like(tolerance, progress.rhs_norm)
        return progress.residual_norm <= part * progress.rhs_norm

    return rule


RULES = (martens2010, martens_sutskever2012, marginal, residual)
"""What makes the rules; none is one itself."""


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
        # Martens' program asks M(x_{j−k}) < 0; M falls, so M(x_j) < 0 is implied.
        started = (j > window) & (before < 0)
        # s_j < bound without the division: both sides times M(x_j) < 0.
        return started & (now - before > bound * now)

    return rule
