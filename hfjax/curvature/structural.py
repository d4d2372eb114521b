"""Structural damping as a loss: the hidden states become outputs beside the real ones.

M&S (2012), section 8.4, add the penalty S(δ) = d(h(θ + δ); h(θ)) to the objective by
means of a network whose outputs are the pair (z, h), with the loss

    L_μ((z, h), t) = L(z, t) + μ d(h; h(θ)).

Its Gauss-Newton matrix is B + μ S″, so one product gives both, at the price of one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hfjax import losses
from hfjax._core import options, trees
from hfjax._core.types import Number, Tree
from hfjax.losses.loss import LinearMap
from hfjax.objectives.plain import Objective, check_objective, outputs_and_hidden


def with_structural_loss(objective: Objective, strength: Number) -> Objective:
    """Add μ times the distance of the hidden states to the loss: L + μ d(h; h(θ)).

    This is for curvature and its diagonals. The gradient is that of f, because the
    distance has its minimum at θ. The outputs are pairs `(outputs, hidden)`, and the
    result has no `hidden_loss` of its own. `strength` is μ, on the scale of the mean
    loss. Where positions have weights, the distance is that of all hidden states of an
    example, which counts with the sum of the example's weights.

    Example:
      For outputs z = θx and hidden states h = θ, G = x² + μ:

      >>> import hfjax
      >>> loss = losses.squared_error()
      >>> f = Objective(lambda p, x: (p * x, p + 0 * x), loss, hidden_loss=loss)
      >>> batch, p = (jnp.array([[3.0]]), jnp.zeros((1, 1))), jnp.array([[1.0]])
      >>> print(hfjax.curvature.ggn(with_structural_loss(f, 0.5), p, batch)(p))
      [[9.5]]

    References:
      Martens & Sutskever (2012), section 8.4.
    """
    options.check_range("strength", strength, low=0.0)
    hidden_loss = _needed(objective)
    return dataclasses.replace(
        objective,
        model_fn=functools.partial(outputs_and_hidden, objective),
        loss=_paired(objective.loss, hidden_loss, strength),
        hidden_loss=None,
    )


def hidden_distance(objective: Objective) -> Objective:
    """Return d(h(θ + δ); h(θ)) alone as an objective, without loss and weight decay.

    Its gradient is 0, because the distance has its minimum where it is taken.

    Example:
      >>> import hfjax
      >>> loss = losses.squared_error()
      >>> f = Objective(lambda p, x: (p * x, 2 * p + 0 * x), loss, hidden_loss=loss)
      >>> batch, p = (jnp.array([[3.0]]), jnp.zeros((1, 1))), jnp.array([[1.0]])
      >>> print(hfjax.curvature.ggn(hidden_distance(f), p, batch)(p))
      [[4.]]
    """
    hidden_loss = _needed(objective)
    return dataclasses.replace(
        objective,
        model_fn=lambda *args: outputs_and_hidden(objective, *args)[1],
        loss=_distance(hidden_loss),
        weight_decay=0.0,
        hidden_loss=None,
    )


def _needed(objective: Objective) -> losses.Loss:
    check_objective(objective)
    if objective.hidden_loss is None:
        msg = (
            "Structural damping needs hidden states: give `Objective` a "
            "`hidden_loss`, and a `model_fn` that returns (outputs, hidden)."
        )
        raise ValueError(msg)
    return objective.hidden_loss


def _paired(
    loss: losses.Loss, hidden_loss: losses.Loss, strength: Number
) -> losses.Loss:
    """Build L_μ, whose outputs are pairs (outputs, hidden), with the targets of L."""
    penalty = _distance(hidden_loss)

    def value(pair: tuple, targets: Tree) -> jax.Array:
        data, distance = loss.value(pair[0], targets), penalty.value(pair[1], None)
        return data + _scaled(strength, distance).astype(data.dtype)

    def both(data: LinearMap, structural: LinearMap, times: Number) -> LinearMap:
        return lambda v: (data(v[0]), _scaled(times, structural(v[1])))

    def hessian(pair: tuple, targets: Tree) -> LinearMap:
        maps = loss.hessian(pair[0], targets), penalty.hessian(pair[1], None)
        return both(*maps, strength)

    def factor(pair: tuple, targets: Tree) -> LinearMap:
        maps = loss.factor(pair[0], targets), penalty.factor(pair[1], None)
        # The factor of μ d″ is √μ times that of d″.
        return both(*maps, jnp.sqrt(strength))

    def predict(pair: tuple) -> tuple:
        return loss.predict(pair[0]), penalty.predict(pair[1])

    def coarse(pair: tuple, targets: Tree) -> str | None:
        return loss.coarse(pair[0], targets) or penalty.coarse(pair[1], None)

    # Weights of positions are those of the outputs: the distance counts by example.
    weighted = loss.weighted and _paired(loss.weighted, hidden_loss, strength)
    return losses.Loss(
        value, hessian, factor, predict, coarse=coarse, weighted=weighted
    )


def _distance(hidden_loss: losses.Loss) -> losses.Loss:
    """Build d(h; h(θ)) as a loss of the hidden states that does not read targets.

    Its value has no gradient, as the reference is held fixed.
    """

    # The reference is `predict` of the hidden states, so `sigmoid_cross_entropy` expects
    # the hidden units' logits, just as for outputs (M&S (2012), footnote 5).
    def reference(hidden: Tree) -> Tree:
        return jax.lax.stop_gradient(hidden_loss.predict(hidden))

    distance = losses.Loss(
        lambda hidden, _: hidden_loss.value(hidden, reference(hidden)),
        lambda hidden, _: hidden_loss.hessian(hidden, reference(hidden)),
        lambda hidden, _: hidden_loss.factor(hidden, reference(hidden)),
        hidden_loss.predict,
        coarse=lambda hidden, _: hidden_loss.coarse(hidden, hidden),
    )
    # It reads no targets, and so no weights of positions among them.
    return dataclasses.replace(distance, weighted=distance)


def _scaled(strength: Number, tree: Tree) -> Tree:
    return trees.scale(jnp.asarray(strength), tree)
