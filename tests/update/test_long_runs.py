"""Two thousand updates by the loop that people write: nothing grows, nothing breaks."""

import functools
import gc
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

import hfjax

pytestmark = pytest.mark.slow

UPDATES, SETTLED, CASES = 2000, 500, 40
DECAY = 1e-3
STATM = pathlib.Path("/proc/self/statm")
HEAP = 2 << 20  # bytes that a process may grow by, 1.4 kB an update
BLOCKS = 750  # of Python's own objects, one for every other update


def network(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def truth(params, batch, weight_decay):
    """Return f and ‖∇f‖ of `network`, in NumPy."""
    x, t, a, b, c = (
        np.asarray(leaf, np.float64)
        for leaf in (*batch, params["hidden"], params["bias"], params["out"])
    )
    h = np.tanh(x @ a + b)
    error = h @ c - t
    back = (error @ c.T) * (1 - h**2)
    gradient = [x.T @ back, back.sum(axis=0), h.T @ error]
    leaves = [a, b, c]
    squares = sum(np.sum(leaf**2) for leaf in leaves)
    value = np.sum(error**2) / (2 * len(x)) + weight_decay / 2 * squares
    norms = [
        g / len(x) + weight_decay * leaf
        for g, leaf in zip(gradient, leaves, strict=True)
    ]
    return value, np.sqrt(sum(np.sum(g**2) for g in norms))


def make_params(dtype):
    rng = np.random.default_rng(0)
    params = {
        "hidden": rng.standard_normal((2, 5)),
        "bias": 0.1 * rng.standard_normal(5),
        "out": rng.standard_normal((5, 1)),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def make_batches(dtype, count=1):
    """Return so many batches of a noisy function of two numbers."""
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(count, CASES, 2))
    noise = 0.05 * rng.standard_normal((count, CASES, 1))
    t = np.sin(6 * x[..., :1]) * x[..., 1:] + noise
    return list(zip(jnp.asarray(x, dtype), jnp.asarray(t, dtype), strict=True))


@functools.cache
def compiled(weight_decay, dtype, model_fn=network, damping=hfjax.damping.searched()):
    """Return an optimizer with all defaults but λ, and a step for one dtype."""
    del dtype
    objective = hfjax.Objective(
        model_fn, hfjax.losses.squared_error(), weight_decay=weight_decay
    )
    tx = hfjax.hessian_free(objective, damping=damping)
    return tx, *training.counted(functools.partial(training.train_step, objective, tx))


class Run(NamedTuple):
    """The end of a run, and what was seen in each of its updates."""

    params: Any
    state: hfjax.HessianFreeState
    before: np.ndarray
    after: np.ndarray
    accepted: np.ndarray
    damping: np.ndarray
    values: np.ndarray  # f after the update, in NumPy,
    gradient_norms: np.ndarray  # and ‖∇f‖
    sizes: np.ndarray  # Σ |w| of the output weights


def bits(params):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def memory():
    """Return how many arrays live, their bytes, Python's objects, the process' bytes."""
    gc.collect()
    arrays = jax.live_arrays()
    size = sum(array.nbytes for array in arrays)
    pages = int(STATM.read_text().split()[1]) if STATM.exists() else 0
    process = pages * os.sysconf("SC_PAGE_SIZE") if pages else 0
    return len(arrays), size, sys.getallocatedblocks(), process


def train(params, batches, weight_decay=0.0, model_fn=network, **options):
    """Run the updates, and assert what holds of each run."""
    tx, train_step, traces = compiled(
        weight_decay, params["out"].dtype, model_fn, **options
    )
    state, rows = tx.init(params), np.zeros((7, UPDATES))
    for update in range(UPDATES):
        old, batch = params, batches[update % len(batches)]
        params, state = train_step(params, state, batch)
        info = state.info
        accepted = bool(info.accepted)
        assert accepted or bits(params) == bits(old)
        seen = info.value_before, info.value_after, accepted, state.damping
        there = truth(params, batch, weight_decay) if model_fn is network else (0, 0)
        size = np.sum(np.abs(np.asarray(params["out"], np.float64)))
        rows[:, update] = [float(x) for x in (*seen, *there, size)]
        if update + 1 == SETTLED:
            jax.block_until_ready((params, state))
            settled = memory()
    jax.block_until_ready((params, state))
    arrays, size, blocks, process = memory()
    assert (arrays, size) == settled[:2]
    assert blocks <= settled[2] + BLOCKS
    assert process <= settled[3] + HEAP
    assert state.count == UPDATES
    assert np.all(np.isfinite(rows))
    spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, batch)
    same, rejected = train_step(params, state, spoilt)
    assert not rejected.info.accepted
    assert bits(same) == bits(params)
    assert len(traces) == 1
    run = Run(params, state, *rows)
    assert np.all(run.damping > 0)
    assert np.all(run.after <= run.before)
    assert np.all(run.after[run.accepted == 0] == run.before[run.accepted == 0])
    return run


def assert_never_rises(run):
    """Assert that f falls or stays, from update to update as within one.

    But for rounding: f is evaluated at θ + δ, perhaps in one go with the sum, and then
    anew. An error e of the outputs is one of e √(2f) at most of f, and e is some ε times
    the weights that sum up to them.
    """
    eps = np.finfo(run.params["out"].dtype).eps
    noise = 10 * eps * run.sizes * np.sqrt(2 * run.values)
    assert np.all(np.diff(run.before) <= noise[1:])
    assert np.all(np.abs(run.before[1:] - run.after[:-1]) <= noise[1:])


def test_in_a_flat_valley_f_falls_to_the_last_update_and_never_rises():
    run = train(make_params(jnp.float64), make_batches(jnp.float64))
    assert_never_rises(run)
    assert np.all(np.diff(run.values) <= 1e-14 * run.values[1:])
    np.testing.assert_allclose(run.after, run.values, rtol=1e-9)
    assert np.all(np.diff(run.values[:: UPDATES // 8]) < 0)


def test_at_a_minimum_the_parameters_stay_and_the_damping_stays_a_number():
    run = train(make_params(jnp.float64), make_batches(jnp.float64), DECAY)
    assert_never_rises(run)
    # f is known to 1e-16, so its gradient's zero at best to 1e-8.
    assert run.gradient_norms[SETTLED] < 1e-8
    # From there on f shows no step, and ρ is what rounding makes of it: λ may stay or
    # fall, and does not climb.
    late = slice(SETTLED, None)
    assert np.ptp(run.values[late]) <= 1e-14 * run.values[-1]
    assert np.max(run.damping[late]) < 10


def test_batches_in_turn_keep_the_damping_where_the_model_is_worth_something():
    batches = make_batches(jnp.float64, 4)
    run = train(make_params(jnp.float64), batches, DECAY)
    whole = tuple(jnp.concatenate(leaves) for leaves in zip(*batches, strict=True))
    start, _ = truth(make_params(jnp.float64), whole, DECAY)
    end, _ = truth(run.params, whole, DECAY)
    assert end < start / 20
    assert np.min(run.damping) > 1e-10


def test_in_float32_f_never_rises_and_the_damping_comes_down_again():
    params, (batch, other) = make_params(jnp.float32), make_batches(jnp.float32, 2)
    run = train(params, [batch])
    assert_never_rises(run)
    np.testing.assert_allclose(run.after, run.values, rtol=1e-3)
    # At last f shows no step any more, and λ has risen. On other data it shows them.
    _, train_step, _ = compiled(0.0, batch[0].dtype)
    params, state = train_step(run.params, run.state, other)
    first = state.info.value_before
    for _ in range(100):
        params, state = train_step(params, state, other)
    assert state.damping < 10
    assert state.info.value_after < first / 2


def test_the_damping_of_a_perfect_model_falls_to_the_smallest_float_and_stays():
    params, batches = {"out": jnp.zeros((2, 1), jnp.float32)}, make_batches("f4", 3)
    run = train(
        params,
        batches,
        model_fn=lambda params, x: x @ params["out"],
        damping=hfjax.damping.levenberg_marquardt(),
    )
    np.testing.assert_array_equal(run.damping[SETTLED:], np.finfo(np.float32).tiny)
    for update in range(UPDATES - 3, UPDATES):
        x, t = (np.float64(leaf) for leaf in batches[update % 3])
        least = np.linalg.lstsq(x, t)[1] / (2 * CASES)
        np.testing.assert_allclose(run.after[update], least[0], rtol=1e-5)
