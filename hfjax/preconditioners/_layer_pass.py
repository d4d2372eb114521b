"""A pass forward through the layers of a model, and what comes back to them, by cases.

Where it is plain which axis of each layer's result is that of the cases, the model is
evaluated on all of them at once: by the same program as the gradient's, which a compiler
then evaluates once for both. Else it is evaluated case by case, in one `jax.vmap`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Params, Tree
from hfjax.objectives.cases import Cases
from hfjax.preconditioners import _layers
from hfjax.preconditioners._interpret import Use
from hfjax.preconditioners._layers import Model

Added = list[jax.Array]
"""Zeros, which are added to the result of each use of a kernel."""


class LayerPass(NamedTuple):
    """How to evaluate a model so that its layers can be seen.

    Attributes:
      added: zeros to differentiate by.
      forward: `added -> (outputs, inputs of each use)`, `[cases, positions, inputs]`.
      errors: `(number of a use, derivative by what is added) -> rows`, `[cases,
        positions, units]`.
    """

    added: Added
    forward: Callable[[Added], tuple[Tree, list[jax.Array]]]
    errors: Callable[[int, jax.Array], jax.Array]


def layer_pass(
    model: Model,
    model_fn: Callable[[Params, Tree], Tree],
    params: Params,
    cases: Cases,
) -> LayerPass:
    """Prepare a pass through a model's layers.

    Args:
      model: as `_layers.read` found it in `model_fn`, on one case.
      model_fn: `(params, inputs) -> outputs`.
      params: θ.
      cases: whose inputs it is evaluated on.

    Returns:
      The pass.
    """
    if sharding.shards_of_cases(cases.inputs) == 1:
        whole = _layers.read(model_fn, params, cases.inputs, model.others)
        axes = _axes_of_cases(model, whole, len(cases.weights))
        if axes is not None:
            return _at_once(whole, axes, params, cases)
    return _by_case(model, params, cases)


def _by_case(model: Model, params: Params, cases: Cases) -> LayerPass:
    def forward(added: Added) -> tuple[Tree, list[jax.Array]]:
        def one(added: Added, inputs: Tree) -> tuple[Tree, list[jax.Array]]:
            case = jax.tree.map(lambda x: x[None], inputs)
            outputs, rows = model.evaluate(params, case, added)
            return jax.tree.map(lambda z: z[0], outputs), rows

        return jax.vmap(one)(added, cases.inputs)

    def errors(number: int, derivative: jax.Array) -> jax.Array:
        return jax.vmap(lambda one: model.errors(number, one))(derivative)

    nothing = sharding.zeros_like(cases.weights)  # Laid out as the cases are.
    zeros = jax.vmap(lambda w: [z + w.astype(z.dtype) for z in model.zeros()])(nothing)
    return LayerPass(zeros, forward, errors)


def _at_once(whole: Model, axes: list[int], params: Params, cases: Cases) -> LayerPass:
    def rows_of_cases(number: int, rows: jax.Array) -> jax.Array:
        """Lay out `[positions of all cases, …]` as `[cases, positions, …]`."""
        use = whole.uses[number]
        free = [axis for axis in range(len(use.shape)) if axis not in use.output_axes]
        lead = (*use.loops, *(use.shape[axis] for axis in free))
        place = len(use.loops) + free.index(axes[number])
        rows = rows.reshape(*lead, rows.shape[-1])
        return jnp.moveaxis(rows, place, 0).reshape(lead[place], -1, rows.shape[-1])

    def forward(added: Added) -> tuple[Tree, list[jax.Array]]:
        outputs, rows = whole.evaluate(params, cases.inputs, added)
        return outputs, [rows_of_cases(n, x) for n, x in enumerate(rows)]

    def errors(number: int, derivative: jax.Array) -> jax.Array:
        return rows_of_cases(number, whole.errors(number, derivative))

    nothing = sharding.zeros_like(cases.weights)  # Each device's own, as the cases are.

    def zeros(use: Use, axis: int, zero: jax.Array) -> jax.Array:
        along = [1] * zero.ndim
        along[len(use.loops) + axis] = -1
        return zero + nothing.reshape(along).astype(zero.dtype)

    added = [
        zeros(use, axis, zero)
        for use, axis, zero in zip(whole.uses, axes, whole.zeros(), strict=True)
    ]
    return LayerPass(added, forward, errors)


def _axes_of_cases(model: Model, whole: Model, count: int) -> list[int] | None:
    """Return the axis of the cases in each use's result, where a case has one entry.

    Args:
      model: read on one case.
      whole: read on all of them.
      count: of cases.

    Returns:
      The axes; `None` unless all uses are the same but for such an axis each.
    """
    if len(model.uses) != len(whole.uses):
        return None
    axes = []
    for one, many in zip(model.uses, whole.uses, strict=True):
        same = one._replace(path=(), shape=()) == many._replace(path=(), shape=())
        if not same or one.is_complex or len(one.shape) != len(many.shape):
            return None
        pairs = enumerate(zip(one.shape, many.shape, strict=True))
        longer = [axis for axis, (before, after) in pairs if before != after]
        if len(longer) != 1 or longer[0] in one.output_axes:
            return None
        (axis,) = longer
        if (one.shape[axis], many.shape[axis]) != (1, count):
            return None
        axes.append(axis)
    return axes
