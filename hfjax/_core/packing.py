"""Vectors like the parameters, stored in a few arrays however many leaves there are.

An update adds, scales and multiplies such vectors some hundred times. Each operation is
one kernel per leaf, to be compiled, launched, and read from and written to memory. So
leaves of up to 2¹⁶ numbers are concatenated with others of their dtype. Larger leaves
stay separate: each keeps a device busy by itself.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Tree

SMALL = 2**16
"""Largest leaf, in numbers, that is concatenated with others."""


class Packing(NamedTuple):
    """How trees like the parameters are turned into a tuple of arrays, and back."""

    pack: Callable[[Tree], tuple[jax.Array, ...]]
    unpack: Callable[[tuple[jax.Array, ...]], Tree]


def packing(like: Tree) -> Packing:
    """Return the packing of trees with the structure, shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    groups: dict[Any, list[int]] = {}
    for n, leaf in enumerate(leaves):
        groups.setdefault(_kind(n, leaf), []).append(n)
    shapes = [leaf.shape for leaf in leaves]
    # What may be sharded keeps its shape: concatenated, it would be gathered on every
    # device. All else is flattened, since XLA makes a transposed copy of stored iterates
    # of a matrix in order to multiply with them.
    whole = {n for n, leaf in enumerate(leaves) if sharding.may_be_sharded(leaf)}

    def pack(tree: Tree) -> tuple[jax.Array, ...]:
        given = structure.flatten_up_to(tree)
        given = [x if n in whole else x.reshape(-1) for n, x in enumerate(given)]
        parts = [[given[n] for n in group] for group in groups.values()]
        return tuple(x[0] if len(x) == 1 else jnp.concatenate(x) for x in parts)

    def unpack(packed: tuple[jax.Array, ...]) -> Tree:
        found: dict[int, jax.Array] = {}
        for group, array in zip(groups.values(), packed, strict=True):
            parts = [array]
            if len(group) > 1:
                # In reverse mode a split concatenates cotangents; slices would each pad
                # theirs with zeros and add them all up.
                parts = jax.lax.split(array, [math.prod(shapes[n]) for n in group])
            for n, part in zip(group, parts, strict=True):
                found[n] = part.reshape(shapes[n])
        return structure.unflatten([found[n] for n in range(len(shapes))])

    return Packing(pack, unpack)


def _kind(number: int, leaf: jax.Array) -> Any:
    """Return a value that is equal for leaves that may be concatenated."""
    if leaf.size > SMALL or sharding.may_be_sharded(leaf):
        return number
    # Inside `shard_map`, arrays that vary over different axes have different types.
    return leaf.dtype, sharding.varying(leaf)
