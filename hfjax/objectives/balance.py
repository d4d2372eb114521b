"""Terms of a sum that are balanced while it is minimised, each by a scale of its weight.

The optimizer keeps the scales in its state. All of an update, gradient, curvature and line
search, uses those that it starts from; `balanced` makes the next ones.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Batch, Number, NumberOrSchedule, Params
from hfjax.objectives.plain import Objective

_LEAST = 0.01
"""The least value of a term that counts, as a share of the largest."""


def balanced(
    scales: jax.Array | Sequence[Number], values: jax.Array, balance: Number = 0.05
) -> jax.Array:
    """Compute the scales of a sum's terms for the next update, so that these draw together.

        sₖ ← sₖ (m / sₖ vₖ)^`balance`,   log m = meanⱼ log sⱼ vⱼ

    Here vₖ = cₖ fₖ is a term with its own weight, and f = Σₖ sₖ vₖ. A term with a small
    share sₖ vₖ of f gets a larger scale, and one with a large share a smaller one. As m is
    the geometric mean, the product of all scales stays 1, so that f keeps its size.

    A term keeps its scale, and does not count in m, if vₖ is zero, negative, infinite or
    NaN. A vₖ below a hundredth of the largest counts as that: no ratio of two scales goes
    beyond 100, even if a term is solved exactly.

    `weighted_sum(…, balance=…)` does this in each update of `hfjax.hessian_free`. With
    another optimizer, start from ones and call it yourself:

        value, grads = f.at(count, scales).value_and_grad(params, batch)
        scales = balanced(scales, jnp.stack([c1 * f1.value(params, batch[0]), ...]))

    Args:
      scales: sₖ, shape `[terms]`.
      values: vₖ, shape `[terms]`.
      balance: from 0, which leaves the scales alone, to 1, which gives all terms the same
        share at once.

    Returns:
      The scales for the next update, of the shape and dtype of `scales`.

    Example:
      >>> print(balanced([1.0, 1.0], jnp.array([4.0, 1.0]), balance=0.5).round(3))
      [0.707 1.414]
      >>> print(balanced([1.0, 1.0, 2.0], jnp.array([4.0, 1.0, 0.0]), balance=1.0))
      [0.5 2.  2. ]

    References:
      Webb, Jerad & Cartis (2026), arXiv 2607.02194. There m is the arithmetic mean, which
      multiplies all scales by another common factor, and no vₖ is raised.
    """
    options.check_range("balance", balance, low=0.0, high=1.0)
    scales = 1.0 * jnp.asarray(scales)
    values = jnp.asarray(values).astype(scales.dtype)
    counts = (values > 0) & jnp.isfinite(values)
    least = _LEAST * jnp.max(values, where=counts, initial=0)
    values = jnp.maximum(values, jnp.maximum(least, jnp.finfo(values.dtype).tiny))
    shares = jnp.where(counts, jnp.log(scales) + jnp.log(values), 0)
    mean = jnp.sum(shares) / jnp.maximum(jnp.sum(counts), 1).astype(shares.dtype)
    factors = jnp.exp(options.like(balance, mean) * (mean - shares))
    return jnp.where(counts, scales * factors, scales)


@dataclasses.dataclass(frozen=True)
class Balanced:
    """A weight that has another scale in each update, and stands for a schedule."""

    weight: NumberOrSchedule

    def __call__(self, count: jax.Array) -> jax.Array:
        """Raise, since the number of the update does not say what the scale is."""
        del count
        msg = (
            "The terms of this sum are balanced, and their scales are in the state: use "
            "`objective.at(state.count, state.scales)`."
        )
        raise TypeError(msg)


def number_of_scales(objective: Objective) -> int:
    """Return the number of terms that are balanced, 0 if they are not."""
    return len(vars(objective)["parts"]) if getattr(objective, "balance", 0) else 0


def next_scales(
    objective: Objective, scales: jax.Array, params: Params, batch: Batch
) -> jax.Array:
    """Return the scales in the next update.

    `objective` has the `scales` of this update, at whose start its terms are evaluated.
    """
    parts = vars(objective)["parts"]
    values = [
        jnp.asarray(c, scales.dtype) * part.value(params, own).astype(scales.dtype)
        for (c, part), own in zip(parts, batch, strict=True)
    ]
    return balanced(scales, jnp.stack(values) / scales, vars(objective)["balance"])
