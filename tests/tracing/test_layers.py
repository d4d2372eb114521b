"""Layers are found in the program of a model, and what is taken out of them is exact."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import normal
from reference import assert_close, quick_jit

import hfjax
from hfjax._tracing import layers

nnx = pytest.importorskip("flax.nnx")
to_nnx = pytest.importorskip("hfjax.flax")


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    """Flax adds its biases so."""
    with jax.numpy_rank_promotion("allow"):
        yield


def read(model_fn, params, x, spoiled=None):
    return layers.read(model_fn, params, x[:1], spoiled or {})


def names(params):
    """Return leaves' paths in short: their last key, or all of it where they differ."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


def found(model, params):
    """Return kernels with their biases, and the reasons of the others, by name."""
    name = names(params)
    pairs = {
        name[layer.kernel]: None if layer.bias is None else name[layer.bias]
        for layer in model.layers
    }
    return pairs, {name[n]: why for n, why in model.others.items()}


def gradients(model_fn, params, x, weights):
    """Differentiate Σ outputs · weights by the parameters, as JAX does."""

    def total(params):
        outputs = jax.tree.leaves(model_fn(params, x[:1]))
        return sum(jnp.sum(z * w) for z, w in zip(outputs, weights, strict=True))

    return jax.tree.leaves(quick_jit(jax.grad(total))(params))


def inputs_of(rows, layer):
    """Return inputs, of an embedding rows of the identity, or zeros out of range."""
    if not layer.is_lookup:
        return np.asarray(rows)
    return np.asarray(jax.nn.one_hot(rows[:, 0], layer.inputs, dtype=float))


def check(model_fn, params, x):
    """Compare all that is taken out of a model with the derivative of the whole.

    Σ over positions of x gᵀ is the gradient by the kernel, and Σ g that by the bias.
    """
    model = read(model_fn, params, x)
    zeros = model.zeros()

    @quick_jit
    def run(params, x):
        outputs, transpose, taken = jax.vjp(
            lambda added: model.evaluate(params, x[:1], added), zeros, has_aux=True
        )
        leaves, structure = jax.tree.flatten(outputs)
        weights = [jnp.cos(1.0 + jnp.arange(z.size)).reshape(z.shape) for z in leaves]
        (derivatives,) = transpose(structure.unflatten(weights))
        rows = [model.rows(n, taken, derivatives) for n in range(len(model.uses))]
        return outputs, [x for x, _ in rows], [g for _, g in rows], weights

    outputs, rows, errors, weights = run(params, x)
    assert_close(outputs, model_fn(params, x[:1]), rtol=1e-12, atol=1e-14)
    truth = gradients(model_fn, params, x, weights)
    leaves = jax.tree.leaves(params)
    for layer in model.layers:
        kernel = leaves[layer.kernel]
        total = sum(
            inputs_of(rows[n], layer).swapaxes(-1, -2) @ np.asarray(errors[n])
            for n in layer.uses
        )
        for n in layer.flipped:
            total += np.asarray(errors[n]).swapaxes(-1, -2) @ np.asarray(rows[n])
        assert total.shape[-2:] == (layer.inputs, layer.units)
        assert total.size == layer.blocks * layer.inputs * layer.units
        total = layer.sides.kernel(total, kernel.shape)
        # The gradient of a parameter that is cast is rounded to its dtype.
        rtol = max(1e-9, float(jnp.finfo(kernel.dtype).eps))
        np.testing.assert_allclose(total, truth[layer.kernel], rtol=rtol, atol=1e-12)
        assert np.any(truth[layer.kernel])
        positions = sum(rows[n].shape[-2] for n in (*layer.uses, *layer.flipped))
        assert layer.positions(model.uses) == positions
        if layer.bias is not None:
            of_bias = sum(np.asarray(errors[n]).sum(axis=-2) for n in layer.uses)
            expected = truth[layer.bias]
            np.testing.assert_allclose(
                of_bias.reshape(expected.shape), expected, rtol=1e-9, atol=1e-12
            )
    for number, numbers in model.scalings.items():
        # Σ over positions of x g, or of g, is the gradient by a scale, or by a shift.
        total = sum(
            np.sum(errors[n] * (rows[n] if model.uses[n].how == "mul" else 1), axis=-2)
            for n in numbers
        )
        expected = truth[number]
        np.testing.assert_allclose(
            total.reshape(expected.shape), expected, rtol=1e-9, atol=1e-12
        )
    return model


RNG = np.random.default_rng(0)
X = normal(RNG, 3, 4)
SEQUENCE = normal(RNG, 3, 5, 4)
IMAGE = normal(RNG, 3, 6, 5, 2)
W, U, B = normal(RNG, 4, 3), normal(RNG, 3, 4), normal(RNG, 3)
SQUARE = normal(RNG, 4, 4, scale=0.5)


def scanned(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"].T + params["b"])
        return h, h @ params["out"]

    h, z = jax.lax.scan(step, jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1))
    return h, jnp.swapaxes(z, 0, 1)


def scanned_in_a_scan(params, x):
    def outer(h, _):
        def inner(h, x):
            return jnp.tanh(x @ params["w"] + h @ params["u"]), None

        return jax.lax.scan(inner, h, jnp.swapaxes(x, 0, 1), reverse=True)

    return jax.lax.scan(outer, jnp.zeros((len(x), 3)), None, length=2)[0]


def checkpointed(params, x):
    h = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]))(params, x)
    return h @ params["v"]


def jitted(params, x):
    layer = jax.jit(lambda w, b, x: jnp.tanh(x @ w + b))
    return jax.jit(lambda p, h: h @ p)(params["v"], layer(params["w"], params["b"], x))


def product_and_bias_in_two_programs(params, x):
    y = jax.jit(jnp.matmul)(x, params["w"])
    return jax.jit(lambda y, b: jnp.tanh(y + b))(y, params["b"])


def per_case(params, x):
    return jax.vmap(lambda x: jnp.tanh(params["w"] @ x + params["b"]))(x)


def convolved(params, x, **options):
    options = {
        "window_strides": (2, 1),
        "padding": ((1, 2), (0, 1)),
        "rhs_dilation": (1, 2),
        **options,
    }
    y = jax.lax.conv_general_dilated(
        x, params["k"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )
    return y + params["b"] if "b" in params else y


def channels_first(params, x):
    dimensions = ("NCHW", "HWIO", "NCHW")
    y = jax.lax.conv_general_dilated(
        jnp.moveaxis(x, 3, 1), params["k"], (1, 2), "SAME", dimension_numbers=dimensions
    )
    return jnp.tanh(y + params["b"][:, None, None])


def kernel_in_another_order(params, x):
    # Inputs lead in the parameter, and are in the middle of what is convolved.
    kernel = jnp.transpose(params["k"], (1, 0, 2, 3))
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def stacked(params, x):
    def layer(h, wb):
        return jnp.tanh(h @ wb["w"] + wb["b"]), None

    return jax.lax.scan(layer, x, params)[0]


def stacked_experts(params, x):
    """A stack of layers, each with a kernel for each of five experts, used twice."""

    def layer(h, wb):
        def step(h, _):
            z = jnp.einsum("nej,ejk->nek", h, wb["w"]) + wb["b"]
            return jnp.tanh(z), None

        return jax.lax.scan(step, h, None, length=2)[0], None

    return jax.lax.scan(layer, x, params)[0]


def norm(v, axis):
    """Return lengths, as constants: what the scales depend on is left out."""
    squares = jax.lax.stop_gradient(v) ** 2
    return jnp.sqrt(jnp.sum(squares, axis=axis, keepdims=True))


def gates(params, x):
    """A cell whose gates share two products, as in Flax's `OptimizedLSTMCell`."""

    def step(h, x):
        z = x @ jnp.concatenate([params["w"], params["v"]], axis=1)
        z += h @ jnp.concatenate([params["u"], params["r"]], axis=1)
        z += jnp.concatenate([params["b"], params["c"]])
        return jnp.tanh(z[:, :3]) * jnp.cos(z[:, 3:]), None

    return jax.lax.scan(step, jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1))[0]


def of_real_parts(params, x):
    """Products of complex inputs, with a complex kernel for each mode."""
    kernel = params["re"] + 1j * params["im"]
    z = jnp.einsum("ntd,tdk->ntk", jax.lax.complex(x, jnp.sin(x)), kernel)
    return jnp.concatenate([z.real, z.imag])


DENSE = {"w": W, "b": B}
SMALL = normal(RNG, 3, 3)
STACK = normal(RNG, 2, 4, 4)
EXPERTS = normal(RNG, 5, 4, 3)
CELL = {"w": W, "u": normal(RNG, 3, 3), "b": B, "out": normal(RNG, 3, 2)}
KERNEL = {"k": normal(RNG, 3, 2, 2, 3), "b": B}
FOUND = {
    "dense": (lambda p, x: x @ p["w"] + p["b"], DENSE, X, {"w": "b"}),
    "bias_first": (lambda p, x: p["b"] + x @ p["w"], DENSE, X, {"w": "b"}),
    "bias_of_two_axes": (
        lambda p, x: x @ p["w"] + p["b"].reshape(1, 3),
        DENSE,
        X,
        {"w": "b"},
    ),
    "no_bias": (lambda p, x: jnp.sin(x @ p["w"]), {"w": W}, X, {"w": None}),
    "transposed": (lambda p, x: x @ p["w"].T + p["b"], {"w": U, "b": B}, X, {"w": "b"}),
    "of_sequences": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]),
        DENSE,
        SEQUENCE,
        {"w": "b"},
    ),
    "inputs_of_two_axes": (
        lambda p, x: jnp.einsum("nij,ijk->nk", x, p["w"]) + p["b"],
        {"w": normal(RNG, 5, 4, 3), "b": B},
        SEQUENCE,
        {"w": "b"},
    ),
    "inputs_in_another_order": (
        lambda p, x: jnp.einsum("nij,jik->kn", x, p["w"]).T,
        {"w": normal(RNG, 4, 5, 3)},
        SEQUENCE,
        {"w": None},
    ),
    "units_of_two_axes": (
        lambda p, x: jnp.einsum("nj,abj->nba", x, p["w"]) ** 2,
        {"w": normal(RNG, 2, 3, 4)},
        X,
        {"w": None},
    ),
    "kernel_on_the_left": (per_case, {"w": U, "b": B}, X, {"w": "b"}),
    "one_unit": (
        lambda p, x: x @ p["w"] + p["b"],
        {"w": normal(RNG, 4, 1), "b": normal(RNG, 1)},
        X,
        {"w": "b"},
    ),
    "checkpoint": (
        checkpointed,
        {**DENSE, "v": normal(RNG, 3, 2)},
        X,
        {"w": "b", "v": None},
    ),
    "jit": (jitted, {**DENSE, "v": normal(RNG, 3, 2)}, X, {"w": "b", "v": None}),
    "two_programs": (product_and_bias_in_two_programs, DENSE, X, {"w": "b"}),
    "scan": (scanned, CELL, SEQUENCE, {"w": "b", "u": None, "out": None}),
    "scan_in_a_scan": (
        scanned_in_a_scan,
        {"w": W, "u": normal(RNG, 3, 3)},
        SEQUENCE,
        {"w": None, "u": None},
    ),
    "used_twice": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"],
        {"w": SQUARE, "b": normal(RNG, 4)},
        X,
        {"w": "b"},
    ),
    "two_products_one_bias": (
        lambda p, x: x @ p["w"] + jnp.sin(x) @ p["v"] + p["b"],
        {**DENSE, "v": normal(RNG, 4, 3)},
        X,
        {"w": None, "v": None},  # And one of them the bias.
    ),
    "cast": (
        lambda p, x: x @ p["w"].astype(float) + p["b"],
        {"w": W.astype(jnp.float32), "b": B},
        X,
        {"w": "b"},
    ),
    "convolution": (convolved, KERNEL, IMAGE, {"k": "b"}),
    "convolution_of_a_dilated_input": (
        functools.partial(convolved, lhs_dilation=(1, 2), window_strides=(2, 3)),
        {"k": KERNEL["k"]},
        IMAGE,
        {"k": None},
    ),
    "grouped": (
        functools.partial(convolved, feature_group_count=2),
        {"k": normal(RNG, 3, 2, 1, 4), "b": normal(RNG, 4)},
        IMAGE,
        {"k": "b"},
    ),
    "depthwise": (
        functools.partial(convolved, feature_group_count=2),
        {"k": normal(RNG, 3, 2, 1, 2)},
        IMAGE,
        {"k": None},
    ),
    "units_first_in_a_convolution": (
        lambda p, x: (
            jax.lax.conv_general_dilated(jnp.moveaxis(x, 3, 1), p["k"], (1, 1), "VALID")
            + p["b"]
        ),
        {"k": normal(RNG, 3, 2, 2, 2), "b": normal(RNG, 3, 1, 1)},
        IMAGE,
        {"k": "b"},
    ),
    "heads": (
        lambda p, x: jnp.einsum("ntd,dhk->nthk", x, p["w"]) + p["b"],
        {"w": normal(RNG, 4, 2, 3), "b": normal(RNG, 2, 3)},
        SEQUENCE,
        {"w": "b"},
    ),
    "heads_first": (
        lambda p, x: jnp.einsum("ntd,hdk->nhtk", x, p["w"]) + p["b"],
        {"w": normal(RNG, 2, 4, 3), "b": normal(RNG, 2, 1, 3)},
        SEQUENCE,
        {"w": "b"},
    ),
    "heads_joined": (
        lambda p, x: x @ p["w"].reshape(4, 6) + p["b"].reshape(6),
        {"w": normal(RNG, 4, 2, 3), "b": normal(RNG, 2, 3)},
        SEQUENCE,
        {"w": "b"},
    ),
    "heads_split_from_a_matrix": (
        lambda p, x: jnp.einsum("ntd,dhk->nthk", x, p["w"].reshape(4, 2, 3)),
        {"w": normal(RNG, 4, 6)},
        SEQUENCE,
        {"w": None},
    ),
    "output_of_heads": (
        lambda p, x: (
            jnp.einsum("ntd,dhk->nthk", x, p["w"]).reshape(len(x), 5, 6)
            @ p["o"].reshape(6, 3)
            + p["b"]
        ),
        {"w": normal(RNG, 4, 2, 3), "o": normal(RNG, 2, 3, 3), "b": B},
        SEQUENCE,
        {"w": None, "o": "b"},
    ),
    "inputs_in_the_middle": (
        lambda p, x: jnp.einsum("nj,ajk->nak", x, p["w"]),
        {"w": normal(RNG, 2, 4, 3)},
        X,
        {"w": None},
    ),
    "basis_functions_last": (  # As networks of Kolmogorov and Arnold are stored.
        lambda p, x: jnp.einsum("nig,oig->no", jnp.sin(x), p["w"]),
        {"w": normal(RNG, 3, 5, 4)},
        SEQUENCE,
        {"w": None},
    ),
    "experts": (
        lambda p, x: jnp.tanh(jnp.einsum("nej,ejk->nek", x, p["w"]) + p["b"]),
        {"w": normal(RNG, 5, 4, 3), "b": normal(RNG, 5, 3)},
        SEQUENCE,
        {"w": "b"},
    ),
    "experts_in_the_middle": (
        lambda p, x: jnp.einsum("nej,jek->nek", x, p["w"]),
        {"w": normal(RNG, 4, 5, 3)},
        SEQUENCE,
        {"w": None},
    ),
    "ensemble": (
        lambda p, x: jax.vmap(lambda w, b, v: jnp.tanh(x @ w + b) @ v, out_axes=1)(
            p["w"], p["b"], p["v"]
        ),
        {"w": normal(RNG, 2, 4, 3), "b": normal(RNG, 2, 3), "v": normal(RNG, 2, 3, 2)},
        X,
        {"w": "b", "v": None},
    ),
    "stacked": (
        stacked,
        {"w": normal(RNG, 3, 4, 4), "b": normal(RNG, 3, 4)},
        X,
        {"w": "b"},
    ),
    "stacked_and_checkpointed": (
        lambda p, x: jax.lax.scan(
            jax.checkpoint(lambda h, wb: (jnp.tanh(h @ wb[0].T + wb[1]), h)),
            x,
            (p["w"], p["b"]),
            reverse=True,
        )[0],
        {"w": normal(RNG, 3, 4, 4), "b": normal(RNG, 3, 4)},
        X,
        {"w": "b"},
    ),
    "stacked_experts_over_time": (
        stacked_experts,
        {"w": normal(RNG, 2, 5, 4, 4), "b": normal(RNG, 2, 5, 4)},
        SEQUENCE,
        {"w": "b"},
    ),
    "embedding": (
        lambda p, x: p["w"][jnp.abs(x).astype(int)] * 2.0,
        {"w": W},
        SEQUENCE,
        {"w": None},
    ),
    "embedding_of_single_indices": (  # As in Equinox: one `gather` takes both indices.
        lambda p, x: jax.vmap(jax.vmap(lambda t: p["w"][t]))(
            jnp.abs(x[..., 0]).astype(int)
        ),
        {"w": W},
        SEQUENCE,
        {"w": None},
    ),
    "embedding_out_of_range": (
        lambda p, x: jnp.take(p["w"], x.astype(int), 0, fill_value=0.0),
        {"w": W},
        2 * SEQUENCE,
        {"w": None},
    ),
    "embedding_clipped": (
        lambda p, x: jnp.tanh(jnp.take(p["w"], x.astype(int), 0, mode="clip") @ p["v"]),
        {"w": W, "v": U},
        2 * SEQUENCE,
        {"w": None, "v": None},
    ),
    "tied": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T,
        {"w": W},
        X,
        {"w": None},
    ),
    "tied_embedding": (
        lambda p, x: jnp.tanh(p["w"][jnp.abs(x).astype(int)]) @ p["w"].T,
        {"w": W},
        SEQUENCE,
        {"w": None},
    ),
    "tied_stack": (
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.sin(h @ w) @ w.T, None), x, p)[0],
        normal(RNG, 2, 4, 3),
        X,
        {"": None},
    ),
    "computed_with": (
        lambda p, x: x @ (2 * p["w"] / jnp.sqrt(4)) + p["b"],
        DENSE,
        X,
        {"w": "b"},
    ),
    "change_of_a_kernel": (
        lambda p, x: x @ (np.cos(W) - p["w"]) + p["b"],
        DENSE,
        X,
        {"w": "b"},
    ),
    "scaled_by_unit": (
        lambda p, x: x @ (p["w"] / norm(p["w"], 0) * jnp.arange(3.0)[None]),
        {"w": W},
        X,
        {"w": None},
    ),
    "scaled_by_input": (
        lambda p, x: x @ (p["w"] / norm(p["w"], 1)) + p["b"],
        DENSE,
        X,
        {"w": "b"},
    ),
    "scaled_and_reshaped": (
        lambda p, x: jnp.einsum(
            "ntd,dhk->nthk", x, (p["w"] / norm(p["w"], 0)).reshape(4, 2, 3)
        ),
        {"w": normal(RNG, 4, 6)},
        SEQUENCE,
        {"w": None},
    ),
    "scaled_experts": (
        lambda p, x: (
            jnp.einsum(
                "nej,ejk->nek", x, p["w"] * norm(p["w"], (1, 2)) / norm(p["w"], 1)
            )
            + 0
        ),
        {"w": EXPERTS},
        SEQUENCE,
        {"w": None},
    ),
    "scaled_in_a_loop": (
        lambda p, x: jax.lax.scan(
            lambda h, _: (jnp.sin(h @ (p["w"] / norm(p["w"], 0))), None), x, None, 2
        )[0],
        {"w": SQUARE},
        X,
        {"w": None},
    ),
    "scaled_stack": (
        lambda p, x: jax.lax.scan(
            lambda h, w: (jnp.sin(h @ (w / norm(w, 1))), None), x, p / norm(p, 1)
        )[0],
        STACK,
        X,
        {"": None},
    ),
    "scaled_convolution": (
        lambda p, x: convolved({"k": p["k"] / norm(p["k"], (0, 1, 2))}, x),
        {"k": KERNEL["k"]},
        IMAGE,
        {"k": None},
    ),
    "scaled_embedding": (
        lambda p, x: (
            (p["w"] / norm(p["w"], 0))[jnp.abs(x).astype(int)] @ (p["w"] / 3).T
        ),
        {"w": W},
        SEQUENCE,
        {"w": None},
    ),
    "concatenated": (
        gates,
        {"w": W, "v": normal(RNG, 4, 3), "u": SMALL, "r": SMALL.T, "b": B, "c": B},
        SEQUENCE,
        {"w": "b", "v": "c", "u": None, "r": None},
    ),
    "concatenated_along_inputs": (
        lambda p, x: (
            jnp.concatenate([jnp.cos(x), x], 1) @ jnp.concatenate([p["w"], p["u"].T])
        ),
        {"w": W, "u": U},
        X,
        {"w": None, "u": None},
    ),
    "concatenated_channels": (
        lambda p, x: convolved({"k": jnp.concatenate([p["k"], p["l"] * 2], 3)}, x),
        {"k": KERNEL["k"], "l": KERNEL["k"][..., :1]},
        IMAGE,
        {"k": None, "l": None},
    ),
    "concatenated_embeddings": (
        lambda p, x: jnp.concatenate([p["w"], p["v"]], 1)[jnp.abs(x).astype(int)],
        {"w": W, "v": SQUARE},
        SEQUENCE,
        {"w": None, "v": None},
    ),
    "stacked_kernels": (
        lambda p, x: (
            jnp.einsum("nj,ejk->enk", x, jnp.stack([p["w"], p["v"]]))
            + jnp.stack([p["b"], p["c"]])[:, None]
        ),
        {"w": W, "v": W, "b": B, "c": B},
        X,
        {"w": "b", "v": "c"},
    ),
    "kernels_stacked_for_a_loop": (
        lambda p, x: jax.lax.scan(
            lambda h, w: (jnp.tanh(h @ w), None), x, jnp.stack([p["w"], p["v"]])
        )[0],
        {"w": SQUARE, "v": SQUARE.T},
        X,
        {"w": None, "v": None},
    ),
    "complex_kernel": (
        of_real_parts,
        {"re": EXPERTS, "im": EXPERTS[::-1]},
        SEQUENCE,
        {"re": None, "im": None},
    ),
    "bias_of_the_second_of_two": (
        lambda p, x: (
            x @ jnp.concatenate([p["w"], p["v"]], 1)
            + jnp.concatenate([jnp.ones(3), p["b"]])
        ),
        {"w": W, "v": W, "b": B},
        X,
        {"w": None, "v": "b"},
    ),
    "branches": (
        lambda p, x: jax.lax.cond(
            x[0, 0] > 9,
            lambda w: jnp.tanh(x @ w + p["b"]),
            lambda w: x @ (w * 2) + p["b"],
            p["w"] / norm(p["w"], 1),
        ),
        DENSE,
        X,
        {"w": "b"},
    ),
    "branches_in_a_loop": (
        lambda p, x: jax.lax.fori_loop(
            0,
            3,
            lambda n, h: jax.lax.switch(
                n % 2, [lambda h: jnp.sin(h @ p["w"]), lambda h: h @ p["v"]], h
            ),
            x,
        ),
        {"w": SQUARE, "v": SQUARE.T},
        X,
        {"w": None, "v": None},
    ),
    "loop_of_fixed_length": (
        lambda p, x: jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p), x),
        SQUARE,
        X,
        {"": None},
    ),
    "channels_first": (channels_first, KERNEL, IMAGE, {"k": "b"}),
    "kernel_in_another_order": (
        kernel_in_another_order,
        {"k": normal(RNG, 2, 3, 2, 3)},
        IMAGE,
        {"k": None},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_layers_are_found_and_make_up_the_gradient_of_a_case(name):
    model_fn, params, x, pairs = FOUND[name]
    model = check(model_fn, params, x)
    ours, others = found(model, params)
    assert others == {}
    if name == "two_products_one_bias":
        assert sorted(map(str, ours.values())) == ["None", "b"]
        assert ours.keys() == pairs.keys()
    else:
        assert ours == pairs


@pytest.mark.parametrize("name", ["dense", "checkpoint", "scan", "convolution"])
def test_adding_zeros_leaves_the_outputs_bit_by_bit(name):
    model_fn, params, x, _ = FOUND[name]
    model = read(model_fn, params, x)
    ours = quick_jit(lambda p, x: model.evaluate(p, x, model.zeros())[0])(params, x[:1])
    theirs = quick_jit(model_fn)(params, x[:1])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_is_taken_out_times_the_kernel_is_what_comes_out():
    for name in ("dense", "inputs_of_two_axes", "inputs_in_another_order"):
        model_fn, params, x, _ = FOUND[name]
        model = read(model_fn, params, x)
        outputs, taken = model.evaluate(params, x[:1], model.zeros())
        rows, _ = model.rows(0, taken, model.zeros())
        product = rows @ params["w"].reshape(-1, 3)
        truth = outputs - params.get("b", 0)
        np.testing.assert_allclose(product, truth, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": None},
        {"padding": "VALID", "rhs_dilation": (2, 1)},
        {"lhs_dilation": (2, 3)},
        {"padding": ((-1, 2), (0, 3))},
    ],
)
def test_patches_times_the_kernel_are_the_convolution(options):
    params = {"k": KERNEL["k"]}
    model_fn = functools.partial(convolved, **options)
    model = read(model_fn, params, IMAGE)
    outputs, taken = model.evaluate(params, IMAGE[:1], model.zeros())
    rows, _ = model.rows(0, taken, model.zeros())
    product = (rows @ params["k"].reshape(-1, 3)).reshape(outputs.shape)
    np.testing.assert_allclose(product, outputs, rtol=1e-9, atol=1e-12)
    # Rows, columns and channels, as in the kernel: a window with an edge in it, by hand.
    if not options:
        padded = np.pad(np.asarray(IMAGE[0]), ((1, 2), (0, 1), (0, 0)))
        window = padded[2:5, 1:4:2].ravel()  # Second row of outputs, second column.
        np.testing.assert_array_equal(rows[outputs.shape[2] + 1], window)


def while_loop(params, x):
    def body(carry):
        k, h = carry
        return k + 1, jnp.tanh(h @ params["w"])

    return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]


def carried(params, x):
    def step(carry, _):
        w, h = carry
        return (0.5 * w, jnp.tanh(h @ w)), None

    return jax.lax.scan(step, (params["w"], x), None, length=2)[0][1]


def normalised(params, x):
    y = x @ params["w"]
    y = (y - y.mean(-1, keepdims=True)) / y.std(-1, keepdims=True)
    return y * params["scale"] + params["shift"]


OTHERS = {
    "norm": (
        normalised,
        {"w": W, "scale": B, "shift": B},
        X,
        {"scale": "`mul` uses it", "shift": "`add` uses it"},
    ),
    "carried": (
        carried,
        {"w": SQUARE},
        X,
        {"w": "a `scan` carries it"},
    ),
    "scale_broadcast": (  # As Flax normalises: a row of scales times a column.
        lambda p, x: x @ p["w"] * (jnp.mean(x, -1, keepdims=True) * p["scale"][None]),
        {"w": W, "scale": B},
        X,
        {"scale": "`mul` uses it"},
    ),
    "places_and_a_gain": (
        lambda p, x: jnp.tanh((x + p["place"]) @ p["w"] * (1 + p["gain"])) + p["gain"],
        {"w": W, "place": normal(RNG, 5, 4), "gain": jnp.asarray(0.7)},
        SEQUENCE,
        {"place": "`add` uses it", "gain": "`mul` uses it"},
    ),
    "while": (while_loop, {"w": SQUARE}, X, {"w": "`while` uses it"}),
    "scaled_entry_by_entry": (
        lambda p, x: x @ (p["w"] * np.cos(W)),
        {"w": W},
        X,
        {"w": "it is scaled first"},
    ),
    "squared": (
        lambda p, x: x @ (p["w"] * p["w"]),
        {"w": W},
        X,
        {"w": "`mul` uses it"},
    ),
    "symmetric": (
        lambda p, x: x @ (p["w"] + p["w"].T),
        {"w": SQUARE},
        X,
        {"w": "`add` uses it"},
    ),
    "scaled_bias": (
        lambda p, x: x @ p["w"] + 2 * p["b"],
        DENSE,
        X,
        {"b": "it is scaled first"},
    ),
    "part_of_a_concatenated_array": (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]]).reshape(2, 4, 3)[0],
        {"w": W, "v": W},
        X,
        {"w": "`reshape` uses it", "v": "`reshape` uses it"},
    ),
    "learned_scales_of_one_input": (
        lambda p, x: x[:, :1] @ (p["w"] * p["gain"][None]),
        {"w": W[:1], "gain": B},
        X,
        {"gain": "`mul` uses it"},
    ),
    "concatenated_scales": (
        lambda p, x: jnp.sin(x) * jnp.concatenate([p["one"], p["rest"]]),
        {"one": B[:1], "rest": B},
        X,
        {"one": "`mul` uses it", "rest": "`mul` uses it"},
    ),
    "concatenated_channels_of_inputs": (
        lambda p, x: convolved({"k": jnp.concatenate([p["k"], p["l"]], 2)}, x),
        {"k": KERNEL["k"][:, :, :1], "l": KERNEL["k"][:, :, 1:]},
        IMAGE,
        {
            "k": "`conv_general_dilated` uses it",
            "l": "`conv_general_dilated` uses it",
        },
    ),
    "concatenated_rows_of_an_embedding": (
        lambda p, x: jnp.concatenate([W, p["w"]])[jnp.abs(x).astype(int)],
        {"w": W},
        4 * SEQUENCE,
        {"w": "`gather` uses it"},
    ),
    "inputs_from_a_parameter": (
        lambda p, x: x + (2 * p["q"]) @ p["w"],
        {"q": X[:1], "w": SQUARE},
        X,
        {"q": "it is scaled first"},
    ),
    "returned_by_a_branch": (
        lambda p, x: x @ jax.lax.cond(p["b"][0] > 0, lambda w: w, jnp.sin, p["w"]),
        DENSE,
        X,
        {"w": "a `cond` returns it", "b": "`slice` uses it"},
    ),
    "learned_scales": (
        lambda p, x: (x @ (p["w"] * p["gain"]) + p["b"]) * jnp.exp(p["gain"][0]),
        {**DENSE, "gain": B + 2},
        X,
        {
            "b": "it is added to no product that lacks a bias",
            "gain": "`mul` uses it",
        },
    ),
    "scale_of_one_step": (  # A scale for each step, but one kernel for all of them.
        lambda p, x: jax.lax.scan(
            lambda h, g: (jnp.sin(h @ (g * p["w"])), None), x, p["gain"]
        )[0],
        {"w": SQUARE, "gain": normal(RNG, 3)},
        X,
        {"w": "`mul` uses it", "gain": "`mul` uses it"},
    ),
    "also_computed_with": (
        lambda p, x: (x @ p["w"]) * jnp.sum(p["w"]),
        {"w": W},
        X,
        {"w": "`reduce_sum` uses it"},
    ),
    "part_of_a_kernel": (
        lambda p, x: x @ p["w"][:, :2],
        {"w": W},
        X,
        {"w": "`slice` uses it"},
    ),
    "two_parameters": (
        lambda p, x: x @ (p["w"] @ p["v"]),
        {"w": W, "v": U},
        X,
        {"w": "`dot_general` uses it", "v": "`dot_general` uses it"},
    ),
    "shared_bias": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["u"] + p["b"],
        {"w": W, "u": normal(RNG, 3, 3), "b": B},
        X,
        {"b": "several kernels share it"},
    ),
    "bias_of_some_uses": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"],
        {"w": SQUARE, "b": normal(RNG, 4)},
        X,
        {"b": "its kernel is used without it"},
    ),
    "two_biases_of_one_kernel": (
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["c"],
        {"w": SQUARE, "b": normal(RNG, 4), "c": normal(RNG, 4)},
        X,
        {"b": "its kernel is used without it", "c": "its kernel is used without it"},
    ),
    "bias_of_another_kernel": (  # Of one that is no layer's.
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) * jnp.sum(p["w"]),
        {"w": W, "b": B},
        X,
        {"w": "`reduce_sum` uses it", "b": "its kernel has no factors"},
    ),
    "bias_of_a_tied_kernel": (
        lambda p, x: (lambda h: h * h @ p["w"].T)(x @ p["w"] + p["b"]),
        {"w": W, "b": B},
        X,
        {"b": "its kernel is used without it"},
    ),
    "used_in_two_ways": (
        lambda p, x: x @ p["w"] + jnp.sin(jnp.einsum("nj,jk->njk", x, p["w"])).sum(1),
        {"w": W},
        X,
        {"w": "it is used in two ways"},
    ),
    "second_bias": (
        lambda p, x: x @ p["w"] + p["b"] + p["c"],
        {"w": W, "b": B, "c": B},
        X,
        {"c": "it is added to no product that lacks a bias"},
    ),
    "subtracted": (
        lambda p, x: x @ p["w"] - p["b"],
        {"w": W, "b": B},
        X,
        {"b": "`sub` uses it"},
    ),
    "bias_along_positions": (  # As many steps as units: which axis it is along counts.
        lambda p, x: x @ p["w"] + p["b"][:, None],
        {"w": normal(RNG, 4, 5), "b": normal(RNG, 5)},
        SEQUENCE,
        {"b": "it is added to no product that lacks a bias"},
    ),
    "product_used_beside_the_bias": (  # Its derivative is not that of what is added.
        lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) + (x @ p["w"] + 0),
        {"w": W, "b": B},
        X,
        {"b": "its kernel is used without it"},
    ),
    "unused": (lambda p, x: x @ p["w"], DENSE, X, {"b": "the model does not read it"}),
    "returned": (
        lambda p, x: (x @ p["w"], p["w"][None]),
        {"w": W},
        X,
        {"w": "the model returns it"},
    ),
    "broadcast": (
        lambda p, x: x @ jnp.broadcast_to(p["w"], (4, 3)),
        {"w": normal(RNG, 1, 3)},
        X,
        {"w": "`broadcast_in_dim` uses it"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_layer_says_why(name):
    model_fn, params, x, reasons = OTHERS[name]
    # Layers beside it are exact all the same; JAX has no derivative of a `while`.
    model = (read if name == "while" else check)(model_fn, params, x)
    assert found(model, params)[1] == reasons


@pytest.mark.parametrize(
    "model_fn",
    [
        lambda p, x: (lambda y: jnp.tanh(y + p["b"]) + y)(x @ p["w"]),
        lambda p, x: (lambda y: (y + y) + p["b"])(x @ p["w"]),
        lambda p, x: (lambda y: jnp.tanh(y + (y + p["b"])))(x @ p["w"]),
        lambda p, x: (lambda y: (jax.jit(jnp.add)(y, p["b"]), y))(x @ p["w"]),
    ],
    ids=["skip", "doubled", "again", "returned"],
)
def test_a_product_that_is_used_without_its_bias_too_has_none(model_fn):
    # What comes back to the product is not what comes back to the bias then.
    model = check(model_fn, DENSE, X)
    assert [layer.bias for layer in model.layers] == [None]
    assert found(model, DENSE)[1].keys() == {"b"}


def test_a_model_that_prints_has_the_layers_that_it_has_without():
    rng = np.random.default_rng(5)
    params, x = {"w": normal(rng, 3, 2), "b": normal(rng, 2)}, normal(rng, 4, 3)

    def model_fn(params, x):
        z = x @ params["w"]
        jax.debug.callback(lambda *_: None, z, params["w"], params["b"])
        return z + params["b"]

    assert found(read(model_fn, params, x), params) == ({"w": "b"}, {})
    factors = hfjax.preconditioners.kronecker()
    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    tx = hfjax.hessian_free(objective, preconditioner=factors)
    batch = (x, normal(rng, 4, 2))
    _, grads = objective.value_and_grad(params, batch)
    _, state = quick_jit(tx.update)(grads, tx.init(params), params, batch=batch)
    assert state.info.accepted


def test_parameters_that_are_spoiled_beforehand_are_left_out_with_their_reason():
    model = read(lambda p, x: x @ p["w"] + p["b"], DENSE, X, {1: "too large"})
    assert found(model, DENSE) == (
        {},
        {"b": "its kernel has no factors", "w": "too large"},
    )


class LinenNetwork(nn.Module):
    """A convolution, a recurrent layer over rows, a dense one."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (3, 2), strides=2, param_dtype=float)(x))
        x = nn.RNN(nn.GRUCell(3, param_dtype=float))(x.reshape(*x.shape[:2], -1))
        return nn.Dense(2, param_dtype=float)(x[:, -1])


@pytest.mark.slow
def test_layers_of_linen_are_found():
    module = LinenNetwork()
    params = module.init(jax.random.key(0), IMAGE)
    model = check(module.apply, params, IMAGE)
    pairs, others = found(model, params)
    assert others == {}
    cell = "params.GRUCell_0"
    assert pairs == {
        "params.Conv_0.kernel": "params.Conv_0.bias",
        "params.Dense_0.kernel": "params.Dense_0.bias",
        f"{cell}.hn.kernel": f"{cell}.hn.bias",
        **{
            f"{cell}.{gate}.kernel": f"{cell}.{gate}.bias"
            for gate in ("ir", "iz", "in")
        },
        **{f"{cell}.{gate}.kernel": None for gate in ("hr", "hz")},
    }


@pytest.mark.slow
def test_layers_of_nnx_are_found():
    rngs = nnx.Rngs(0)
    module = nnx.Sequential(
        nnx.Conv(2, 3, (3, 2), strides=2, param_dtype=float, rngs=rngs),
        nnx.tanh,
        lambda x: x.reshape(*x.shape[:2], -1),
        nnx.RNN(
            nnx.SimpleCell(9, 4, dtype=float, param_dtype=float, rngs=rngs), rngs=rngs
        ),
        nnx.LayerNorm(4, param_dtype=float, rngs=rngs),
        nnx.Linear(4, 2, param_dtype=float, rngs=rngs),
    )
    params = nnx.state(module, nnx.Param)
    model = check(to_nnx.nnx_model_fn(module), params, IMAGE)
    pairs, others = found(model, params)
    kernels = {name for name in names(params) if "kernel" in name}
    assert pairs.keys() == kernels
    assert len(kernels) == 4
    assert sorted(name.split(".")[-2] for name in others) == ["bias", "scale"]
    with_bias = [kernel for kernel, bias in pairs.items() if bias is not None]
    assert len(with_bias) == 3  # A simple cell has one for both of its kernels.


def test_layers_are_told_by_their_paths():
    objective = hfjax.Objective(
        lambda p, x: scanned(p, x)[1] * p["gain"], hfjax.losses.squared_error()
    )
    params = {**CELL, "gain": normal(RNG, 2)}
    given = (objective, params, (SEQUENCE, jnp.zeros((3, 5, 2))))
    lines = hfjax.preconditioners.layers(*given)
    assert lines == {
        "['b']": "bias of ['w']",
        "['gain']": "diagonal: `mul` uses it",
        "['out']": "factors of 3 inputs and 2 units, at 5 positions",
        "['u']": "factors of 3 inputs and 3 units, at 5 positions",
        "['w']": "factors of 4 + 1 inputs and 3 units, at 5 positions",
    }
    lines = hfjax.preconditioners.layers(*given, max_size=3)
    assert lines["['w']"] == "diagonal: a side is longer than 3"
