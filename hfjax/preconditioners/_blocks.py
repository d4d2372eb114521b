"""The blocks of P or P⁻¹, and how the optimizer state stores them.

The state is created before any model is known. So it has space for a diagonal of every
parameter, and for two matrices of every parameter that may be a kernel. Both have a row
more than that side of the kernel, since a bias may belong to either side.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Params
from hfjax._tracing.layers import Layer
from hfjax.preconditioners._merged_layers import Merged


class Pair(NamedTuple):
    """Two matrices of a layer, or their inverses.

    Attributes:
      inputs: Ā, a row for each input, and one more if there is a bias.
      units: Ḡ, a row for each unit.
    """

    inputs: jax.Array
    units: jax.Array


class Blocks(NamedTuple):
    """The blocks of P or of its inverse.

    Attributes:
      pairs: the matrices of each layer.
      diagonals: the diagonal for each other parameter, by its number.
      beside: for parameters of a layer that some terms of a sum use in another way, the
        diagonal of these terms' G. Empty for the inverse, whose `pairs` include it.
    """

    pairs: list[Pair]
    diagonals: dict[int, jax.Array]
    beside: dict[int, jax.Array]


def zeros_for(params: Params, max_size: int) -> tuple:
    """Return zeros for the blocks of each parameter, whose use is not known yet."""

    def of_leaf(leaf: jax.Array) -> tuple[jax.Array, ...]:
        dtype = trees.wide(leaf.dtype)
        diagonal = sharding.zeros_like(leaf.astype(dtype))
        if not may_be_kernel(leaf.shape, max_size):
            return (diagonal,)
        sides = (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        return (diagonal, *(jnp.zeros((n + 1, n + 1), dtype) for n in sides))

    return tuple(of_leaf(leaf) for leaf in jax.tree.leaves(params))


def pack(blocks: Blocks, model: Merged, space: tuple) -> tuple:
    """Write blocks into the space that a state has for them."""
    packed = [list(entries) for entries in space]
    for layer, pair in zip(model.layers, blocks.pairs, strict=True):
        own = packed[layer.kernel]
        for place, matrix in zip(_places(layer), pair, strict=True):
            # Any row for a bias that does not exist stays 0.
            slot, size = own[place], len(matrix)
            own[place] = slot.at[:size, :size].set(matrix.astype(slot.dtype))
    for n, entries in (blocks.diagonals | blocks.beside).items():
        packed[n][0] = entries
    return tuple(tuple(entries) for entries in packed)


def unpack(packed: tuple, model: Merged) -> Blocks:
    """Read the blocks from a state."""

    def pair(layer: Layer) -> Pair:
        inputs, units = (packed[layer.kernel][place] for place in _places(layer))
        n, m = layer.rows, layer.units
        return Pair(inputs[:n, :n], units[:m, :m])

    return Blocks(
        [pair(layer) for layer in model.layers],
        {n: packed[n][0] for n in model.others},
        {n: packed[n][0] for n in model.beside},
    )


def _places(layer: Layer) -> tuple[int, int]:
    # In a state, 0 is the diagonal, 1 the matrix of the kernel's leading axes and 2 that
    # of its last axis. The inputs are usually the leading ones.
    return (2, 1) if layer.inputs_last else (1, 2)


def may_be_kernel(shape: tuple[int, ...], max_size: int) -> bool:
    """Return whether the shape of a parameter allows Kronecker factors."""
    return len(shape) >= 2 and max(math.prod(shape[:-1]), shape[-1]) <= max_size
