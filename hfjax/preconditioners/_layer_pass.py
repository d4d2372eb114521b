"""A forward pass through the layers of a model, and the errors that come back.

If it is certain which axis of each layer's output indexes the examples, the model is
evaluated on all of them at once. This is the program of the gradient, and a compiler
then evaluates it once for both. Otherwise it is evaluated on each example, in one
`jax.vmap`.

If the whole batch is one example, the model was read on all of it. Where it is certain
which axis indexes the examples of the batch, they are taken apart again. For other layers
they are positions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Params, Tree
from hfjax._tracing import layers
from hfjax._tracing.interpret import Arrays, Use
from hfjax._tracing.layers import Model, Taken
from hfjax.objectives.cases import Cases
from hfjax.objectives.terms import Term
from hfjax.objectives.whole_batch import weights_of_examples

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
      apart: whether the rows of each use tell examples apart.
      weights: those of the rows of each use, for inputs and for errors.
    """

    added: Arrays
    forward: Callable[[Arrays], tuple[Tree, Taken]]
    rows: Callable[[int, Taken, Arrays], tuple[jax.Array, jax.Array]]
    apart: Sequence[bool]
    weights: Sequence[tuple[jax.Array, jax.Array]]


def layer_pass(model: Model, term: Term, params: Params, cases: Cases) -> LayerPass:
    """Prepare a pass over `cases` through the model of a term, read on one example."""
    if term.whole_batch:
        return _of_whole_batch(model, term, params, cases)
    # The zeros are laid out like the weights. Those of a batch without weights are ones,
    # the same on all devices: derivatives by them would be summed over the devices.
    cases = cases._replace(weights=term.means.local(cases.weights))
    if sharding.shards_of_cases(cases.inputs) == 1:
        spoiled = {n: x for n, x in model.others.items() if n not in model.scalings}
        whole = layers.read(term.outputs, params, cases.inputs, spoiled)
        axes = _axes_of_cases(model, whole, 1, len(cases.weights))
        if None not in axes:
            return _at_once(whole, axes, params, cases)
    return _by_case(model, params, cases)


def _of_whole_batch(
    model: Model, term: Term, params: Params, cases: Cases
) -> LayerPass:
    def twice(inputs: Tree) -> Tree:
        return jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), inputs)

    examples = cases._replace(weights=weights_of_examples(cases))
    count = len(examples.weights)
    spoiled = {n: x for n, x in model.others.items() if n not in model.scalings}
    # The model may be written for this number of examples: then any error counts.
    try:
        more = jax.eval_shape(twice, cases.inputs)
        other = layers.read(term.outputs, params, more, spoiled)
        axes = _axes_of_cases(model, other, count, 2 * count)
    except Exception:
        axes = [None] * len(model.uses)
    found = _at_once(model, axes, params, examples)
    # Errors have the weights of the examples through S already. Sums over inputs will be
    # divided by the positions of the only example, which are `count` times those of one.
    rows = count * examples.weights, jnp.broadcast_to(cases.weights, (count,))
    whole = cases.weights, cases.weights
    return found._replace(weights=[rows if apart else whole for apart in found.apart])


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

    weights = [(cases.weights, cases.weights)] * len(model.uses)
    apart = [True] * len(model.uses)
    return LayerPass(jax.vmap(zeros)(nothing), forward, rows, apart, weights)


def _at_once(
    whole: Model, axes: Sequence[int | None], params: Params, cases: Cases
) -> LayerPass:
    def rows_of_cases(number: int, rows: jax.Array) -> jax.Array:
        """Lay out `[…, positions of all cases, …]` as `[cases, …, positions, …]`."""
        axis = axes[number]
        if axis is None:
            return rows[None]
        # `laid_out` has joined the loops and the other axes of the output into positions.
        use, (*blocks, _, last) = whole.uses[number], rows.shape
        lead = use.lead
        place = list(lead).index(len(use.loops) + axis)
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
        if axis is None:
            continue
        zero = added[use.path]
        along = [1] * zero.ndim
        along[len(use.loops) + axis] = -1
        added[use.path] = zero + nothing.reshape(along).astype(zero.dtype)
    apart = [axis is not None for axis in axes]
    weights = [(cases.weights, cases.weights)] * len(axes)
    return LayerPass(added, forward, rows, apart, weights)


def _axes_of_cases(model: Model, whole: Model, few: int, many: int) -> list[int | None]:
    """Return the axis of each use's output that indexes examples; `None` if uncertain.

    `model` was read on `few` examples, `whole` on `many` of them. The axis is certain if
    both have the same uses, except that one axis of the output has length `few` in
    `model` and `many` in `whole`.
    """
    if len(model.uses) != len(whole.uses):
        return [None] * len(model.uses)

    def axis_of(one: Use, other: Use) -> int | None:
        same = one.anywhere() == other.anywhere()
        if not same or one.is_complex or len(one.shape) != len(other.shape):
            return None
        pairs = enumerate(zip(one.shape, other.shape, strict=True))
        longer = [axis for axis, (before, after) in pairs if before != after]
        if len(longer) != 1 or one.added[longer[0]]:
            return None
        (axis,) = longer
        lengths = (one.shape[axis], other.shape[axis])
        return axis if lengths == (few, many) else None

    return [axis_of(*pair) for pair in zip(model.uses, whole.uses, strict=True)]
