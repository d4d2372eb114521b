"""Structural damping as a loss: the hidden states stand beside the outputs.

The report (section 8.4) joins the penalty S(δ) = d(h(θ + δ); h(θ)) to the objective
by a network whose outputs are the pair (z, h), and whose loss is

    L_μ((z, h), t) = L(z, t) + μ d(h; h(θ)).

Its Gauss-Newton matrix is B + μ S″: one product gives both, at the price of one.
"""

import jax
import jax.numpy as jnp

from hfjax import losses
from hfjax._types import Number, Tree


def paired(
    loss: losses.Loss, hidden_loss: losses.Loss, strength: Number
) -> losses.Loss:
    """Build L_μ, a loss of the pair (outputs, hidden).

    Args:
      loss: L.
      hidden_loss: d.
      strength: μ.

    Returns:
      The loss; its outputs are pairs, its targets those of `loss`.
    """
    penalty = distance(hidden_loss)

    def value(pair: tuple, targets: Tree) -> jax.Array:
        outputs, hidden = pair
        data = loss.value(outputs, targets)
        return data + (strength * penalty.value(hidden, None)).astype(data.dtype)

    def hessian(pair: tuple, targets: Tree) -> losses.LinearMap:
        outputs, hidden = pair
        data, structural = (
            loss.hessian(outputs, targets),
            penalty.hessian(hidden, None),
        )
        return lambda v: (data(v[0]), _scaled(strength, structural(v[1])))

    def factor(pair: tuple, targets: Tree) -> losses.LinearMap:
        outputs, hidden = pair
        data, structural = loss.factor(outputs, targets), penalty.factor(hidden, None)
        root = jnp.sqrt(strength)
        return lambda v: (data(v[0]), _scaled(root, structural(v[1])))

    def predict(pair: tuple) -> tuple:
        return loss.predict(pair[0]), penalty.predict(pair[1])

    return losses.Loss(value, hessian, factor, predict)


def distance(hidden_loss: losses.Loss) -> losses.Loss:
    """Build d(h; h(θ)) alone: a loss of the hidden states that reads no targets.

    Args:
      hidden_loss: d; `sigmoid_cross_entropy` takes the hidden units' logits, as for
        outputs (report, footnote 5).

    Returns:
      The loss. Its value has no gradient, as the reference is held fixed.
    """

    def reference(hidden: Tree) -> Tree:
        return jax.lax.stop_gradient(hidden_loss.predict(hidden))

    return losses.Loss(
        lambda hidden, _: hidden_loss.value(hidden, reference(hidden)),
        lambda hidden, _: hidden_loss.hessian(hidden, reference(hidden)),
        lambda hidden, _: hidden_loss.factor(hidden, reference(hidden)),
        hidden_loss.predict,
    )


def _scaled(strength: Number, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: (strength * x).astype(x.dtype), tree)
