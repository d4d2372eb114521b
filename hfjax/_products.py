"""Products with a mean of matrices, one of each case: where linearising happens.

Over microbatches and devices, and with the weight decay, as the objective has them.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax

from hfjax import _tree
from hfjax._arguments import as_params
from hfjax._cases import Cases, as_cases, split
from hfjax._convolutions import for_loops
from hfjax._linearize import linearized
from hfjax._types import Batch, Matvec, Params, Tree
from hfjax.objective import Objective

Term: TypeAlias = Callable[[Objective, Params, Cases], Matvec]
"""`(objective, params, cases) -> (v -> Σᵢ wᵢ Bᵢ v)`, of the objective it is handed."""


def linear_mean(
    term: Term, objective: Objective, params: Params, batch: Batch
) -> Matvec:
    """Build v ↦ Σᵢ wᵢ Bᵢ v / Σᵢ wᵢ + weight_decay · v for symmetric Bᵢ of each case.

    Args:
      term: without microbatches, or to linearise once, it is called once, here: what
        it computes outside the product is computed once. Else it is called inside
        the product, on each microbatch.
      objective: how the mean is taken; its weight decay.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      The product, with the dtypes of `v`.
    """
    params, cases = as_params(params), as_cases(batch)
    parts = split(cases, objective.microbatch_size)
    source, local = objective, objective.local(params)
    if objective.linearize_once and parts.count > 1:
        # By wide parameters, narrowed in each microbatch: the transpose of a loop
        # sums in the dtype of what it is taken by.
        source, local = _narrowed(objective, params), _tree.widen(local)
    once = parts.count == 1 or objective.linearize_once
    # Conjugate gradients are a loop.
    whole = for_loops(term(source, local, cases)) if once else None

    def matvec(v: Tree) -> Tree:
        tangent = objective.local(_tree.cast_like(v, params))
        if whole is not None:
            sums = _tree.widen(whole(_tree.cast_like(tangent, local)))
        else:
            sums = objective.means.accumulate(
                lambda part: term(objective, local, part)(tangent), parts
            )
        mean = objective.means.divide(sums, cases.weights)
        return _tree.cast_like(objective.decayed(mean, v), v)

    return matvec


def gauss_newton(
    forward: Callable[[Params], Tree],
    hessian: Callable[[Tree], Matvec],
    params: Params,
    cases: Cases,
) -> Matvec:
    """Build v ↦ Σᵢ wᵢ Jᵢᵀ Hᵢ Jᵢ v, linearised here.

    Args:
      forward: `params -> z`, of which J is the Jacobian.
      hessian: `z -> (v -> H v)`, case by case.
      params: θ.
      cases: whose weights are taken.

    Returns:
      The product.
    """
    outputs, tangent, transpose = linearized(forward, params)
    curved = hessian(outputs)

    def product(v: Tree) -> Tree:
        weighted = _weighted(cases.weights, curved(tangent(v)))
        return transpose(_tree.cast_like(weighted, outputs))

    return product


def _weighted(weights: jax.Array, tree: Tree) -> Tree:
    """Multiply each case by its weight."""
    return jax.tree.map(
        lambda x: x * weights.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), tree
    )


def _narrowed(objective: Objective, params: Params) -> Objective:
    """Return the objective for wide parameters, run in the dtypes of `params`."""

    def model_fn(wide: Params, inputs: Tree) -> Tree:
        return objective.model_fn(_tree.cast_like(wide, params), inputs)

    return dataclasses.replace(objective, model_fn=model_fn)
