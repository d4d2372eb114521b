"""Curvature: an objective, parameters and a batch become a product v ↦ B v.

The generalised Gauss-Newton matrix (report, section 6; Schraudolph 2002) is

    G = Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ / Σᵢ wᵢ + weight_decay · I

with `J` the Jacobian of the model in the parameters and `L″` the Hessian of the
loss in the outputs. It is positive semi-definite wherever the loss is convex in
the outputs, and equals the Hessian where the model is linear.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax

from hfjax import _tree
from hfjax._cases import Cases, check_outputs
from hfjax._types import Matvec, Params, Tree
from hfjax.objective import Objective

Curvature: TypeAlias = Callable[[Objective, Params, tuple], Matvec]
"""`(objective, params, batch) -> (v -> B v)`; called once per update."""


def ggn(objective: Objective, params: Params, batch: tuple) -> Matvec:
    """Build the generalised Gauss-Newton product v ↦ G v.

    The model is linearised here, once; a product is one forward tangent pass and
    its transpose, about 4/3 of a gradient, and runs the model no more (unless the
    objective has microbatches, which are linearised anew in each product). The model
    needs forward derivatives: a `jax.custom_vjp` without them is not supported.

    Args:
      objective: whose model, loss, weights and weight decay define G.
      params: θ, where G is taken.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      The product: trees like `params` to trees like `params`, in the dtype of `v`.
      G has the scale of the objective, a mean over cases.

    Example:
      For a linear model and ½‖z − t‖², G = XᵀX / cases:

      >>> import hfjax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> product = ggn(f, jnp.zeros(2), (x, jnp.zeros(2)))
      >>> v = jnp.array([1.0, -1.0])
      >>> bool(jnp.allclose(product(v), x.T @ x @ v / 2))
      True

    References:
      Martens & Sutskever (2012), sections 6 and 6.1, algorithm 5.
    """

    def term(params: Params, cases: Cases) -> Matvec:
        outputs, tangent = jax.linearize(
            lambda params: objective.model_fn(params, cases.inputs), params
        )
        check_outputs(outputs, cases.weights.shape[0])
        transpose = jax.linear_transpose(tangent, params)
        hessian = objective.loss.hessian(outputs, cases.targets)

        def product(v: Tree) -> Tree:
            curved = _weighted(cases.weights, hessian(tangent(v)))
            return transpose(_tree.cast_like(curved, outputs))[0]

        return product

    return objective.linear_mean(term, params, batch)


def _weighted(weights: jax.Array, tree: Tree) -> Tree:
    """Multiply each case by its weight."""
    return jax.tree.map(
        lambda x: x * weights.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), tree
    )
