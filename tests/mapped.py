"""Ways of spreading a problem's cases over devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import uneven
from reference import quick_jit

DEVICES = 4
needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs four devices"
)
# Three cases a device; the second has no weight at all, the third little.
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 3.0, 1.0, 1.0])
PROBLEM = uneven(WEIGHTS)


def mesh(kind=AxisType.Auto, axes=("cases",), shape=(DEVICES,)):
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))


def by_shard_map(
    fn, problem=PROBLEM, *, check_vma, axes=("cases",), shape=(DEVICES,), out=()
):
    """Map over the cases; of `out`, what each device is left with."""
    replicated, sharded = PartitionSpec(), PartitionSpec(axes)
    mapped = jax.shard_map(
        fn,
        mesh=mesh(axes=axes, shape=shape),
        in_specs=(replicated, sharded, replicated),
        out_specs=PartitionSpec(*out),
        check_vma=check_vma,
    )
    return quick_jit(mapped)(problem.params, problem.batch, problem.direction)


def folded(problem=PROBLEM):
    def fold(leaf):
        return leaf.reshape(DEVICES, -1, *leaf.shape[1:])

    return jax.tree.map(fold, problem.batch)


def by_pmap(fn, problem=PROBLEM):
    mapped = jax.pmap(fn, axis_name="cases", in_axes=(None, 0, None))
    return mapped(problem.params, folded(problem), problem.direction)


def by_vmap(fn, problem=PROBLEM):
    mapped = jax.vmap(fn, axis_name="cases", in_axes=(None, 0, None))
    return quick_jit(mapped)(problem.params, folded(problem), problem.direction)


def by_sharding(fn, problem=PROBLEM, kind=AxisType.Auto):
    here = mesh(kind)
    cases = NamedSharding(here, PartitionSpec("cases"))
    rows = NamedSharding(here, PartitionSpec())
    batch = jax.device_put(problem.batch, cases)
    params, v = jax.device_put((problem.params, problem.direction), rows)
    return quick_jit(fn)(params, batch, v)


WAYS = {
    "shard_map_check_vma": functools.partial(by_shard_map, check_vma=True),
    "shard_map": functools.partial(by_shard_map, check_vma=False),
    "shard_map_of_two_axes": functools.partial(
        by_shard_map, check_vma=True, axes=("rows", "columns"), shape=(2, 2)
    ),
    "pmap": by_pmap,
    "vmap": by_vmap,
    "jit_with_shardings": by_sharding,
    "jit_with_explicit_shardings": functools.partial(
        by_sharding, kind=AxisType.Explicit
    ),
}


def axis_name(way):
    """Return what the objective must be told."""
    if way.startswith("jit"):
        return None
    return ("rows", "columns") if way == "shard_map_of_two_axes" else "cases"


def run(way, fn, problem=PROBLEM):
    """Run `(params, batch, direction) -> tree`; every device must have the same bits."""
    result = WAYS[way](fn, problem)
    if way not in ("pmap", "vmap"):
        return result
    for leaf in jax.tree.leaves(result):
        leaf = np.asarray(leaf)
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], result)
