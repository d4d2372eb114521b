"""Arrays whose layout over devices is part of their type.

On a mesh with `Explicit` axes (the default of `jax.make_mesh`) and inside `shard_map`,
JAX refuses what it would otherwise work out by itself: a matrix product that sums over a
sharded axis, a loop that starts from zeros of another layout, a gradient with respect to
replicated values. Everywhere else these functions change nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hfjax._core.types import Tree


def may_be_sharded(x: jax.Array) -> bool:
    """Return whether an array may lie over several devices, as far as its type tells."""
    return _typed(x) is not None or automatic(x) > 1


def automatic(tree: Tree) -> int:
    """Return over how many devices the compiler may lay out arrays as it decides."""
    # The type states the sharding over `Explicit` axes. Over `Auto` axes it does not: the
    # compiler decides, so an array may lie over any that exist.
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree)]
    counts = [
        math.prod(mesh.shape[name] for name in axes_of_kind(mesh, AxisType.Auto))
        for mesh in meshes
    ]
    return max(counts, default=1)


def axes_of_kind(mesh: Any, *kinds: AxisType) -> tuple[Any, ...]:
    """Return the names of those axes of a mesh that are of a kind."""
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind in kinds)


def varying(x: jax.Array) -> frozenset[Any]:
    """Return the mapped axes along which `shard_map` considers an array to vary."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(tree: Tree, names: tuple[Any, ...]) -> Tree:
    """Mark a tree that is replicated over some mapped axes as varying along them."""
    # The axes of `vmap(axis_name=…)` are not axes of a mesh: there is nothing to mark.
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def leaf(x: jax.Array) -> jax.Array:
        known = varying(x)
        missing = tuple(n for n in names if n in manual and n not in known)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)


def zeros_like(tree: Tree) -> Tree:
    """Return zeros with the layout of a tree."""
    # `jnp.zeros_like` is compiled separately and, in jax 0.12, sometimes loses the layout.
    return jax.tree.map(
        lambda x: jnp.where(jnp.zeros((), bool), x, jnp.zeros((), x.dtype)), tree
    )


def zeros(shapes: Tree) -> Tree:
    """Return zeros with the shapes and layouts that `jax.eval_shape` returned."""

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        return _laid_out(jnp.zeros(x.shape, x.dtype), x.sharding)

    return jax.tree.map(leaf, shapes)


def like(tree: Tree, other: Tree) -> Tree:
    """Return `tree` with the layout of another tree of the same shapes."""

    def leaf(x: jax.Array, y: jax.Array) -> jax.Array:
        if _typed(y) is None and may_be_sharded(y):
            # Only the compiler knows the layout of `y`, and gives it to what it meets.
            y = jax.lax.stop_gradient(y).astype(x.dtype)
            return jnp.where(jnp.zeros((), bool), y, x)
        return _laid_out(x, jax.typeof(y).sharding)

    return jax.tree.map(leaf, tree, other)


def first_case(tree: Tree) -> Tree:
    """Return one example of a tree, or only its shapes, for `jax.eval_shape`."""

    # JAX refuses to take a row of an axis that is sharded by type. Otherwise a slice is
    # better than its shape, as it keeps what `shard_map` has in the type.
    def leaf(x: jax.Array) -> jax.Array | jax.ShapeDtypeStruct:
        if _typed(x) is None:
            return x[:1]
        return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)

    return jax.tree.map(leaf, tree)


def shards_of_cases(tree: Tree) -> int:
    """Return how many devices share the examples' axis, by type; otherwise 1."""
    counts = [
        math.prod(sharding.mesh.shape[name] for name in _axes(sharding.spec[:1]))
        for sharding in _shardings(tree)
    ]
    return max(counts, default=1)


def alike(data: Tree) -> Tree:
    """Lay out the examples' axis of all leaves in the same way, as `jax.vmap` requires."""
    typed = [sharding for sharding in _shardings(data) if sharding.spec[0]]
    if not typed:
        return data

    def leaf(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(typed[0].spec[0], *jax.typeof(x).sharding.spec[1:])
        return jax.sharding.reshard(x, NamedSharding(typed[0].mesh, spec))

    return jax.tree.map(leaf, data)


def gathered(tree: Tree, data: Tree) -> Tree:
    """Gather a tree over the mesh axes that shard the examples of `data`, by type.

    With one computation per example, and the examples sharded, no parameter can be sharded
    over the same axes.
    """
    taken = {name for s in _shardings(data) for name in _axes(s.spec[:1])}

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
    """Return whether a tree is sharded over mesh axes other than those of the examples."""
    return bool(_shardings(gathered(tree, data)))


def replicated(x: jax.Array) -> jax.Array:
    """Replicate an array on all devices if its type says that it is sharded."""
    sharding = _typed(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec()))


def contracted(
    left: jax.Array,
    right: jax.Array,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    precision: jax.lax.PrecisionLike = None,
    batch: tuple[int, ...] = (),
) -> jax.Array:
    """Sum products over pairs of axes, sharded or not; other axes keep their layout.

    `axes` holds the axes of `left` and of `right`, and `batch` those that are batch axes of
    both; see `jax.lax.dot_general`.
    """
    # With explicit axes the caller must state the layout of the result of a product that
    # sums over a sharded axis.
    kept, mesh = [], None
    for x, summed in zip((left, right), axes, strict=True):
        sharding = _typed(x)
        spec = [None] * x.ndim if sharding is None else sharding.spec
        kept += [] if kept else [spec[axis] for axis in batch]
        gone = {*summed, *batch}
        kept += [part for axis, part in enumerate(spec) if axis not in gone]
        mesh = mesh if sharding is None else sharding.mesh
    out = None if mesh is None else NamedSharding(mesh, PartitionSpec(*kept))
    return jax.lax.dot_general(
        left, right, (axes, (batch, batch)), precision=precision, out_sharding=out
    )


def _typed(x: Any) -> Any:
    """Return the sharding in an array's type, or `None` if it shards no axis."""
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None


def _shardings(tree: Tree) -> list[Any]:
    """Return the shardings in the types of the leaves that are sharded by type."""
    return [s for leaf in jax.tree.leaves(tree) if (s := _typed(leaf)) is not None]


def _laid_out(x: jax.Array, sharding: Any) -> jax.Array:
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, sharding)


def _axes(spec: Any) -> list[Any]:
    """Return the mesh axes that part of a `PartitionSpec` names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [name for part in parts for name in part if name is not None]
