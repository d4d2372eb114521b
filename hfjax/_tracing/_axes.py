"""The axes of a kernel: which are inputs, which units, and which number blocks.

A program may reshape and transpose a kernel before its product, so an axis of the
product is one or more pieces of the kernel's axes. Each product sorts these pieces: those
that it sums over are *inputs*, those that both operands and the result have are *blocks*
(a kernel for each expert, head or layer of a stack), and the others are *units*.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]


class Piece(NamedTuple):
    """A part of an axis of a parameter; pieces are sorted as they lie in memory.

    Attributes:
      axis: the axis.
      before: how many steps of it its pieces before this one have.
      size: how many steps this one has.
    """

    axis: int
    before: int
    size: int


Layout: TypeAlias = tuple[tuple[Piece, ...], ...]
"""For each axis of an array its pieces, outermost first; none for an axis that is not
the parameter's, or that has length one."""


class Sides(NamedTuple):
    """A kernel as matrices, one for each block.

    Attributes:
      split: the shape of the kernel when its neighbouring axes of one kind are joined.
      blocks: the axes of this shape that number blocks.
      inputs: those that index inputs.
      units: those that index units.
    """

    split: Shape
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    units: tuple[int, ...]

    def length(self, axes: Iterable[int]) -> int:
        """Return how many entries some of the axes have together."""
        return math.prod(self.split[axis] for axis in axes)

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """Return a kernel as `[inputs, units]`, or as `[blocks, inputs, units]`."""
        order = (*self.blocks, *self.inputs, *self.units)
        return kernel.reshape(self.split).transpose(order).reshape(self._shape)

    def kernel(self, matrices: jax.Array, shape: Shape) -> jax.Array:
        """Return the kernel that `matrices` come from, in its shape."""
        order = (*self.blocks, *self.inputs, *self.units)
        back = sorted(range(len(order)), key=order.__getitem__)
        sizes = [self.split[axis] for axis in order]
        return matrices.reshape(sizes).transpose(back).reshape(shape)

    @property
    def _shape(self) -> Shape:
        sizes = tuple(map(self.length, (self.blocks, self.inputs, self.units)))
        return sizes if self.blocks else sizes[1:]


class Kinds(NamedTuple):
    """What a product does with the pieces of its kernel; the others are units.

    Attributes:
      blocks: the pieces that number blocks, as they lie in memory.
      inputs: those that are summed over.
      units: those that index units.
    """

    blocks: tuple[Piece, ...]
    inputs: tuple[Piece, ...]
    units: tuple[Piece, ...]

    def sides(self) -> Sides:
        """Join neighbouring pieces of one kind."""
        kind_of = {piece: kind for kind, pieces in enumerate(self) for piece in pieces}
        split: list[int] = []
        sorted_: tuple[list[int], ...] = ([], [], [])
        runs = itertools.groupby(sorted(kind_of), key=kind_of.__getitem__)
        for axis, (kind, pieces) in enumerate(runs):
            split.append(math.prod(piece.size for piece in pieces))
            sorted_[kind].append(axis)
        return Sides(tuple(split), *map(tuple, sorted_))


def whole(shape: Shape) -> Layout:
    """Return the layout of a parameter itself."""
    axes = enumerate(shape)
    return tuple((Piece(axis, 1, n),) if n != 1 else () for axis, n in axes)


def reshaped(layout: Layout, before: Shape, after: Shape) -> Layout | None:
    """Return the layout after a reshape; `None` if it mixes axes of other kinds."""
    if 0 in (*before, *after):
        return None
    left: list[Piece | int] = []  # A number is the length of an axis of another kind.
    for own, length in zip(layout, before, strict=True):
        left += own or ([length] if length != 1 else [])
    left.reverse()
    found: list[tuple[Piece, ...]] = []
    for length in after:
        pieces: list[Piece] = []
        missing = length
        while missing != 1:
            first = left.pop() if left else 0
            if isinstance(first, int):
                if pieces or first != length:
                    return None
                break
            if missing % first.size:
                if first.size % missing:
                    return None
                rest = first.size // missing
                left.append(Piece(first.axis, first.before * missing, rest))
                first = first._replace(size=missing)
            pieces.append(first)
            missing //= first.size
        found.append(tuple(pieces))
    return tuple(found)


def broadcast(
    layout: Layout, before: Shape, after: Shape, places: Sequence[int]
) -> Layout | None:
    """Return the layout with axes of other kinds; `None` if an entry is repeated."""
    if tuple(before) != tuple(after[place] for place in places):
        return None
    found: list[tuple[Piece, ...]] = [() for _ in after]
    for pieces, place in zip(layout, places, strict=True):
        found[place] = pieces
    return tuple(found)


def met(layout: Layout, other: Layout, shape: Shape) -> dict[Piece, Piece] | None:
    """Return which pieces of `other` meet those of `layout` in a sum of two arrays.

    `shape` is that of the arrays, of which the second may be broadcast along axes of other
    kinds. `None` if they do not meet one to one.
    """
    found: dict[Piece, Piece] = {}
    for pieces, others, length in zip(layout, other, shape, strict=True):
        if not others and not pieces:
            continue
        total = math.prod(piece.size for piece in others)
        split = reshaped((others,), (total,), tuple(piece.size for piece in pieces))
        if total != length or not pieces or split is None:
            return None
        if any(len(parts) != 1 for parts in split):
            return None
        found |= {piece: part for piece, (part,) in zip(pieces, split, strict=True)}
    return found


def laid_out(x: jax.Array, layout: Layout, kinds: Kinds) -> jax.Array:
    """Bring an array into the order `[positions, …]`, or `[blocks, positions, …]`.

    Last come its inputs or its units, whichever it has, as they lie in the kernel.
    """
    shape: list[int] = []
    at: dict[Piece, int] = {}
    rest = []
    for axis, pieces in enumerate(layout):
        if not pieces:
            rest.append(len(shape))
            shape.append(x.shape[axis])
        for piece in pieces:
            at[piece] = len(shape)
            shape.append(piece.size)
    blocks = [at[piece] for piece in kinds.blocks]
    last = [at[piece] for piece in sorted(at.keys() - set(kinds.blocks))]
    sizes = [math.prod(shape[axis] for axis in axes) for axes in (blocks, rest, last)]
    x = x.reshape(shape).transpose(*blocks, *rest, *last)
    return x.reshape(sizes if kinds.blocks else sizes[1:])
