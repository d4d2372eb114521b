"""A forward pass through the layers of a model, and the errors that come back.

If it is certain which axis of each layer's output indexes the examples, the model is
evaluated on all of them at once. This is the program of the gradient, and a compiler
then evaluates it once for both. Otherwise it is evaluated on each example, in one
`jax.vmap`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Params, Tree
from hfjax._tracing import layers
from hfjax._tracing.interpret import Arrays
from hfjax._tracing.layers import Model, Taken
from hfjax.objectives.cases import Cases

_BY_CASE = (0, Taken(inputs=0, scales=None))  # pyright: ignore[reportArgumentType]
"""Axes of the examples in outputs and in what is taken out of the program."""


class LayerPass(NamedTuple):
    """How to evaluate a model to see the inputs and errors of its layers.

    Attributes:
      added: the zeros to differentiate by.
      forward: `added -> (outputs, taken)`, where `taken` is for `rows`.
      rows: `(number of a use, taken, derivatives by what is added) -> (inputs, errors)`,
        `[cases, positions, inputs]` or `[cases, blocks, positions, inputs]`, and likewise
        with units for inputs.
    """

    added: Arrays
    forward: Callable[[Arrays], tuple[Tree, Taken]]
    rows: Callable[[int, Taken, Arrays], tuple[jax.Array, jax.Array]]


def layer_pass(
    model: Model, model_fn: Callable[[Params, Tree], Tree], params: Params, cases: Cases
) -> LayerPass:
    """Prepare a pass over `cases` through a model that was read on one example."""
    if sharding.shards_of_cases(cases.inputs) == 1:
        spoiled = {n: x for n, x in model.others.items() if n not in model.scalings}
        whole = layers.read(model_fn, params, cases.inputs, spoiled)
        axes = _axes_of_cases(model, whole, len(cases.weights))
        if axes is not None:
            return _at_once(whole, axes, params, cases)
    return _by_case(model, params, cases)


def _by_case(model: Model, params: Params, cases: Cases) -> LayerPass:
    def forward(added: Arrays) -> tuple[Tree, Taken]:
        def one(added: Arrays, inputs: Tree) -> tuple[Tree, Taken]:
            case = jax.tree.map(lambda x: x[None], inputs)
            outputs, taken = model.evaluate(params, case, added)
            return jax.tree.map(lambda z: z[0], outputs), taken

        return jax.vmap(one, out_axes=_BY_CASE)(added, cases.inputs)

    def rows(
        number: int, taken: Taken, derivatives: Arrays
    ) -> tuple[jax.Array, jax.Array]:
        one = functools.partial(model.rows, number)
        return jax.vmap(one, in_axes=(_BY_CASE[1], 0))(taken, derivatives)

    # Like the weights, the zeros lie over devices as the examples do.
    nothing = sharding.zeros_like(cases.weights)

    def zeros(w: jax.Array) -> Arrays:
        return {path: z + w.astype(z.dtype) for path, z in model.zeros().items()}

    return LayerPass(jax.vmap(zeros)(nothing), forward, rows)


def _at_once(whole: Model, axes: list[int], params: Params, cases: Cases) -> LayerPass:
    def rows_of_cases(number: int, rows: jax.Array) -> jax.Array:
        """Lay out `[…, positions of all cases, …]` as `[cases, …, positions, …]`."""
        # `laid_out` has joined the loops and the other axes of the output into positions.
        use, (*blocks, _, last) = whole.uses[number], rows.shape
        lead = use.lead
        place = list(lead).index(len(use.loops) + axes[number])
        rows = rows.reshape(*blocks, *lead.values(), last)
        rows = jnp.moveaxis(rows, len(blocks) + place, 0)
        return rows.reshape(len(rows), *blocks, -1, last)

    def forward(added: Arrays) -> tuple[Tree, Taken]:
        return whole.evaluate(params, cases.inputs, added)

    def rows(
        number: int, taken: Taken, derivatives: Arrays
    ) -> tuple[jax.Array, jax.Array]:
        inputs, errors = whole.rows(number, taken, derivatives)
        return rows_of_cases(number, inputs), rows_of_cases(number, errors)

    # Under `shard_map` the zeros must vary over devices, as the examples do.
    nothing = sharding.zeros_like(cases.weights)

    added = whole.zeros()
    for use, axis in zip(whole.uses, axes, strict=True):
        zero = added[use.path]
        along = [1] * zero.ndim
        along[len(use.loops) + axis] = -1
        added[use.path] = zero + nothing.reshape(along).astype(zero.dtype)
    return LayerPass(added, forward, rows)


def _axes_of_cases(model: Model, whole: Model, count: int) -> list[int] | None:
    """Return the axis of each use's output that indexes examples; `None` if uncertain.

    `model` was read on one example, `whole` on `count` of them. The axis is certain if
    both have the same uses, except that one axis of each output has length 1 in `model`
    and `count` in `whole`.
    """
    if len(model.uses) != len(whole.uses):
        return None
    axes = []
    for one, many in zip(model.uses, whole.uses, strict=True):
        if (
            one.anywhere() != many.anywhere()
            or one.is_complex
            or len(one.shape) != len(many.shape)
        ):
            return None
        pairs = enumerate(zip(one.shape, many.shape, strict=True))
        longer = [axis for axis, (before, after) in pairs if before != after]
        if len(longer) != 1 or one.added[longer[0]]:
            return None
        (axis,) = longer
        if (one.shape[axis], many.shape[axis]) != (1, count):
            return None
        axes.append(axis)
    return axes
