"""vᵀG v of the Gauss-Newton matrix, by forward mode alone.

A product with G goes forwards through the model and back. vᵀG v = Σᵢ wᵢ (Jᵢv)ᵀ L″ᵢ (Jᵢv)
needs the way forwards only: half of the time, and of the memory nothing for the way back.
"""

import jax

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing.linearize import linearized
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import Term, total


def quadratic_form(
    objective: Objective, params: Params, batch: Batch, v: Tree
) -> jax.Array:
    """Compute vᵀG v, where G includes the weight decay as in `hfjax.curvature.ggn`.

    Args:
      objective: its model, loss, weights and weight decay define G.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`. Microbatches whose weights
        are all 0 cost nothing.
      v: a tree like `params`.

    Returns:
      A scalar in float32 or wider; the part of the examples is 0 if they have no weight.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> x, v = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1.0, -1.0])
      >>> print(quadratic_form(f, jnp.zeros(2), (x, jnp.zeros(2)), v))  # ‖x v‖² / 2
      1.0
    """
    terms = terms_of(objective, batch)
    return total(terms, [_of_term(term, params, v) for term in terms])


def _of_term(term: Term, params: Params, v: Tree) -> jax.Array:
    local = term.means.local(params)
    direction = term.means.local(trees.cast_like(v, params))

    def of_cases(cases: Cases) -> jax.Array:
        outputs, along, _ = linearized(lambda p: term.forward(p, cases), local)
        tangent = along(direction)
        curved = term.loss.hessian(outputs, cases.targets)(tangent)

        def weighted(x: jax.Array) -> jax.Array:
            weights = cases.weights.reshape(-1, *[1] * (x.ndim - 1))
            return x * weights.astype(x.dtype)

        return trees.dot(tangent, jax.tree.map(weighted, trees.widen(curved)))

    wide = trees.widen(v)
    decayed = term.decayed(sharding.zeros_like(wide), wide)
    mean = term.means.mean(of_cases, term.cases)
    return mean + trees.dot(wide, decayed).astype(mean.dtype)
