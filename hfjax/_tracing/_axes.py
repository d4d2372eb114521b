"""The axes of a kernel: which are inputs, which units, and which number blocks.

A program may reshape and transpose a kernel before its product, so an axis of the
product is one or more pieces of the kernel's axes. Each product sorts these pieces: those
that it sums over are *inputs*, those that both operands and the result have are *blocks*
(a kernel for each expert, head or layer of a stack), and the others are *units*.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

Shape: TypeAlias = tuple[int, ...]


class Piece(NamedTuple):
    """A part of an axis of a parameter; pieces are sorted as they lie in memory.

    Attributes:
      axis: the axis.
      before: how many steps of it its pieces before this one have.
      size: how many steps this one has.
      start: the entry of an array's axis at which its pieces start, if this is the first
        of them. The axis is longer than they are where arrays were concatenated along it.
    """

    axis: int
    before: int
    size: int
    start: int = 0


Layout: TypeAlias = tuple[tuple[Piece, ...], ...]
"""For each axis of an array its pieces, outermost first; none for an axis that is not
the parameter's, or that has length one."""


def length(pieces: Iterable[Piece]) -> int:
    """Return how many entries of an axis some pieces have together."""
    return math.prod(piece.size for piece in pieces)


def pieces_of(layout: Layout) -> set[Piece]:
    """Return the pieces in a layout, wherever in an array they start."""
    pieces = (piece for own in layout for piece in own)
    return {piece._replace(start=0) for piece in pieces if piece.size > 1}


def placed(own: tuple[Piece, ...], start: int) -> tuple[Piece, ...]:
    """Return the pieces of an axis that is concatenated with others, after `start`."""
    first, *rest = own or (Piece(0, 1, 1),)
    return (first._replace(start=first.start + start), *rest)


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
            split.append(length(pieces))
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
    # An axis of another kind, or one that was concatenated, must keep its length.
    left: list[Piece | tuple[int, tuple[Piece, ...]]] = []
    for own, count in zip(layout, before, strict=True):
        if count != 1:
            left += own if length(own) == count else [(count, own)]
    left.reverse()
    found: list[tuple[Piece, ...]] = []
    for count in after:
        pieces: list[Piece] = []
        missing = count
        while missing != 1:
            first = left.pop() if left else (0, ())
            if not isinstance(first, Piece):
                if pieces or first[0] != count:
                    return None
                pieces += first[1]
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
    for pieces, others, count in zip(layout, other, shape, strict=True):
        if not others and not pieces:
            continue
        total = length(others)
        if not others or not pieces or total != length(pieces):
            return None
        if total != count and others[0].start != pieces[0].start:
            return None
        split = reshaped((others,), (total,), tuple(piece.size for piece in pieces))
        if split is None or any(len(parts) > 1 for parts in split):
            return None
        for piece, parts in zip(pieces, split, strict=True):
            for part in parts:
                found[piece._replace(start=0)] = part._replace(start=0)
    return found


def refined(layout: Layout, pieces: Collection[Piece]) -> Layout | None:
    """Return the layout in terms of smaller pieces; `None` if some are not smaller."""
    found: list[tuple[Piece, ...]] = []
    for own in layout:
        its: list[Piece] = []
        for piece in own:
            end = piece.before * piece.size
            parts = [
                x
                for x in sorted(pieces)
                if x.axis == piece.axis and piece.before <= x.before < end
            ]
            if length(parts) != piece.size:
                return None
            its += parts
        found.append(placed(tuple(its), own[0].start) if own else ())
    return tuple(found)


def _split(x: jax.Array, layout: Layout) -> tuple[jax.Array, dict[Piece, int]]:
    """Give each piece an axis of its own; also return the number of this axis."""
    shape: list[int] = []
    at: dict[Piece, int] = {}
    for axis, own in enumerate(layout):
        total = length(own)
        if own and total != x.shape[axis]:
            x = jax.lax.slice_in_dim(x, own[0].start, own[0].start + total, axis=axis)
        its = [piece._replace(start=0) for piece in own if piece.size > 1]
        at |= {piece: len(shape) + n for n, piece in enumerate(its)}
        shape += [piece.size for piece in its] or [x.shape[axis]]
    return x.reshape(shape), at


def laid_out(x: jax.Array, layout: Layout, kinds: Kinds) -> jax.Array:
    """Bring an array into the order `[positions, …]`, or `[blocks, positions, …]`.

    Last come its inputs or its units, whichever it has, as they lie in the kernel.
    """
    x, at = _split(x, layout)
    blocks = [at[piece] for piece in kinds.blocks]
    last = [at[piece] for piece in sorted(at.keys() - set(kinds.blocks))]
    rest = [axis for axis in range(x.ndim) if axis not in at.values()]
    sizes = [math.prod(x.shape[axis] for axis in axes) for axes in (blocks, rest, last)]
    x = x.transpose(*blocks, *rest, *last)
    return x.reshape(sizes if kinds.blocks else sizes[1:])


def spread(
    x: jax.Array, layout: Layout, kinds: Kinds, side: Sequence[Piece]
) -> jax.Array:
    """Repeat an array that varies along pieces of blocks and of one side only.

    It gets the shape `[1, side]` or `[blocks, 1, side]`. Along an axis without pieces, the
    first entry counts for all.
    """
    x, at = _split(x, layout)
    x = x[tuple(slice(None) if n in at.values() else slice(1) for n in range(x.ndim))]
    wanted = (*kinds.blocks, *side)
    known = [at[piece] for piece in wanted if piece in at]
    x = x.transpose(*(n for n in range(x.ndim) if n not in known), *known)
    x = x.reshape([piece.size if piece in at else 1 for piece in wanted])
    x = jnp.broadcast_to(x, [piece.size for piece in wanted])
    shape = (length(kinds.blocks), 1, length(side))
    return x.reshape(shape if kinds.blocks else shape[1:])
