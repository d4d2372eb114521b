"""Work on matrices, dealt out over devices: each does a part, and all get the results."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from hfjax._core import sharding
from hfjax._tracing.linalg import batched_by

_Function: TypeAlias = Callable[..., jax.Array]
_Stacks: TypeAlias = tuple[jax.Array, ...]


def dealt(
    function: _Function, calls: Sequence[_Stacks], axis_name: Any = None
) -> list[jax.Array]:
    """Map a function over stacks of matrices, with the work dealt out over the devices.

    A stack of several matrices is cut into equal shares. Stacks of one matrix, whatever
    their sizes, go to one device each; a single such is left to all devices.

    Args:
      function: `(square matrix, *numbers) -> matrix` of the same shape.
      calls: a stack of matrices each, and stacks of numbers; the same on all devices.
      axis_name: the mapped axes that shard the examples, inside `shard_map` or `pmap`.
        Elsewhere the devices are those of the mesh in the type of the stacks.

    Returns:
      The results of each call, the same on all devices.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    axes = tuple(name for name in names if name in manual)
    if axes:
        return _unless_batched(function, _in_shares(function, axes))(list(calls))
    mesh = jax.typeof(calls[0][0]).sharding.mesh
    axes = sharding.axes_of_kind(mesh, AxisType.Auto, AxisType.Explicit)
    if math.prod(mesh.shape[name] for name in axes) == 1:
        return _mapped(function, calls)
    run = jax.shard_map(
        _in_shares(function, axes),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
    )
    whole = jax.tree.map(sharding.replicated, list(calls))
    return _unless_batched(function, run)(whole)


def _mapped(function: _Function, calls: Sequence[_Stacks]) -> list[jax.Array]:
    """Map over all stacks, on each device."""

    def one(stacks: _Stacks) -> jax.Array:
        if len(stacks[0]) > 1:
            return jax.vmap(function)(*stacks)
        return function(*(stack[0] for stack in stacks))[None]

    return [one(stacks) for stacks in calls]


def _unless_batched(function: _Function, run: Callable) -> Callable:
    """Return `run`, which deals out; under `jax.vmap`, do the same without dealing."""
    # The members of an ensemble may themselves be what lies over the devices.

    def here(calls: list[_Stacks]) -> list[jax.Array]:
        return _mapped(function, calls)

    def batched(_: int, which: list, calls: list[_Stacks]) -> tuple[list, list]:
        axes = jax.tree.map(lambda each: 0 if each else None, which)
        return jax.vmap(here, tuple(axes))(calls), [True] * len(calls)

    return batched_by(batched, run, derivatives=here)


def _in_shares(function: _Function, axes: tuple[Any, ...]) -> Callable:
    """Return `calls -> results`, to be run by each device inside `shard_map`."""

    def of_few(stacks: _Stacks) -> jax.Array:
        number, length = jax.lax.axis_index(axes), len(stacks[0])
        # A device beyond the last matrix has a copy of it, and nothing to add to the sum.
        own = [jax.lax.dynamic_slice_in_dim(x, number, 1) for x in stacks]
        found = jax.vmap(function)(*own)
        nothing = sharding.vary(sharding.zeros_like(stacks[0]), axes)
        placed = jax.lax.dynamic_update_slice_in_dim(nothing, found, number, axis=0)
        return jax.lax.psum(jnp.where(number < length, placed, nothing), axes)

    def of_stack(stacks: _Stacks) -> jax.Array:
        length, devices = len(stacks[0]), jax.lax.axis_size(axes)
        # Gathered, the results of two matrices on 256 devices would be 256 matrices.
        if devices >= 2 * length:
            return of_few(stacks)
        # The share of the last devices is filled up with copies of the last matrix.
        share = -(-length // devices)

        def own(x: jax.Array) -> jax.Array:
            missing = (0, share * devices - length)
            padded = jnp.pad(x, [missing, *[(0, 0)] * (x.ndim - 1)], mode="edge")
            start = share * jax.lax.axis_index(axes)
            return jax.lax.dynamic_slice_in_dim(padded, start, share)

        found = jax.vmap(function)(*map(own, stacks))
        return jax.lax.all_gather(found, axes, tiled=True, to="invarying")[:length]

    def by_owner(owner: int, stacks: _Stacks) -> jax.Array:
        operands = sharding.vary([x[0] for x in stacks], axes)
        nothing = sharding.zeros_like(operands[0])
        mine = jax.lax.axis_index(axes) == owner
        return jax.lax.cond(mine, function, lambda *_: nothing, *operands)

    def run(calls: Sequence[_Stacks]) -> list[jax.Array]:
        found = {n: of_stack(x) for n, x in enumerate(calls) if len(x[0]) > 1}
        alone = [n for n in range(len(calls)) if n not in found]
        own = [calls[n] for n in alone]
        if len(own) < 2:
            results = _mapped(function, own)
        else:
            owners = _owners([len(x[0][0]) for x in own], jax.lax.axis_size(axes))
            # No device waits for the others' results before it has all of its own.
            parts = jax.lax.optimization_barrier(list(map(by_owner, owners, own)))
            results = [x[None] for x in jax.lax.psum(parts, axes)]
        found.update(zip(alone, results, strict=True))
        return [found[n] for n in range(len(calls))]

    return run


def _owners(lengths: Sequence[int], devices: int) -> list[int]:
    """Return a device for each matrix: the longest first, to the one with least to do."""
    load, owners = np.zeros(devices), [0] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        owners[n] = int(np.argmin(load))
        load[owners[n]] += float(lengths[n]) ** 3
    return owners
