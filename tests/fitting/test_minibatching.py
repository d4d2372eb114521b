import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from reference import counted_jit, quick_jit

import hfjax
from hfjax import minibatching


@pytest.mark.parametrize(
    ("first", "last", "factor", "interval"),
    [(100, 1000, 2.0, 10), (7, 60_000, 1.5, 3), (5, 5, 3.0, 1), (1, 10**9, 10, 1)],
)
def test_sizes_grow_by_the_factor_and_stop_at_the_last(first, last, factor, interval):
    size = minibatching.growing(first, last, factor=factor, interval=interval)
    for count in [*range(4 * interval), 10 * interval, 100 * interval, 10**4, 10**12]:
        # In integers, where no power is too large.
        power = min(count // interval, 200)
        truth = first * round(2 * factor) ** power // 2**power
        assert size(count) == min(last, truth)
        assert type(size(count)) is int
    sizes = {size(count) for count in range(100 * interval)}
    assert len(sizes) <= 1 + math.ceil(math.log(last / first, factor)) + 1


def test_a_size_once_at_the_last_stays_whatever_the_count():
    for factor in (1.0001, 2.0, 3.0, 1e6):
        size = minibatching.growing(10, 1000, factor=factor, interval=1)
        assert size(10**6) == 1000


@pytest.mark.parametrize(
    ("first", "factor", "size"),
    [(100, 1.15, 115), (100, 1.1, 110), (1000, 1.001, 1001)],
)
def test_a_size_that_is_whole_is_not_rounded_below(first, factor, size):
    # In floats 100 · 1.15 is 114.99999999999999.
    assert minibatching.growing(first, 10**6, factor=factor, interval=1)(1) == size


def test_bad_options_of_growing_are_refused():
    with pytest.raises(ValueError, match="`first` must be at least 1"):
        minibatching.growing(0, 10)
    with pytest.raises(ValueError, match="`last` must be at least 10"):
        minibatching.growing(10, 9)
    with pytest.raises(ValueError, match=r"`factor` must be above 1\.0"):
        minibatching.growing(1, 10, factor=1.0)
    with pytest.raises(ValueError, match="`interval` must be at least 1"):
        minibatching.growing(1, 10, interval=0)
    size = minibatching.growing(1, 10)
    for count in (2.5, "3"):
        with pytest.raises(TypeError):
            size(count)
    with pytest.raises(TypeError):
        jax.jit(size)(3)


@functools.partial(quick_jit, static_argnums=1)
def taken(total, size, count):
    return minibatching.in_turn(jnp.arange(total.shape[0]), size, count)


@pytest.mark.parametrize(
    ("total", "size"), [(12, 4), (10, 4), (7, 7), (7, 3), (5, 1), (9, 6), (11, 10)]
)
def test_every_case_comes_equally_often_over_a_cycle(total, size):
    cycle = math.lcm(total, size) // size
    come, cases = collections.Counter(), jnp.zeros(total)
    for count in range(2 * cycle):
        chunk = [int(case) for case in taken(cases, size, jnp.int32(count))]
        assert chunk == [(count * size + k) % total for k in range(size)]
        come.update(chunk)
        if count + 1 == cycle:
            assert set(come.values()) == {cycle * size // total}
    assert set(come.values()) == {2 * cycle * size // total}
    assert sorted(come) == list(range(total))


@pytest.mark.parametrize("x64", [False, True])
def test_large_counts_and_data_do_not_overflow(x64):
    with jax.enable_x64(x64):
        for total, size in (
            (10, 4),
            (60_000, 59_999),
            (60_000, 7_919),
            (65_537, 65_536),
        ):
            cases = jnp.zeros(total, jnp.int8)
            for count in (0, 40_000, 59_999, 2**30 + 7, 2**31 - 1):
                chunk = np.asarray(taken(cases, size, jnp.int32(count)), np.int64)
                truth = (count * size + np.arange(size)) % total
                np.testing.assert_array_equal(chunk, truth)


def test_a_tree_is_taken_alike_and_a_count_may_be_a_number():
    data = ({"x": jnp.arange(6.0).reshape(3, 2)}, jnp.arange(3))
    inputs, targets = minibatching.in_turn(data, 2, 1)
    np.testing.assert_array_equal(targets, [2, 0])
    np.testing.assert_array_equal(inputs["x"], [[4, 5], [0, 1]])


def test_bad_sizes_are_refused():
    for size in (0, 4):
        with pytest.raises(ValueError, match="`size` must be at"):
            minibatching.in_turn(jnp.arange(3), size, 0)
    with pytest.raises(TypeError, match="`size` must be a Python integer"):
        minibatching.in_turn(jnp.arange(3), 2.0, 0)


@pytest.mark.slow
def test_training_goes_on_as_batches_grow_and_compiles_once_a_size():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((24, 3)))
    data = (x, jnp.tanh(x @ jnp.asarray(rng.standard_normal((3, 2)))))
    objective = hfjax.Objective(
        lambda p, x: jnp.tanh(x @ p), hfjax.losses.squared_error()
    )
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(),
        solver=hfjax.cg.conjugate_gradient(max_iterations=8),
    )

    def step(params, state, size):
        batch = minibatching.in_turn(data, size, state.count)
        return training.train_step(objective, tx, params, state, batch)

    step, traced = counted_jit(step, static_argnums=2)
    size = minibatching.growing(6, 24, interval=4)
    params = jnp.zeros((3, 2))
    state, seen = tx.init(params), []
    first = objective.value(params, data)
    for count in range(12):
        before = state
        params, state = step(params, state, size(count))
        seen.append(size(count))
        assert state.count == count + 1
        if state.info.accepted:  # λ goes on from where it was.
            factors = (2 / 3, 1, 3 / 2)
            ratio = float(state.damping / before.damping)
            assert np.min(np.abs(np.subtract(factors, ratio))) < 1e-6
            assert np.any(state.direction)
    assert seen == [6] * 4 + [12] * 4 + [24] * 4
    assert len(traced) == 3
    assert objective.value(params, data) < 1e-2 * first


def test_leaves_of_different_length_are_refused():
    with pytest.raises(ValueError, match="must lead with as many cases"):
        minibatching.in_turn((jnp.arange(5), jnp.arange(3)), 2, 1)
