"""P or P⁻¹, block by block, and how a state holds the blocks.

A state is made before any model is known: it has room for a diagonal of each parameter,
and for two matrices of each that may be a kernel, with a row for a bias on either side.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Params
from hfjax.preconditioners._layers import Layer
from hfjax.preconditioners._merged_layers import Merged


class Pair(NamedTuple):
    """Two matrices of a layer, or their inverses; unnamed in a state.

    Attributes:
      inputs: Ā, of as many rows as inputs, and one for a bias.
      units: Ḡ.
    """

    inputs: jax.Array
    units: jax.Array


class Blocks(NamedTuple):
    """P, or its inverse, block by block.

    Attributes:
      pairs: of each layer.
      diagonals: of each other parameter, by its number.
      beside: of a layer's parameters, the diagonal of those terms of a sum in which they
        are none; of the inverse nothing, as it counts in the pairs.
    """

    pairs: list[Pair]
    diagonals: dict[int, jax.Array]
    beside: dict[int, jax.Array]


def room_for(params: Params, max_size: int) -> tuple:
    """Return zeros for the blocks of parameters whose use is not known yet.

    Args:
      params: θ.
      max_size: of a kernel's sides, above which it has none but a diagonal.

    Returns:
      For each parameter a diagonal, and for a possible kernel two matrices, with a row
      for a bias on either side.
    """

    def room(leaf: jax.Array) -> tuple[jax.Array, ...]:
        dtype = trees.wide(leaf.dtype)
        diagonal = sharding.zeros_like(leaf.astype(dtype))
        if not may_be_kernel(leaf.shape, max_size):
            return (diagonal,)
        sides = (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        return (diagonal, *(jnp.zeros((n + 1, n + 1), dtype) for n in sides))

    return tuple(room(leaf) for leaf in jax.tree.leaves(params))


def pack(blocks: Blocks, model: Merged, room: tuple) -> tuple:
    """Put blocks into the room that a state has for them."""
    packed = [list(entries) for entries in room]
    for layer, pair in zip(model.layers, blocks.pairs, strict=True):
        for place, matrix in zip(_places(layer), pair, strict=True):
            slot, size = packed[layer.kernel], len(matrix)
            slot[place] = (
                slot[place].at[:size, :size].set(matrix.astype(slot[place].dtype))
            )
    for n, entries in (blocks.diagonals | blocks.beside).items():
        packed[n][0] = entries
    return tuple(tuple(entries) for entries in packed)


def unpack(packed: tuple, model: Merged) -> Blocks:
    """Take blocks out of a state."""

    def pair(layer: Layer) -> Pair:
        sizes = (layer.inputs + (layer.bias is not None), layer.units)
        return Pair(
            *(
                packed[layer.kernel][place][:size, :size]
                for place, size in zip(_places(layer), sizes, strict=True)
            )
        )

    return Blocks(
        [pair(layer) for layer in model.layers],
        {n: packed[n][0] for n in model.others},
        {n: packed[n][0] for n in model.beside},
    )


def _places(layer: Layer) -> tuple[int, int]:
    return (2, 1) if layer.inputs_last else (1, 2)


def may_be_kernel(shape: tuple[int, ...], max_size: int) -> bool:
    """Return whether a parameter may have factors, by its shape."""
    return len(shape) >= 2 and max(math.prod(shape[:-1]), shape[-1]) <= max_size
