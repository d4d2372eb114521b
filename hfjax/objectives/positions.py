"""Weights of positions: tokens, pixels or other parts of an example that the loss sums.

    f(θ) = Σᵢₚ wᵢₚ Lᵢₚ / Σᵢₚ wᵢₚ = Σᵢ Wᵢ L̄ᵢ / Σᵢ Wᵢ,
    Wᵢ = Σₚ wᵢₚ,        L̄ᵢ = Σₚ (wᵢₚ / Wᵢ) Lᵢₚ

So an example whose positions have weights is one of weight Wᵢ, and its loss is the mean
over its positions. The shares wᵢₚ / Wᵢ travel with the targets. Nothing else has to know:
microbatches, devices, curvature, factors and exact solutions are those of weights `[cases]`.

An example or a position of weight 0 may hold anything, as 0 · NaN would be NaN: what stands
there is replaced before model and loss see it.
"""

import jax
import jax.numpy as jnp

from hfjax.losses import Loss
from hfjax.losses.positions import counted
from hfjax.objectives.cases import Cases


def weighted_cases(loss: Loss, cases: Cases) -> tuple[Loss, Cases]:
    """Return a loss and examples that have one weight each, with the same f."""
    if cases.weights.ndim == 1:
        return loss, cases
    if loss.weighted is None:
        given = cases.weights.shape
        msg = (
            f"Weights of shape {given} are of positions, and this `hfjax.losses.Loss` has "
            f"no `weighted`: give each case one weight, of shape ({given[0]},), or write "
            "the loss by `hfjax.losses.from_function`."
        )
        raise ValueError(msg)
    return loss.weighted, shared(cases)


def shared(cases: Cases) -> Cases:
    """Give each example the weight Wᵢ, and its targets the shares of its positions."""
    inputs, targets, weights = cases
    # As wide as possible, so that Wᵢ times a share is wᵢₚ to the rounding of any loss.
    weights = weights.astype(jax.dtypes.canonicalize_dtype(jnp.float64))
    positions = tuple(range(1, weights.ndim))
    whole = jnp.sum(weights, axis=positions)
    divisor = jnp.expand_dims(jnp.where(whole == 0, 1, whole), positions)
    return Cases(inputs, (targets, weights / divisor), whole)


def without_padding(cases: Cases, *, compared: bool = False) -> Cases:
    """Replace what has weight 0, as far as it could do harm.

    Labels become 0 and other targets 1, which losses take that divide by their norm or take
    their logarithm; they would not take a label of −100. Inputs become 0 only where
    they are NaN or infinite, because a model may use the others at other positions, as
    those of a prompt. If the loss has `compared` examples, the same holds for targets.
    """
    inputs, targets, weights = jax.tree.map(jnp.asarray, cases)
    return Cases(
        counted(inputs, weights, finite_stay=True),
        counted(targets, weights, finite_stay=compared, fill=1),
        weights,
    )
