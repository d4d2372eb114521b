"""The Jacobian of the outputs, written out: G = J̃ᵀJ̃ + weight_decay · I.

A row of J̃ is √(c wᵢ / Σ w) (Sᵢ eₖ)ᵀJᵢ, for the k-th output of case i, with SᵢSᵢᵀ = L″ᵢ
and c the weight of a sum's term. Where Sᵢ is regular the data's part of the gradient is
J̃ᵀr̃, with r̃ᵢ = √(c wᵢ / Σ w) Sᵢ⁻¹∇Lᵢ: a least-squares problem min ‖J̃δ + r̃‖² whatever the
loss is.
"""

import math
from collections.abc import Callable
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
      moved: δ ↦ √(c wᵢ / Σ w) Sᵢᵀ(zᵢ(θ + δ) − zᵢ(θ)), shape `[rows]`, with Sᵢ of θ: a
        pass forward. Of a model that is linear in θ it is J̃δ.
    """

    rows: Tree
    residuals: jax.Array
    moved: Callable[[Tree], jax.Array]

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
      Both, of rows · params numbers, and what tells how the outputs move.
    """
    parts = [_of_term(params, *term) for term in terms_of(objective, batch)]
    rows, residuals = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves), *(part[:2] for part in parts)
    )
    return Jacobian(
        rows,
        residuals,
        lambda step: jnp.concatenate([part.moved(step) for part in parts]),
    )


def _of_term(
    params: Params, weight: jax.Array | float, objective: Objective, batch: Batch
) -> Jacobian:
    cases = _sharding.alike(as_cases(batch))
    means = objective.means
    local = objective.local(_sharding.gathered(params, cases))

    def of_case(inputs: Tree, targets: Tree) -> tuple[Tree, jax.Array, Tree]:
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
        residuals = _solved(transposed, ravel_pytree(slope)[0])
        return rows, residuals, jax.tree.map(lambda leaf: leaf[0], outputs)

    def of_cases(compute: Callable, *trees: Tree) -> Tree:
        if objective.microbatch_size is None:
            return jax.vmap(compute)(*trees)
        size = objective.microbatch_size
        return jax.lax.map(lambda case: compute(*case), trees, batch_size=size)

    def weighted(x: jax.Array) -> jax.Array:
        """Scale what is of each case's outputs, and lay them one after another."""
        x = x.astype(_tree.wide(x.dtype))
        # In the digits of the rows: weights may have fewer.
        w, total, c = (
            jnp.asarray(number, x.dtype)
            for number in (cases.weights, means.total(cases.weights), weight)
        )
        x *= jnp.sqrt(c * w / total).reshape(-1, *[1] * (x.ndim - 1))
        x = _sharding.gathered(x, cases)
        return means.gathered(x.reshape(-1, *x.shape[2:]))

    rows, residuals, outputs = of_cases(of_case, cases.inputs, cases.targets)

    def moved(step: Tree) -> jax.Array:
        there = _sharding.gathered(_tree.add(params, step), cases)
        there = objective.local(there)

        def of_case(inputs: Tree, targets: Tree, outputs: Tree) -> jax.Array:
            inputs, targets, outputs = jax.tree.map(
                lambda leaf: leaf[None], (inputs, targets, outputs)
            )
            after = objective.outputs(there, inputs)
            change = jax.tree.map(jnp.subtract, after, outputs)
            transpose = jax.linear_transpose(
                objective.loss.factor(outputs, targets), outputs
            )
            (change,) = transpose(change)
            return ravel_pytree(change)[0]

        return weighted(of_cases(of_case, cases.inputs, cases.targets, outputs))

    rows, residuals = jax.tree.map(weighted, (rows, residuals))
    return Jacobian(rows, residuals, moved)


def _solved(transposed: jax.Array, slope: jax.Array) -> jax.Array:
    """Return the shortest r with the least ‖S r − ∇L‖."""
    factor = transposed.T.astype(_tree.wide(slope.dtype))
    slope = slope.astype(factor.dtype)
    if slope.size > 1:
        return jnp.matmul(jnp.linalg.pinv(factor), slope, precision=_tree.EXACT)
    (size,) = factor[0]
    return jnp.where(size == 0, 0, slope / jnp.where(size == 0, 1, size))
