"""Sharded cases change nothing: every way of mapping equals the dense truth."""

import functools

import jax
import numpy as np
import pytest
import reference
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import quantities, uneven
from reference import quick_jit

DEVICES = 4
pytestmark = pytest.mark.skipif(
    jax.device_count() < DEVICES, reason="needs four devices"
)
# Three cases a device; the second has no weight at all, the third little.
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 3.0, 1.0, 1.0])
PROBLEM = uneven(WEIGHTS)


def mesh():
    return jax.make_mesh((DEVICES,), ("cases",), axis_types=(AxisType.Auto,))


def by_shard_map(fn, *, check_vma):
    replicated, sharded = PartitionSpec(), PartitionSpec("cases")
    mapped = jax.shard_map(
        fn,
        mesh=mesh(),
        in_specs=(replicated, sharded, replicated),
        out_specs=replicated,
        check_vma=check_vma,
    )
    return quick_jit(mapped)(PROBLEM.params, PROBLEM.batch, PROBLEM.direction)


def folded():
    def fold(leaf):
        return leaf.reshape(DEVICES, -1, *leaf.shape[1:])

    return jax.tree.map(fold, PROBLEM.batch)


def by_pmap(fn):
    mapped = jax.pmap(fn, axis_name="cases", in_axes=(None, 0, None))
    return mapped(PROBLEM.params, folded(), PROBLEM.direction)


def by_vmap(fn):
    mapped = jax.vmap(fn, axis_name="cases", in_axes=(None, 0, None))
    return quick_jit(mapped)(PROBLEM.params, folded(), PROBLEM.direction)


def by_sharding(fn):
    cases = NamedSharding(mesh(), PartitionSpec("cases"))
    rows = NamedSharding(mesh(), PartitionSpec())
    batch = jax.device_put(PROBLEM.batch, cases)
    params, v = jax.device_put((PROBLEM.params, PROBLEM.direction), rows)
    return quick_jit(fn)(params, batch, v)


WAYS = {
    "shard_map_check_vma": functools.partial(by_shard_map, check_vma=True),
    "shard_map": functools.partial(by_shard_map, check_vma=False),
    "pmap": by_pmap,
    "vmap": by_vmap,
    "jit_with_shardings": by_sharding,
}


@pytest.mark.parametrize(
    ("way", "microbatch_size"),
    [
        ("jit_with_shardings", None),
        ("shard_map_check_vma", None),
        ("shard_map_check_vma", 2),
        ("shard_map", None),
        ("pmap", None),
        ("vmap", None),
        ("vmap", 2),
    ],
)
def test_devices_change_nothing(way, microbatch_size):
    axis_name = None if way == "jit_with_shardings" else "cases"
    objective = PROBLEM.objective(axis_name=axis_name, microbatch_size=microbatch_size)
    result = WAYS[way](functools.partial(quantities, objective))
    if way in ("pmap", "vmap"):
        for leaf in jax.tree.leaves(result):  # Every device has the same.
            leaf = np.asarray(leaf)
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        result = jax.tree.map(lambda leaf: leaf[0], result)
    v, _ = ravel_pytree(PROBLEM.direction)
    truth = reference.quantities(PROBLEM, np.asarray(v))
    for name, leaf in result.items():
        flat, _ = ravel_pytree(leaf)
        np.testing.assert_allclose(
            flat, truth[name], rtol=1e-12, atol=1e-16, err_msg=name
        )


def test_a_pair_of_axes_is_one():
    objective = PROBLEM.objective(axis_name=("rows", "columns"))
    axes = (AxisType.Auto, AxisType.Auto)
    replicated, sharded = PartitionSpec(), PartitionSpec(("rows", "columns"))
    value, gradient = quick_jit(
        jax.shard_map(
            objective.value_and_grad,
            mesh=jax.make_mesh((2, 2), ("rows", "columns"), axis_types=axes),
            in_specs=(replicated, sharded),
            out_specs=replicated,
        )
    )(PROBLEM.params, PROBLEM.batch)
    flat, _ = ravel_pytree(gradient)
    np.testing.assert_allclose(value, reference.value(PROBLEM), rtol=1e-12)
    np.testing.assert_allclose(
        flat, reference.gradient(PROBLEM), rtol=1e-12, atol=1e-16
    )


def test_case_values_are_each_devices_own():
    objective = PROBLEM.objective(axis_name="cases", microbatch_size=2)
    values = quick_jit(
        jax.shard_map(
            objective.case_values,
            mesh=mesh(),
            in_specs=(PartitionSpec(), PartitionSpec("cases")),
            out_specs=PartitionSpec("cases"),
        )
    )(PROBLEM.params, PROBLEM.batch)
    np.testing.assert_allclose(values, reference.dense(PROBLEM).values, rtol=1e-12)
