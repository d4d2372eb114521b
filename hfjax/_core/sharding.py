"""What must be said of arrays whose layout over devices is part of their type.

On a mesh of `Explicit` axes (what `jax.make_mesh` makes), and inside `shard_map`, JAX
refuses what it would otherwise find out by itself: sums over a sharded axis in a matrix
product, loops that start from zeros of another layout, gradients with respect to what
is the same on all devices. Everywhere else these functions change nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hfjax._core.types import Tree


def may_be_sharded(x: jax.Array) -> bool:
    """Return whether an array lies over devices, as far as its type tells.

    Over an `Explicit` axis the type says how. Of an `Auto` axis it says only that there is
    one: the compiler decides.
    """
    mesh = jax.typeof(x).sharding.mesh
    automatic = [
        mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    ]
    return _typed(x) is not None or math.prod(automatic) > 1


def varying(x: jax.Array) -> frozenset[Any]:
    """Return the mapped axes along which `shard_map` knows an array to differ."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(tree: Tree, names: tuple[Any, ...]) -> Tree:
    """Mark a tree, the same on all devices of these axes, as each device's own.

    Args:
      tree: of arrays.
      names: of mapped axes. Under `vmap(axis_name=…)` they are none of a mesh, and
        there is nothing to mark.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def leaf(x: jax.Array) -> jax.Array:
        known = varying(x)
        missing = tuple(n for n in names if n in manual and n not in known)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)


def zeros_like(tree: Tree) -> Tree:
    """Return zeros, laid out as a tree is.

    `jnp.zeros_like` is compiled apart and, in jax 0.12, forgets the layout at times.
    """
    return jax.tree.map(
        lambda x: jnp.where(jnp.zeros((), bool), x, jnp.zeros((), x.dtype)), tree
    )


def zeros(shapes: Tree) -> Tree:
    """Return zeros, laid out as `jax.eval_shape` says.

    Args:
      shapes: what that returned.
    """
    return jax.tree.map(
        lambda shape: _laid_out(jnp.zeros(shape.shape, shape.dtype), shape.sharding),
        shapes,
    )


def like(tree: Tree, other: Tree) -> Tree:
    """Return `tree`, laid out as another tree of its shapes."""
    return jax.tree.map(lambda x, y: _laid_out(x, jax.typeof(y).sharding), tree, other)


def first_case(tree: Tree) -> Tree:
    """Return one case of a tree, or its shapes, for `jax.eval_shape`.

    Of an axis that is sharded by type no row can be taken; else a slice keeps what
    `shard_map` has in the type.
    """

    def leaf(x: jax.Array) -> jax.Array | jax.ShapeDtypeStruct:
        if _typed(x) is None:
            return x[:1]
        return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

    return jax.tree.map(leaf, tree)


def shards_of_cases(tree: Tree) -> int:
    """Return over how many devices the case axis lies, by type; else 1."""
    counts = [1]
    for leaf in jax.tree.leaves(tree):
        sharding = _typed(leaf)
        if sharding is not None:
            names = _axes(sharding.spec[:1])
            counts.append(math.prod(sharding.mesh.shape[name] for name in names))
    return max(counts)


def alike(data: Tree) -> Tree:
    """Lay all leaves' case axes as one of them has it, for `jax.vmap` over the cases."""
    typed = [s for leaf in jax.tree.leaves(data) if (s := _typed(leaf)) and s.spec[0]]
    if not typed:
        return data

    def leaf(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(typed[0].spec[0], *jax.typeof(x).sharding.spec[1:])
        return jax.sharding.reshard(x, NamedSharding(typed[0].mesh, spec))

    return jax.tree.map(leaf, data)


def gathered(tree: Tree, data: Tree) -> Tree:
    """Gather a tree over the axes that the cases of `data` lie over, by type.

    What is computed for each case, with the cases sharded, can be of no parameters
    sharded over the same axes.
    """
    specs = [s.spec[:1] for leaf in jax.tree.leaves(data) if (s := _typed(leaf))]
    taken = {name for spec in specs for name in _axes(spec)}

    def leaf(x: jax.Array) -> jax.Array:
        sharding = _typed(x)
        if sharding is None or not taken & set(_axes(sharding.spec)):
            return x
        parts = [
            tuple(name for name in _axes((part,)) if name not in taken) or None
            for part in sharding.spec
        ]
        return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*parts)))

    return jax.tree.map(leaf, tree)


def lies_elsewhere(tree: Tree, data: Tree) -> bool:
    """Return whether a tree lies, by type, over axes that the cases of `data` do not."""
    return any(_typed(leaf) for leaf in jax.tree.leaves(gathered(tree, data)))


def replicated(x: jax.Array) -> jax.Array:
    """Lay out an array whole on every device, where its type says that it is not."""
    sharding = _typed(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec()))


def contracted(
    left: jax.Array,
    right: jax.Array,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Sum products over pairs of axes, sharded or not; what is left keeps its layout.

    Args:
      left: first factor.
      right: second factor.
      axes: those of each that are summed over, as in `jax.lax.dot_general`.
      precision: as there.
    """
    kept, mesh = [], None
    for x, summed in zip((left, right), axes, strict=True):
        sharding = _typed(x)
        spec = [None] * x.ndim if sharding is None else sharding.spec
        kept += [part for axis, part in enumerate(spec) if axis not in summed]
        mesh = mesh if sharding is None else sharding.mesh
    out = None if mesh is None else NamedSharding(mesh, PartitionSpec(*kept))
    return jax.lax.dot_general(
        left, right, (axes, ((), ())), precision=precision, out_sharding=out
    )


def _typed(x: Any) -> Any:
    """Return the sharding that is part of an array's type, if it says anything."""
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None


def _laid_out(x: jax.Array, sharding: Any) -> jax.Array:
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, sharding)


def _axes(spec: Any) -> list[Any]:
    """Return the mesh axes that a part of a spec names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [name for part in parts for name in part if name is not None]
