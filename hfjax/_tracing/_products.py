"""Matrix products, convolutions and lookups with a parameter, and how their axes are sorted.

Products and sums of data and a parameter, entry by entry, count as such, too.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._tracing._axes import (
    Kinds,
    Layout,
    Piece,
    length,
    pieces_of,
    refined,
    reshaped,
)
from hfjax._tracing._made import Part, Path, Place, Scale


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
    count = shape[units]
    split = reshaped((own[units],), (count,), (groups, count // groups))
    if split is None or any(length(own[n]) != shape[n] for n in (channels, *spatial)):
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
    if (
        side != 0
        or axis is None
        or length(own[axis]) != equation.invars[0].aval.shape[axis]
    ):
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


_SORTED = {
    "dot_general": _of_dot,
    "conv_general_dilated": _of_convolution,
    "gather": _of_lookup,
}
"""The layouts of inputs and result of a product, by the primitive that computes it.

Each is `(equation, side, own) -> (taken, added)`, where the operand `side` is a parameter
with the layout `own`, or `None` if it is not a layer."""

PRODUCTS = frozenset(_SORTED)
"""The primitives that compute products."""


class Use(NamedTuple):
    """One product of a layer's inputs with its kernel.

    Attributes:
      how: the primitive that computes it. Of `gather`, which looks up rows as a product
        with rows of the identity would do, what is taken are indices, -1 for one out of
        range. Of `mul` and `add`, of data and a parameter, each entry has its own.
      path: where the equation is.
      kernel: the number of the parameter.
      operand: which of the two operands is the input.
      kinds: what each piece of the kernel's axes is here.
      taken: the layout of what `Run` takes out of the program, without loops.
      added: the layout of the result.
      looped: for each loop around the equation, the pieces that it runs over.
      shape: the shape of the result.
      loops: the lengths of the loops, from the outermost.
      dtype: the dtype of the result.
      is_in_branch: whether the equation is in a branch of a `cond`.
      factor: a number by which the kernel is multiplied before.
      scales: values by which it is multiplied before.
    """

    how: str
    path: Path
    kernel: int
    operand: int
    kinds: Kinds
    taken: Layout
    added: Layout
    looped: Layout
    shape: tuple[int, ...]
    loops: tuple[int, ...]
    dtype: Any
    is_in_branch: bool = False
    factor: complex = 1
    scales: tuple[Scale, ...] = ()

    @property
    def is_partial(self) -> bool:
        """Whether positions may have no part in it, or only in some of its blocks.

        So it is in a branch, and with experts. All positions have a part in each layer of a
        stack, and in the blocks of a complex product, which are Fourier modes.
        """
        blocks = set(self.kinds.blocks) - pieces_of(self.looped)
        return self.is_in_branch or bool(blocks and not self.is_complex)

    @property
    def is_lookup(self) -> bool:
        """Whether rows of the kernel are looked up."""
        return self.how == "gather"

    @property
    def lead(self) -> dict[int, int]:
        """The lengths of the axes of loops and result that are positions, by number."""
        lengths = enumerate((*self.loops, *self.shape))
        layout = (*self.looped, *self.added)
        return {axis: length for axis, length in lengths if not layout[axis]}

    @property
    def positions(self) -> int:
        """How often an example uses each block of the kernel here, in time and space."""
        # A complex product uses a real kernel twice, for real and for imaginary inputs.
        return (2 if self.is_complex else 1) * math.prod(self.lead.values())

    @property
    def is_complex(self) -> bool:
        """Whether the product is complex."""
        return jnp.issubdtype(self.dtype, jnp.complexfloating)

    def anywhere(self) -> "Use":
        """Return the same use without where it is, and of how many examples."""
        scales = tuple(scale._replace(path=()) for scale in self.scales)
        return self._replace(path=(), shape=(), scales=scales)

    def is_by_unit(self, scale: Scale) -> bool:
        """Whether a scale of the kernel is one of errors, not one of inputs."""
        units = set(self.kinds.units)
        return self.is_lookup or not units.isdisjoint(pieces_of(scale.layout))


def of_product(equation: Any, side: int, part: Part, place: Place) -> Use | None:
    """Return the use of a parameter in the operand `side`, if it is one of a layer."""
    name, shape = equation.primitive.name, equation.invars[side].aval.shape
    # An axis of another kind would repeat the kernel.
    if any(n > 1 and not own for n, own in zip(shape, part.layout, strict=True)):
        return None
    is_lookup = name == "gather"
    layouts = _SORTED[name](equation, side, part.layout)
    # A stack of embeddings would need a stack of diagonals.
    if layouts is None or (is_lookup and any(part.looped)):
        return None
    taken, added = layouts
    layouts = (part.looped, part.layout, taken, added)
    looped, own, before, after = map(pieces_of, layouts)
    blocks = looped | (before & after)
    # The indices of a lookup have no axis for its inputs.
    inputs = (own - after if is_lookup else before) - blocks
    units = after - blocks
    scales = []
    for scale in part.scales:
        layout = refined(scale.layout, blocks | inputs | units)
        varied = pieces_of(layout or ())
        by_input, by_unit = bool(varied & inputs), bool(varied & units) or is_lookup
        if layout is None or (by_input and by_unit):
            return None
        scales.append(scale._replace(layout=layout))
    kinds = Kinds(*(tuple(sorted(pieces)) for pieces in (blocks, inputs, units)))
    use = _use(equation, side, part, place, kinds, taken, added)
    return use._replace(factor=part.factor, scales=tuple(scales))


def of_scaling(equation: Any, side: int, part: Part, place: Place) -> Use | None:
    """Return the use of a parameter that is multiplied with or added to data."""
    out = equation.outvars[0].aval
    if not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    layout = part.layout or ((),) * len(out.shape)  # Of a scalar.
    kinds = Kinds((), (), tuple(sorted(pieces_of((*part.looped, *layout)))))
    return _use(equation, side, part, place, kinds, layout, layout)


def _use(
    equation: Any,
    side: int,
    part: Part,
    place: Place,
    kinds: Kinds,
    taken: Layout,
    added: Layout,
) -> Use:
    out = equation.outvars[0].aval
    return Use(
        how=equation.primitive.name,
        path=place.path,
        kernel=part.number,
        operand=1 - side,
        kinds=kinds,
        taken=taken,
        added=added,
        looped=part.looped,
        shape=tuple(out.shape),
        loops=place.loops,
        dtype=out.dtype,
        is_in_branch=place.is_in_branch,
    )
