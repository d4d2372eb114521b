"""Vectors in a few arrays, however many leaves the parameters have.

An update adds, scales and multiplies vectors like the parameters some hundred times, and
each of these is a kernel for each leaf: to compile, to launch, to read and to write. So
leaves of up to 2¹⁶ numbers lie in one array of their dtype. Larger ones stay as they
are, since they keep a device busy by themselves; and so does what may lie over several
devices: laid end to end it would be gathered on each of them. What lies on one device has one
axis: of the kept iterates of a matrix XLA makes a transposed copy, to multiply with it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Tree

SMALL = 2**16
"""Numbers that a leaf may have to be laid beside others."""


class Packing(NamedTuple):
    """How trees like the parameters lie in a few arrays.

    Attributes:
      pack: a tree ↦ a tuple of arrays.
      unpack: the reverse.
    """

    pack: Callable[[Tree], tuple[jax.Array, ...]]
    unpack: Callable[[tuple[jax.Array, ...]], Tree]


def packing(like: Tree) -> Packing:
    """Say how trees of the structure, shapes and types of `like` are packed."""
    leaves, structure = jax.tree.flatten(like)
    groups: dict[Any, list[int]] = {}
    for n, leaf in enumerate(leaves):
        groups.setdefault(_kind(n, leaf), []).append(n)
    shapes = [leaf.shape for leaf in leaves]
    whole = {n for n, leaf in enumerate(leaves) if sharding.may_be_sharded(leaf)}

    def pack(tree: Tree) -> tuple[jax.Array, ...]:
        given = [
            leaf if n in whole else leaf.reshape(-1)
            for n, leaf in enumerate(structure.flatten_up_to(tree))
        ]
        return tuple(
            given[group[0]]
            if len(group) == 1
            else jnp.concatenate([given[n] for n in group])
            for group in groups.values()
        )

    def unpack(packed: tuple[jax.Array, ...]) -> Tree:
        found: dict[int, jax.Array] = {}
        for group, array in zip(groups.values(), packed, strict=True):
            parts = [array]
            if len(group) > 1:
                # The transpose of a split lays end to end; that of a slice adds zeros.
                parts = jax.lax.split(array, [math.prod(shapes[n]) for n in group])
            found |= {
                n: part.reshape(shapes[n]) for n, part in zip(group, parts, strict=True)
            }
        return structure.unflatten([found[n] for n in range(len(shapes))])

    return Packing(pack, unpack)


def _kind(number: int, leaf: jax.Array) -> Any:
    """Return what leaves have in common that are laid beside each other."""
    if leaf.size > SMALL or sharding.may_be_sharded(leaf):
        return number
    return leaf.dtype, sharding.varying(leaf)
