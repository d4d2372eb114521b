"""The basic recurrent networks for Flax, against a recurrence written out in NumPy."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from reference import quick_jit

import hfjax

flax = pytest.importorskip("flax")
networks = pytest.importorskip("hfjax.flax")
nnx = pytest.importorskip("flax.nnx")

CASES, STEPS, FEATURES, UNITS, OUTPUTS = 3, 7, 2, 5, 2
SHAPES = {
    "input_kernel": (FEATURES, UNITS),
    "recurrent_kernel": (UNITS, UNITS),
    "output_kernel": (UNITS, OUTPUTS),
    "initial_hidden": (UNITS,),
    "hidden_bias": (UNITS,),
    "output_bias": (OUTPUTS,),
}


def make_weights(*, use_bias=True, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape) / 2
        for name, shape in SHAPES.items()
        if use_bias or not name.endswith("bias")
    }


def make_batch():
    rng = np.random.default_rng(1)
    return tuple(
        rng.standard_normal((CASES, STEPS, size)) for size in (FEATURES, OUTPUTS)
    )


def recurrence(weights, inputs, activation=np.tanh):
    """Return outputs and hidden states, one case and one step after another."""
    outputs = np.zeros((CASES, STEPS, OUTPUTS))
    hidden = np.zeros((CASES, STEPS, UNITS))
    b, c = weights.get("hidden_bias", 0), weights.get("output_bias", 0)
    for case in range(CASES):
        h = weights["initial_hidden"]
        for t in range(STEPS):
            drive = weights["input_kernel"].T @ inputs[case, t] + b
            h = activation(drive + weights["recurrent_kernel"].T @ h)
            hidden[case, t] = h
            outputs[case, t] = weights["output_kernel"].T @ h + c
    return outputs, hidden


def linen_fn(**options):
    """Return `(weights, inputs, **call) -> ...` of the linen module."""
    network = networks.LinenRecurrentNetwork(UNITS, OUTPUTS, **options)
    return lambda weights, x, **call: network.apply({"params": weights}, x, **call)


def nnx_fn(**options):
    """Return `(weights, inputs, **call) -> ...` of the nnx module."""
    network = networks.RecurrentNetwork(
        FEATURES, UNITS, OUTPUTS, rngs=nnx.Rngs(0), **options
    )
    graph, state = nnx.split(network)

    def apply(weights, x, **call):
        filled = nnx.map_state(lambda path, p: p.replace(weights[path[0]]), state)
        return nnx.merge(graph, filled)(x, **call)

    return apply


def objective(model_fn, **options):
    return hfjax.Objective(model_fn, hfjax.losses.squared_error(), **options)


@pytest.mark.parametrize("chunk", [None, "sqrt", 4])
@pytest.mark.parametrize("make", [linen_fn, nnx_fn])
def test_both_flavours_are_the_recurrence(make, chunk):
    weights, (inputs, _) = make_weights(), make_batch()
    fn = quick_jit(functools.partial(make(chunk=chunk), return_hidden=True))
    outputs, hidden = fn(weights, inputs)
    expected, expected_hidden = recurrence(weights, inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    np.testing.assert_allclose(hidden, expected_hidden, rtol=1e-12)
    alone = quick_jit(make(chunk=chunk))(weights, inputs)
    np.testing.assert_allclose(alone, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [linen_fn, nnx_fn])
def test_biases_and_activation_are_options(make):
    weights, (inputs, _) = make_weights(use_bias=False), make_batch()
    fn = quick_jit(make(use_bias=False, activation=jnp.sin))
    expected, _ = recurrence(weights, inputs, np.sin)
    np.testing.assert_allclose(fn(weights, inputs), expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("make", [linen_fn, nnx_fn])
def test_gradients_are_finite_differences_of_the_recurrence(make, chunk):
    weights, (inputs, targets) = make_weights(), make_batch()
    f = objective(make(chunk=chunk))
    _, gradient = quick_jit(f.value_and_grad)(weights, (inputs, targets))

    def value(name, index, change):
        moved = {key: array.copy() for key, array in weights.items()}
        moved[name][index] += change
        outputs, _ = recurrence(moved, inputs)
        return 0.5 * np.sum((outputs - targets) ** 2) / CASES

    for name in SHAPES:
        for index in list(np.ndindex(SHAPES[name]))[:3]:
            difference = value(name, index, 1e-6) - value(name, index, -1e-6)
            np.testing.assert_allclose(
                gradient[name][index], difference / 2e-6, rtol=1e-5, atol=1e-8
            )
    assert np.all(np.abs(gradient["initial_hidden"]) > 1e-4)  # h₀ is learned.


@pytest.mark.slow
def test_checkpointed_products_are_the_plain_ones():
    weights, v, batch = make_weights(), make_weights(seed=1), make_batch()

    def product(make, chunk):
        f = objective(make(chunk=chunk))
        return quick_jit(lambda w, v: hfjax.curvature.ggn(f, w, batch)(v))(weights, v)

    expected = product(linen_fn, None)
    for make in (linen_fn, nnx_fn):
        got = product(make, "sqrt")
        for name in SHAPES:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-10)


@pytest.mark.parametrize("chunk", [None, "sqrt"])
def test_the_pair_serves_structural_damping(chunk):
    """Its vᵀGv is ‖Jv‖² of outputs and of hidden states, here by differences."""
    weights, v, (inputs, targets) = make_weights(), make_weights(seed=1), make_batch()
    model_fn = functools.partial(linen_fn(chunk=chunk), return_hidden=True)
    pairs = inputs, (targets, np.zeros((CASES, STEPS, UNITS)))

    @quick_jit
    def curvature_and_value(weights, v):
        g = hfjax.curvature.ggn(objective(model_fn), weights, pairs)(v)
        damped = objective(model_fn, hidden_loss=hfjax.losses.squared_error())
        return g, damped.value(weights, (inputs, targets))

    g, value = curvature_and_value(weights, v)
    outputs, _ = recurrence(weights, inputs)
    np.testing.assert_allclose(value, 0.5 * np.sum((outputs - targets) ** 2) / CASES)

    def states(step):
        moved = {name: weights[name] + step * v[name] for name in weights}
        return np.concatenate(recurrence(moved, inputs), axis=-1)

    tangent = (states(1e-5) - states(-1e-5)) / 2e-5
    found = sum(np.sum(v[name] * g[name]) for name in v)
    np.testing.assert_allclose(found, np.sum(tangent**2) / CASES, rtol=1e-7)


def test_a_case_depends_on_no_other():
    weights, (inputs, _) = make_weights(), make_batch()
    fn = quick_jit(linen_fn())
    together, alone = fn(weights, inputs), fn(weights, inputs[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_two_hessian_free_updates_lower_the_objective(flavour):
    inputs, targets = (jnp.asarray(array, jnp.float32) for array in make_batch())
    if flavour == "linen":
        network = networks.LinenRecurrentNetwork(UNITS, OUTPUTS, chunk="sqrt")
        params, model_fn = network.init(jax.random.key(0), inputs), network.apply
    else:
        network = networks.RecurrentNetwork(
            FEATURES, UNITS, OUTPUTS, chunk="sqrt", rngs=nnx.Rngs(0)
        )
        graph, params = nnx.split(network, nnx.Param)
        model_fn = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    f = objective(model_fn)
    tx = hfjax.hessian_free(f, preconditioner=None)
    (last, _), (info, _) = training.trained(f, tx, params, (inputs, targets), 3)
    first, second, third = info.value_before
    assert third < second < first
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, last)
    assert all(jax.tree.leaves(moved))  # h₀ and the biases too.


@pytest.mark.slow
def test_parameters_start_as_their_initializers_draw_them():
    ones, twos = (jax.nn.initializers.constant(value) for value in (1.0, 2.0))
    options = {"hidden_init": ones, "bias_init": twos, "param_dtype": jnp.float16}
    network = networks.LinenRecurrentNetwork(40, 1, **options)
    linen = network.init(jax.random.key(0), jnp.ones((1, 1, 20)))["params"]
    state = nnx.state(networks.RecurrentNetwork(20, 40, 1, rngs=nnx.Rngs(0), **options))
    for params in (linen, {name: state[name][...] for name in SHAPES}):
        assert params.keys() == SHAPES.keys()
        assert all(array.dtype == jnp.float16 for array in params.values())
        assert jnp.all(params["initial_hidden"] == 1)
        assert jnp.all(params["hidden_bias"] == 2)
        assert jnp.all(params["output_bias"] == 2)
        for name in ("input_kernel", "recurrent_kernel", "output_kernel"):
            np.testing.assert_array_equal(np.count_nonzero(params[name], axis=0), 15)
        ratio = jnp.std(params["input_kernel"]) / jnp.std(params["recurrent_kernel"])
        assert 0.25 < ratio < 0.5  # 4 times smaller, on twice the density.
        assert not jnp.array_equal(
            params["input_kernel"], params["recurrent_kernel"][:20]
        )


def test_inputs_of_other_ranks_are_refused():
    for make in (linen_fn, nnx_fn):
        with pytest.raises(
            ValueError, match=r"\[cases, time, features\], got .*\(3, 2\)"
        ):
            make()(make_weights(), jnp.ones((3, 2)))


def test_linen_does_without_nnx(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax.nnx", None)  # An import of it fails.
    monkeypatch.delattr(flax, "nnx")
    monkeypatch.delitem(sys.modules, "hfjax.models.recurrent")
    monkeypatch.delattr(hfjax.models, "recurrent")
    spec = importlib.util.spec_from_file_location("without_nnx", networks.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.LinenRecurrentNetwork(UNITS, OUTPUTS)
    outputs = network.apply({"params": make_weights()}, make_batch()[0])
    assert outputs.shape == (CASES, STEPS, OUTPUTS)
    with pytest.raises(ImportError, match=r"`flax\.nnx` fails to import") as caught:
        _ = module.RecurrentNetwork
    assert isinstance(caught.value.__cause__, ImportError)
    with pytest.raises(AttributeError, match="no attribute 'Recurrent'"):
        _ = module.Recurrent
