"""The Jacobian of the outputs, written out: G = J̃ᵀJ̃ + weight_decay · I.

A row of J̃ is √(c wᵢ / Σ w) (Sᵢ eₖ)ᵀJᵢ, for the k-th output of case i, with SᵢSᵢᵀ = L″ᵢ
and c the weight of a sum's term. Where Sᵢ is regular the data's part of the gradient is
J̃ᵀr̃, with r̃ᵢ = √(c wᵢ / Σ w) Sᵢ⁻¹∇Lᵢ: a least-squares problem min ‖J̃δ + r̃‖² whatever the
loss is.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax import _programs, _sharding, _tree
from hfjax._cases import as_cases
from hfjax._objective import Objective
from hfjax._types import Batch, Params, Tree
from hfjax._weighted_sum import terms_of


class Jacobian(NamedTuple):
    """J̃ and r̃, of all devices' cases, in float32 or wider.

    Attributes:
      rows: J̃, a tree like the parameters with a leading axis of rows.
      residuals: r̃, shape `[rows]`.
    """

    rows: Tree
    residuals: jax.Array

    def product(self, v: Tree) -> jax.Array:
        """Return J̃ v, shape `[rows]`."""
        return _tree.gram(self.rows, jax.tree.map(lambda x: x[None], v))[:, 0]

    def transpose(self, u: jax.Array) -> Tree:
        """Return J̃ᵀu, like the parameters."""
        return _tree.combination(u, self.rows)


class Size(NamedTuple):
    """What J̃ would be, and a pass forward is; Python integers.

    Attributes:
      rows: outputs of all cases, of this device.
      columns: parameters.
      forward: multiplications of a pass forward over those cases.
    """

    rows: int
    columns: int
    forward: int


def size(objective: Objective, params: Params, batch: Batch) -> Size:
    """Count; the model is traced on one case, and not run.

    Args:
      objective: whose model it is.
      params: θ.
      batch: of the objective.

    Returns:
      The numbers.
    """
    rows = forward = 0
    for _, term, own in terms_of(objective, batch):
        cases = as_cases(own)
        count = cases.weights.shape[0]
        inputs = _sharding.first_case(cases.inputs)
        local = term.local(_sharding.gathered(params, cases))
        program, shapes = jax.make_jaxpr(term.outputs, return_shape=True)(local, inputs)
        leaves = jax.tree.leaves(shapes)
        rows += count * sum(math.prod(leaf.shape[1:]) for leaf in leaves)
        forward += count * _programs.multiplications(program)
    return Size(rows, optax.tree.size(params), forward)


def jacobian(objective: Objective, params: Params, batch: Batch) -> Jacobian:
    """Compute J̃ and r̃: a pass forward, and one back for each output of a case.

    Args:
      objective: whose G it is, without weight decay. Microbatches bound what the passes
        hold, not J̃.
      params: θ.
      batch: of the objective.

    Returns:
      Both, of rows · params numbers.
    """
    parts = [
        _of_term(weight, term, params, own)
        for weight, term, own in terms_of(objective, batch)
    ]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _of_term(
    weight: jax.Array | float, objective: Objective, params: Params, batch: Batch
) -> Jacobian:
    cases = _sharding.alike(as_cases(batch))
    local = objective.local(_sharding.gathered(params, cases))

    def of_case(inputs: Tree, targets: Tree) -> Jacobian:
        inputs, targets = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
        outputs, transpose = jax.vjp(
            lambda params: objective.outputs(params, inputs), local
        )
        flat, unflatten = ravel_pytree(outputs)
        factor = objective.loss.factor(outputs, targets)
        units = jax.vmap(lambda unit: factor(unflatten(unit)))(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        rows = jax.vmap(lambda v: transpose(v)[0])(_tree.cast_like(units, outputs))
        slope = jax.grad(lambda z: jnp.sum(objective.loss.value(z, targets)))(outputs)
        # Sᵀ, as its rows are the S eₖ.
        transposed = jax.vmap(lambda unit: ravel_pytree(unit)[0])(units)
        return Jacobian(rows, _solved(transposed, ravel_pytree(slope)[0]))

    # Every case's outputs, one after another.
    found = jax.lax.map(
        lambda case: of_case(*case),
        (cases.inputs, cases.targets),
        batch_size=objective.microbatch_size or cases.weights.shape[0],
    )
    means = objective.means

    def leaf(x: jax.Array) -> jax.Array:
        x = x.astype(_tree.wide(x.dtype))
        # In the digits of the rows: weights may have fewer.
        w, total, c = (
            jnp.asarray(number, x.dtype)
            for number in (cases.weights, means.total(cases.weights), weight)
        )
        x *= jnp.sqrt(c * w / total).reshape(-1, *[1] * (x.ndim - 1))
        return means.gathered(x.reshape(-1, *x.shape[2:]))

    return jax.tree.map(leaf, found)


def _solved(transposed: jax.Array, slope: jax.Array) -> jax.Array:
    """Return the shortest r with the least ‖S r − ∇L‖."""
    factor = transposed.T.astype(_tree.wide(slope.dtype))
    slope = slope.astype(factor.dtype)
    if slope.size > 1:
        return jnp.matmul(jnp.linalg.pinv(factor), slope, precision=_tree.EXACT)
    (size,) = factor[0]
    return jnp.where(size == 0, 0, slope / jnp.where(size == 0, 1, size))
