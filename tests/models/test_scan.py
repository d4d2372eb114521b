import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from reference import quick_jit

import hfjax
from hfjax import scan

CASES, FEATURES, UNITS, OUTPUTS = 3, 2, 4, 2
PLAIN = jax.lax.scan
CHUNKS = [(1, None), (7, None), (7, 3), (12, 4), (5, 1), (5, 5), (3, 8)]
"""T and chunk: one step, a prime, a shorter last chunk, none, chunks of 1, T, > T."""


def make_params(seed=0):
    shapes = {"in": (FEATURES, UNITS), "recurrent": (UNITS, UNITS)}
    shapes |= {"out": (UNITS, OUTPUTS), "h0": (UNITS,)}
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: 0.5 * jax.random.normal(key, shape, jnp.float64)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def model(run, params, inputs):
    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
        return h, h @ params["out"]

    h0 = jnp.broadcast_to(params["h0"][None], (len(inputs), len(params["h0"])))
    return run(step, h0, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)


def make_batch(steps, cases=CASES):
    rng = np.random.default_rng(steps)
    return tuple(
        jnp.asarray(rng.standard_normal((cases, steps, size)))
        for size in (FEATURES, OUTPUTS)
    )


def make_objective(run, **options):
    model_fn = functools.partial(model, run)
    return hfjax.Objective(model_fn, hfjax.losses.squared_error(), **options)


def quantities(run, batch):
    """Return f, its gradient and a product with G."""
    objective = make_objective(run)

    def measure(params, v):
        value, gradient = objective.value_and_grad(params, batch)
        return value, gradient, hfjax.curvature.ggn(objective, params, batch)(v)

    return quick_jit(measure)(make_params(), make_params(1))


def assert_close(got, expected, rtol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize(("steps", "chunk"), CHUNKS)
def test_values_gradients_and_products_are_those_of_the_plain_scan(steps, chunk):
    batch = make_batch(steps)
    checkpointed = functools.partial(scan.checkpointed, chunk=chunk)
    assert_close(quantities(checkpointed, batch), quantities(PLAIN, batch))


def test_carries_and_outputs_may_be_any_tree_and_xs_none():
    def step(carry, _):
        count, total = carry
        return (count + 1, total + 0.5 * count), {"count": count, "none": None}

    init = (jnp.array(3), 0.0)  # A Python number as carry, as the plain scan takes it.
    for steps in (0, 1, 7, 9):
        got = scan.checkpointed(step, init, None, length=steps)
        assert_close(got, PLAIN(step, init, None, length=steps))


@pytest.mark.slow
def test_random_keys_and_arrays_without_elements_pass():
    keys = jax.random.split(jax.random.key(0), 7)

    def step(carry, x):
        key, empty = x
        return carry + jax.random.normal(key), (jax.random.fold_in(key, 1), empty)

    xs = (keys, jnp.zeros((7, 0)))
    (total, (out, empty)) = scan.checkpointed(step, jnp.zeros(()), xs)
    expected, (out_expected, _) = PLAIN(step, jnp.zeros(()), xs)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert jnp.array_equal(out, out_expected)
    assert empty.shape == (7, 0)


def test_each_step_is_run_once_in_order():
    _, ys = scan.checkpointed(
        lambda carry, x: (10 * carry + x, carry), jnp.array(0), jnp.arange(1, 8)
    )
    np.testing.assert_array_equal(ys, [0, 1, 12, 123, 1234, 12345, 123456])


@pytest.mark.slow
def test_it_can_be_batched():
    inputs = jnp.stack([make_batch(7)[0], 2 * make_batch(7)[0]])

    def gradient(run, inputs):
        def loss(params):
            return jnp.sum(model(run, params, inputs) ** 2)

        return jax.grad(loss)(make_params())

    got = quick_jit(jax.vmap(functools.partial(gradient, scan.checkpointed)))(inputs)
    expected = quick_jit(jax.vmap(functools.partial(gradient, PLAIN)))(inputs)
    assert_close(got, expected)


@pytest.mark.slow
def test_cases_can_be_sharded():
    batch = make_batch(7, cases=8)
    mesh = jax.make_mesh((4,), ("cases",), axis_types=(jax.sharding.AxisType.Auto,))
    objective = make_objective(scan.checkpointed, axis_name="cases")

    def measure(params, v, batch):
        value, gradient = objective.value_and_grad(params, batch)
        return value, gradient, hfjax.curvature.ggn(objective, params, batch)(v)

    sharded = jax.shard_map(
        measure, mesh=mesh, in_specs=(P(), P(), P("cases")), out_specs=P()
    )
    got = quick_jit(sharded)(make_params(), make_params(1), batch)
    assert_close(got, quantities(PLAIN, batch))


@pytest.mark.slow
def test_the_linear_map_between_the_products_keeps_few_states():
    """A product's memory falls, from T states by a factor that grows as √T."""

    def temporary_bytes(run, steps):
        inputs, targets = make_batch(steps, cases=50)
        objective = make_objective(run)

        def product(params, v, batch):
            return hfjax.curvature.ggn(objective, params, batch)(v)

        args = make_params(), make_params(1), (inputs, targets)
        compiled = jax.jit(product).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ratios = [
        temporary_bytes(scan.checkpointed, steps) / temporary_bytes(PLAIN, steps)
        for steps in (64, 256)
    ]
    assert ratios[1] < ratios[0]
    assert ratios[1] < 0.5


def test_what_it_cannot_use_is_refused():
    def step(carry, x):
        return carry, x

    with pytest.raises(ValueError, match=r"one number, got leading axes .* None"):
        scan.checkpointed(step, 0.0, None)
    with pytest.raises(ValueError, match=r"leading axes \[\(3,\), \(4,\)\]"):
        scan.checkpointed(step, 0.0, (jnp.ones(3), jnp.ones(4)))
    with pytest.raises(ValueError, match="`length` 4"):
        scan.checkpointed(step, 0.0, jnp.ones(3), length=4)
    with pytest.raises(ValueError, match="got a scalar"):
        scan.checkpointed(step, 0.0, jnp.ones(()))
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        scan.checkpointed(step, 0.0, jnp.ones(3), chunk=0)
    with pytest.raises(TypeError, match="`chunk` must be a Python integer"):
        scan.checkpointed(step, 0.0, jnp.ones(3), chunk=2.0)
