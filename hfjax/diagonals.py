"""Diagonals of curvature matrices, for preconditioners and damping matrices.

    diag(F) = Σᵢ wᵢ (∇Lᵢ)² / Σᵢ wᵢ + weight_decay

is the diagonal of the empirical Fisher matrix: the squares of each case's own
gradient, averaged (report, section 11.3; ERRATA: a mean, so that it stands on
the scale of G and λ). The square of the mean gradient is another thing.
"""

import jax
import jax.numpy as jnp

from hfjax import _case_gradients
from hfjax._cases import Cases, as_cases
from hfjax._types import Params, Tree
from hfjax.objective import Objective

_HELD_ENTRIES = 2**24
"""Entries of per-case gradients held at once: 64 MiB in float32; heuristic."""


def empirical_fisher(objective: Objective, params: Params, batch: tuple) -> Params:
    """Compute the diagonal of the empirical Fisher matrix.

    Where a case's gradient is an outer product of layer input and back-propagated
    error (dense layers, in any notation), the sum of squares is one matrix product
    of squares, at the cost of a gradient (report, algorithm 6). Other gradients
    (convolutions, recurrent and shared weights) are formed for as many cases at a
    time as fit in 64 MiB, at many times that cost.

    Args:
      objective: whose loss is differentiated case by case; weight decay is added to
        the diagonal, as it is to the curvature.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      A tree like `params`, in float32 or wider; not negative.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))
      >>> print(empirical_fisher(f, jnp.zeros(1), batch))  # mean of (−1)² and 2²
      [2.5]

    References:
      Martens & Sutskever (2012), section 11.3, algorithm 6; Martens (2010), 4.7.
    """
    local = objective.local(params)

    def case_gradient(case: tuple) -> Params:
        one = jax.tree.map(lambda leaf: leaf[None], case)
        return jax.grad(lambda params: objective.case_values(params, one)[0])(local)

    def sum_of_squares(cases: Cases) -> Tree:
        data = (cases.inputs, cases.targets)
        return _case_gradients.sum_of_squares(case_gradient, data, cases.weights)

    cases = as_cases(batch)
    held = _case_gradients.held_entries(case_gradient, (cases.inputs, cases.targets))
    bounded = objective.with_microbatches(max(1, _HELD_ENTRIES // max(held, 1)))
    mean = bounded.mean(sum_of_squares, batch)
    return jax.tree.map(
        lambda x: x + jnp.asarray(objective.weight_decay, x.dtype), mean
    )
