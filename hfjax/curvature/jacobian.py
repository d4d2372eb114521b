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

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import linalg, programs
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.objectives.cases import Cases
from hfjax.objectives.plain import Objective, terms_of
from hfjax.objectives.terms import Term


class Jacobian(NamedTuple):
    """J̃ and r̃, of all devices' cases, in float32 or wider.

    Attributes:
      rows: J̃, a tree like the parameters with a leading axis of rows.
      residuals: r̃, shape `[rows]`.
      residuals_at: δ ↦ r̃(θ + δ), but with the Sᵢ of θ, shape `[rows]`: a pass forward. Of
        squared errors and a model that is linear in θ it is r̃ + J̃δ.
    """

    rows: Tree
    residuals: jax.Array
    residuals_at: Callable[[Tree], jax.Array]

    def product(self, v: Tree) -> jax.Array:
        """Return J̃ v, shape `[rows]`."""
        return trees.gram(self.rows, jax.tree.map(lambda x: x[None], v))[:, 0]

    def transpose(self, u: jax.Array) -> Tree:
        """Return J̃ᵀu, like the parameters."""
        return trees.combination(u, self.rows)


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
    for term in terms_of(objective, batch):
        count = term.cases.weights.shape[0]
        inputs = sharding.first_case(term.cases.inputs)
        local = term.means.local(sharding.gathered(params, term.cases))
        program, shapes = jax.make_jaxpr(term.outputs, return_shape=True)(local, inputs)
        leaves = jax.tree.leaves(shapes)
        rows += count * sum(math.prod(leaf.shape[1:]) for leaf in leaves)
        forward += count * programs.multiplications(program)
    return Size(rows, optax.tree.size(params), forward)


@noting_no_reverse()
def jacobian(objective: Objective, params: Params, batch: Batch) -> Jacobian:
    """Compute J̃ and r̃: a pass forward, and one back for each output of a case.

    Args:
      objective: whose G it is, without weight decay. Microbatches bound what the passes
        hold, not J̃.
      params: θ.
      batch: of the objective.

    Returns:
      Both, of rows · params numbers, and what tells r̃ elsewhere.
    """
    parts = [_of_term(params, term) for term in terms_of(objective, batch)]
    rows, residuals = jax.tree.map(_joined, *(part[:2] for part in parts))
    return Jacobian(
        rows,
        residuals,
        for_loops(lambda step: _joined(*(part.residuals_at(step) for part in parts))),
    )


def _joined(*arrays: jax.Array) -> jax.Array:
    """Lay arrays one after another, in the widest of their dtypes."""
    dtype = trees.widest(*(x.dtype for x in arrays))
    return jnp.concatenate([x.astype(dtype) for x in arrays])


def _ravelled(tree: Tree) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
    """Lay a tree out in one vector, of the widest dtype, and tell how to undo it."""
    with jax.numpy_dtype_promotion("standard"):
        return ravel_pytree(tree)


def with_penalty(of_f: Jacobian, strength: jax.Array, of_penalty: Jacobian) -> Jacobian:
    """Append the rows of a quadratic penalty, ½ `strength` ‖J̃ₚδ‖².

    Structural damping is one: it is no part of f, so that its residuals elsewhere are
    those of the linear model. (The distance of the hidden states at θ + δ to themselves,
    which the joined loss has, is 0, and would cancel the damping.)

    Args:
      of_f: J̃ and r̃ of f.
      strength: μ.
      of_penalty: J̃ₚ.

    Returns:
      Both, one after the other.
    """

    def scaled(x: jax.Array) -> jax.Array:
        return jnp.sqrt(strength).astype(x.dtype) * x

    penalty = of_penalty._replace(rows=jax.tree.map(scaled, of_penalty.rows))
    rows = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), of_f.rows, penalty.rows
    )
    none = sharding.zeros_like(penalty.residuals).astype(of_f.residuals.dtype)

    def residuals_at(step: Tree) -> jax.Array:
        own = of_f.residuals_at(step)
        return jnp.concatenate([own, penalty.product(step).astype(own.dtype)])

    return Jacobian(rows, jnp.concatenate([of_f.residuals, none]), residuals_at)


def _of_term(params: Params, term: Term) -> Jacobian:
    cases, means = sharding.alike(term.cases), term.means
    local = means.local(sharding.gathered(params, cases))

    def of_case(
        inputs: Tree, targets: Tree
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        inputs, targets = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
        outputs, transpose = jax.vjp(lambda params: term.outputs(params, inputs), local)
        flat, unflatten = _ravelled(outputs)
        factor = term.loss.factor(outputs, targets)
        units = jax.vmap(lambda unit: factor(unflatten(unit)))(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        # An S that is the same for all cases is no device's own.
        columns = trees.cast_like(means.local(units), outputs)
        rows = jax.vmap(lambda v: transpose(v)[0])(columns)
        # Of parameters without entries nothing is gathered, or mapped.
        rows = [leaf for leaf in jax.tree.leaves(rows) if leaf.size]
        transposed = jax.vmap(lambda unit: _ravelled(unit)[0])(units)
        inverse = _pseudoinverse(transposed.T, flat.dtype)
        return rows, _solved(term, inverse, outputs, targets), inverse

    def of_cases(compute: Callable, *trees: Tree) -> Tree:
        if means.microbatch_size is None:
            return jax.vmap(compute)(*trees)
        size = means.microbatch_size
        compute = for_loops(compute)
        return jax.lax.map(lambda case: compute(*case), trees, batch_size=size)

    weighted = _weighted(term, cases)
    rows, residuals, inverses = of_cases(of_case, cases.inputs, cases.targets)

    def residuals_at(step: Tree) -> jax.Array:
        there = sharding.gathered(trees.add(params, step), cases)
        there = means.local(there)

        def of_case(inputs: Tree, targets: Tree, inverse: jax.Array) -> jax.Array:
            inputs, targets = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
            return _solved(term, inverse, term.outputs(there, inputs), targets)

        known = sharding.alike((cases.inputs, cases.targets, inverses))
        return weighted(of_cases(of_case, *known))

    rows, residuals = jax.tree.map(weighted, (rows, residuals))
    leaves, structure = jax.tree.flatten(params)
    found = iter(rows)
    rows = [
        next(found)
        if leaf.size
        else jnp.zeros((len(residuals), *leaf.shape), trees.wide(leaf.dtype))
        for leaf in leaves
    ]
    return Jacobian(structure.unflatten(rows), residuals, residuals_at)


def _solved(term: Term, inverse: jax.Array, outputs: Tree, targets: Tree) -> jax.Array:
    """Return S⁺∇L of a case: the shortest r with the least ‖S r − ∇L‖."""
    slope = jax.grad(lambda z: jnp.sum(term.loss.value(z, targets)))(outputs)
    slope = _ravelled(slope)[0].astype(inverse.dtype)
    return jnp.matmul(inverse, slope, precision=trees.EXACT)


def _weighted(term: Term, cases: Cases) -> Callable[[jax.Array], jax.Array]:
    """Scale what is of each case's outputs, and lay them one after another."""
    total = term.means.total(cases.weights)
    weight = 1 if term.weight is None else term.weight

    def weighted(x: jax.Array) -> jax.Array:
        x = x.astype(trees.wide(x.dtype))
        # In the digits of the rows: weights may have fewer.
        w, all_of_them, c = (
            jnp.asarray(number, x.dtype) for number in (cases.weights, total, weight)
        )
        x *= jnp.sqrt(c * w / all_of_them).reshape(-1, *[1] * (x.ndim - 1))
        x = sharding.gathered(x, cases)
        return term.means.gathered(x.reshape(-1, *x.shape[2:]))

    return weighted


def _pseudoinverse(factor: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return S⁺ of an S with the digits of a dtype; else its kernel would count."""
    factor = factor.astype(trees.wide(factor.dtype))
    if factor.size > 1:
        eps = float(jnp.finfo(dtype).eps)
        return linalg.pinv(factor, jnp.asarray(10 * len(factor) * eps, factor.dtype))
    return jnp.where(factor == 0, 0, 1 / jnp.where(factor == 0, 1, factor))
