"""Ten updates are the same ten on any devices, whatever their shards hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from mapped import DEVICES, PROBLEM, axis_name, by_shard_map, needs_devices, run
from problems import Problem, mlp, normal
from reference import assert_close, flat, quick_jit

import hfjax

pytestmark = [needs_devices, pytest.mark.slow]
UPDATES = 10


def train(objective, params, batch, direction):
    """Return one solution by conjugate gradients, then ten updates' course and end."""
    product = hfjax.curvature.ggn(objective, params, batch)
    solved = hfjax.cg.solve(
        lambda v: jax.tree.map(lambda bv, v: bv + 0.1 * v, product(v), v),
        direction,
        max_iterations=5,
    )
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=3.0),
        # Well before the residual is rounding, of which the number of devices decides.
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=8,
            stopping=hfjax.stopping.martens_sutskever2012(1e-2, minimum_window=2),
            warm_start_decay=0.95,
        ),
        # No random signs, which depend on a case's place among the padding.
        preconditioner=hfjax.preconditioners.diagonal(),
    )

    (params, _), (info, dampings) = training.train(
        objective, tx, params, batch, UPDATES
    )
    return {
        "cg": solved.x,
        "models": solved.model_values,
        "params": params,
        "values": info.value_after,
        "iterations": info.cg_iterations,
        "damping": dampings,
    }


def in_dtype(dtype):
    params, batch = jax.tree.map(
        lambda x: x.astype(dtype), (PROBLEM.params, PROBLEM.batch)
    )
    return Problem("cast", params, PROBLEM.model_fn, PROBLEM.loss, batch, 0.01)


@functools.cache
def on_one_device(dtype):
    """Train without an axis, shards or microbatches, and without the padding."""
    problem = in_dtype(dtype)
    real = np.flatnonzero(problem.batch[2])
    batch = jax.tree.map(lambda leaf: leaf[real], problem.batch)
    fn = functools.partial(train, problem.objective())
    return quick_jit(fn)(problem.params, batch, problem.direction)


@pytest.mark.parametrize(
    ("way", "microbatch_size", "dtype"),
    [
        ("jit_with_shardings", 8, "float64"),
        ("jit_with_explicit_shardings", 8, "float32"),
        ("shard_map_check_vma", 2, "float64"),
        ("shard_map_check_vma", 2, "float32"),
        ("shard_map_of_two_axes", None, "float64"),
        ("shard_map", 2, "float64"),
        ("pmap", 2, "float64"),
        ("vmap", 2, "float32"),
    ],
)
def test_ten_updates_on_devices_are_those_of_one(way, microbatch_size, dtype):
    # Uneven shards, one of padding only, and microbatches that do not divide them.
    problem, truth = in_dtype(dtype), on_one_device(dtype)
    objective = problem.objective(
        axis_name=axis_name(way), microbatch_size=microbatch_size
    )
    result = run(way, functools.partial(train, objective), problem)
    np.testing.assert_array_equal(result["iterations"], truth["iterations"])
    assert len(set(np.asarray(truth["iterations"]).tolist())) > 1
    rtol = {"float64": 1e-12, "float32": 1e-5}[dtype]
    for name in ("values", "damping", "models", "cg", "params"):
        found, right = (flat(tree[name]) for tree in (result, truth))
        scale = np.max(np.abs(right))
        np.testing.assert_allclose(found, right, rtol=rtol, atol=rtol * scale)


def unlike_shards():
    """Return a problem whose shards, each alone, need other numbers of iterations."""
    rng = np.random.default_rng(0)
    spreads = np.repeat([1.0, 0.3, 3.0, 2.0], 4)[:, None]
    x = normal(rng, 16, 5) * spreads ** np.arange(5)
    params = [(normal(rng, 5, 2, scale=0.1), jnp.zeros(2))]
    return Problem("unlike", params, mlp, "squared_error", (x, normal(rng, 16, 2)))


def solve(objective, params, batch, _):
    """Return what an update decides, and its step."""
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=1.0),
        solver=hfjax.cg.conjugate_gradient(stopping=hfjax.stopping.residual(1e-4)),
        preconditioner=hfjax.preconditioners.diagonal(),
    )
    _, grads = objective.value_and_grad(params, batch)
    updates, state = tx.update(grads, tx.init(params), params, batch=batch)
    info = state.info
    decided = (info.cg_iterations, info.cg_reason, info.chosen_iteration, info.accepted)
    return updates, [jnp.asarray(x, float)[None] for x in decided], info.step_size[None]


def test_no_device_decides_by_its_own_cases():
    problem = unlike_shards()
    alone = quick_jit(functools.partial(solve, problem.objective()))
    parts = jax.tree.map(lambda leaf: jnp.split(leaf, DEVICES), problem.batch)
    counts = [
        float(alone(problem.params, (x, t), None)[1][0][0])
        for x, t in zip(*parts, strict=True)
    ]
    assert len(set(counts)) == DEVICES, counts  # Each alone would stop elsewhere.
    together = alone(problem.params, problem.batch, None)
    fn = functools.partial(solve, problem.objective(axis_name="cases"))

    # All devices in step: `vmap` goes on for those that would, with what they then have.
    updates, decided, size = run("vmap", fn, problem)
    # And in `shard_map`, where branches of one device only would wait for ever.
    mapped = by_shard_map(
        lambda *args: solve_local(fn, *args), problem, check_vma=False, out=("cases",)
    )
    for found in (decided, jax.tree.map(lambda x: x[:1], mapped)):
        np.testing.assert_array_equal(found, together[1])
    for leaf in mapped:
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    np.testing.assert_allclose(size, together[2], rtol=1e-12)
    assert_close(updates, together[0], rtol=1e-7, atol=1e-8)


def solve_local(fn, *args):
    return fn(*args)[1]
