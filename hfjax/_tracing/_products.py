"""Sorts the axes of matrix products, convolutions and lookups with a parameter."""

from typing import Any

import jax

from hfjax._tracing._axes import Layout, Piece, reshaped


def _of_dot(equation: Any, side: int, own: Layout) -> tuple[Layout, Layout] | None:
    """Return the layouts of the inputs and of the result of a product."""
    contracted, batched = equation.params["dimension_numbers"]
    other = 1 - side
    taken: list[tuple[Piece, ...]] = [() for _ in equation.invars[other].aval.shape]
    for its in (contracted, batched):
        for axis, its_axis in zip(its[side], its[other], strict=True):
            taken[its_axis] = own[axis]
    # The result has the batch axes first, then the free axes of the left operand, and
    # then those of the right.
    fixed = {*contracted[side], *batched[side]}
    free = [x for axis, x in enumerate(own) if axis not in fixed]
    rank = len(equation.outvars[0].aval.shape)
    batch = [own[axis] for axis in batched[side]]
    others: list[tuple[Piece, ...]] = [()] * (rank - len(batch) - len(free))
    rest = [*free, *others] if side == 0 else [*others, *free]
    return tuple(taken), (*batch, *rest)


def _of_convolution(
    equation: Any, side: int, own: Layout
) -> tuple[Layout, Layout] | None:
    """Return the layouts of the patches and of the result of a convolution.

    The channels of a patch are its channels of the input, and of each its entries.
    """
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if side != 1 or params["batch_group_count"] != 1:
        return None
    shape = equation.invars[1].aval.shape
    units, channels, *spatial = numbers.rhs_spec
    length = shape[units]
    split = reshaped((own[units],), (length,), (groups, length // groups))
    if split is None:
        return None
    rank = len(equation.outvars[0].aval.shape)
    place = numbers.out_spec[1]
    patches = [*split[0], *own[channels]]
    patches += [piece for axis in spatial for piece in own[axis]]

    def layout(pieces: list[Piece]) -> Layout:
        return tuple(tuple(pieces) if axis == place else () for axis in range(rank))

    return layout(patches), layout([*split[0], *split[1]])


def _of_lookup(equation: Any, side: int, own: Layout) -> tuple[Layout, Layout] | None:
    """Return the layouts of the indices and of the result of a lookup of whole rows."""
    numbers = equation.params["dimension_numbers"]
    axis = looked_up(equation)
    if side != 0 or axis is None:
        return None
    added: list[tuple[Piece, ...]] = [() for _ in equation.outvars[0].aval.shape]
    rest = [k for k in range(len(own)) if k not in numbers.collapsed_slice_dims]
    for place, k in zip(numbers.offset_dims, rest, strict=True):
        added[place] = () if k == axis else own[k]
    return tuple(() for _ in equation.invars[1].aval.shape), tuple(added)


def looked_up(equation: Any) -> int | None:
    """Return the axis of which a `gather` takes single entries, whole in all others."""
    params, shape = equation.params, equation.invars[0].aval.shape
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    cut = [k for k, (n, m) in enumerate(zip(sizes, shape, strict=True)) if n != m]
    if len(cut) != 1 or sizes[cut[0]] != 1 or cut[0] not in numbers.start_index_map:
        return None
    # Other axes start at 0 whatever their index is, if it is clipped.
    clips = params["mode"] == jax.lax.GatherScatterMode.CLIP
    batched = numbers.operand_batching_dims
    return (
        cut[0] if not batched and (clips or len(numbers.start_index_map) == 1) else None
    )


SORTED = {
    "dot_general": _of_dot,
    "conv_general_dilated": _of_convolution,
    "gather": _of_lookup,
}
"""The layouts of inputs and result of a product, by the primitive that computes it.

Each is `(equation, side, own) -> (taken, added)`, where the operand `side` is a parameter
with the layout `own`, or `None` if it is not a layer."""
