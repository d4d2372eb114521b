"""The blocks of P or P⁻¹, and how the optimizer state stores them.

The state is created before any model is known. So it has space for a diagonal of every
parameter, and for the matrices of every parameter that may be a kernel: as many numbers
as the largest of the usual ways to sort its axes into blocks, inputs and units needs.
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
    """Two matrices of a layer, or their inverses, or a stack of each for its blocks.

    Attributes:
      inputs: Ā, a row for each input, and one more if there is a bias; of an embedding,
        the diagonal of Ā.
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


def nearest_product(pair: Pair, other: Pair) -> Pair:
    """Return one pair for the sum of two Kronecker products, with its trace.

    Each matrix is divided by its mean eigenvalue; those of the units, and those of the
    inputs, are added with the weights that the products have in the sum.
    """
    if pair.units.ndim > 2:
        return jax.vmap(nearest_product)(pair, other)

    def mean(matrix: jax.Array) -> jax.Array:
        return jnp.mean(matrix if matrix.ndim == 1 else jnp.diagonal(matrix))

    def divided(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)

    both, means = (pair, other), jax.tree.map(mean, (pair, other))
    weights = [its.inputs * its.units for its in means]
    shares = [divided(weight, weights[0] + weights[1]) for weight in weights]

    def added(place: int, factors: list[jax.Array]) -> jax.Array:
        first, second = (
            factor * divided(its[place], own[place])
            for its, own, factor in zip(both, means, factors, strict=True)
        )
        return first + second

    return Pair(added(0, shares), added(1, weights))


def zeros_for(params: Params, max_size: int) -> tuple:
    """Return zeros for the blocks of each parameter, whose use is not known yet."""

    def of_leaf(leaf: jax.Array) -> tuple[jax.Array, ...]:
        dtype = trees.wide(leaf.dtype)
        diagonal = sharding.zeros_like(leaf.astype(dtype))
        space = capacity(leaf.shape, max_size)
        return (diagonal, jnp.zeros(space, dtype)) if space else (diagonal,)

    return tuple(of_leaf(leaf) for leaf in jax.tree.leaves(params))


def pack(blocks: Blocks, model: Merged, space: tuple) -> tuple:
    """Write blocks into the space that a state has for them."""
    packed = [list(entries) for entries in space]
    for layer, pair in zip(model.layers, blocks.pairs, strict=True):
        slot = packed[layer.kernel][1]
        numbers = jnp.concatenate([x.astype(slot.dtype).ravel() for x in pair])
        packed[layer.kernel][1] = slot.at[: numbers.size].set(numbers)
    for n, entries in (blocks.diagonals | blocks.beside).items():
        packed[n][0] = entries
    return tuple(tuple(entries) for entries in packed)


def unpack(packed: tuple, model: Merged) -> Blocks:
    """Read the blocks from a state."""

    def pair(layer: Layer) -> Pair:
        blocks = (layer.blocks,) if layer.sides.blocks else ()
        of_inputs = (layer.rows,) * (1 if layer.is_lookup else 2)
        shapes = [(*blocks, *of_inputs), (*blocks, layer.units, layer.units)]
        sizes = list(map(math.prod, shapes))
        own = packed[layer.kernel][1][: sum(sizes)]
        parts = own[: sizes[0]], own[sizes[0] :]
        return Pair(*(x.reshape(n) for x, n in zip(parts, shapes, strict=True)))

    return Blocks(
        [pair(layer) for layer in model.layers],
        {n: packed[n][0] for n in model.others},
        {n: packed[n][0] for n in model.beside},
    )


def needed(layer: Layer) -> int:
    """Return how many numbers the matrices of a layer have, with a bias or without."""
    of_inputs = layer.inputs if layer.is_lookup else (layer.inputs + 1) ** 2
    return layer.blocks * (of_inputs + layer.units**2)


def capacity(shape: tuple[int, ...], max_size: int) -> int:
    """Return how many numbers a state has for a parameter's matrices; 0 for no kernel."""
    if len(shape) < 2:
        return 0
    # The last or the first axis alone on one side, in each of which a bias may be; or the
    # first for blocks, and the same of the rest.
    # A diagonal for the first, that of an embedding, takes less than these.
    found = [0]
    if max_size >= math.prod(shape[1:]):
        found.append(shape[0] + math.prod(shape[1:]) ** 2)
    stacks = [(shape[0], shape[1:])] if len(shape) > 2 else []
    for blocks, rest in ((1, shape), *stacks):
        for alone, others in ((rest[-1], rest[:-1]), (rest[0], rest[1:])):
            sides = (alone, math.prod(others))
            if max(sides) <= max_size and 0 not in shape:
                found.append(blocks * sum((n + 1) ** 2 for n in sides))
    return max(found)
