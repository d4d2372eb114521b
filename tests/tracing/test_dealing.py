"""Work on matrices that is dealt out over devices gives what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mapped import DEVICES, mesh, needs_devices
from reference import quick_jit

from hfjax._tracing import dealing, linalg

pytestmark = needs_devices


def positive(rng, count, length):
    root = rng.normal(size=(count, length, length))
    return jnp.asarray(root @ np.swapaxes(root, 1, 2) + np.eye(length))


def calls():
    """Return stacks for fewer devices than there are, one for more, and lone ones."""
    rng = np.random.default_rng(2)
    sizes = [(3, 4), (1, 5), (6, 2), (1, 3), (2, 7)]
    return [(positive(rng, n, size), jnp.arange(1.0, n + 1)) for n, size in sizes]


def function(matrix, number):
    return number * linalg.inverse_root(matrix)


def truth(stacks):
    matrices, numbers = map(np.asarray, stacks)
    return numbers[:, None, None] * np.linalg.inv(np.linalg.cholesky(matrices))


def by_jit(kind, given):
    placed = jax.device_put(given, NamedSharding(mesh(kind), PartitionSpec()))
    return quick_jit(functools.partial(dealing.dealt, function))(placed)


def by_shard_map(check_vma, given):
    none = PartitionSpec()
    run = functools.partial(dealing.dealt, function, axis_name="cases")
    mapped = jax.shard_map(
        run, mesh=mesh(), in_specs=none, out_specs=none, check_vma=check_vma
    )
    return quick_jit(mapped)(given)


def by_pmap(given):
    def run(_, given):
        return dealing.dealt(function, given, "cases")

    mapped = jax.pmap(run, axis_name="cases", in_axes=(0, None))
    return [x[DEVICES - 1] for x in mapped(jnp.ones(DEVICES), given)]


@pytest.mark.parametrize(
    "run",
    [
        functools.partial(by_jit, AxisType.Auto),
        functools.partial(by_jit, AxisType.Explicit),
        functools.partial(by_shard_map, True),
        functools.partial(by_shard_map, False),
        by_pmap,
    ],
    ids=["auto", "explicit", "shard_map_check_vma", "shard_map", "pmap"],
)
def test_devices_share_the_work_and_all_have_the_results(run):
    for found, stacks in zip(run(calls()), calls(), strict=True):
        np.testing.assert_allclose(found, truth(stacks), rtol=1e-12, atol=1e-14)


def test_few_matrices_on_many_devices_are_no_more_matrices():
    given = jax.device_put(calls(), NamedSharding(mesh(), PartitionSpec()))
    run = jax.jit(functools.partial(dealing.dealt, function))
    text = run.lower(given).compile().as_text()
    assert f"[{DEVICES // 2},7,7]" in text
    assert f"[{DEVICES},7,7]" not in text


def test_members_of_an_ensemble_stay_on_their_devices():
    scales = jnp.arange(1.0, DEVICES + 1)
    layout = NamedSharding(mesh(), PartitionSpec("cases"))

    def of_member(scale):
        given = [(scale * matrices, numbers) for matrices, numbers in calls()]
        return dealing.dealt(function, given)

    found = quick_jit(jax.vmap(of_member))(jax.device_put(scales, layout))
    for stack, given in zip(found, calls(), strict=True):
        right = np.stack([truth(given) / np.sqrt(scale) for scale in scales])
        np.testing.assert_allclose(stack, right, rtol=1e-12, atol=1e-14)


def test_the_longest_go_first_each_to_whom_least_is_left():
    assert dealing._owners([2, 9, 3, 8, 3], 2) == [1, 0, 1, 1, 1]
    assert dealing._owners([4, 4, 4, 4], 2) == [0, 1, 0, 1]
