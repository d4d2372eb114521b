"""The table of layers in `docs/models.md` is what `preconditioners.layers` says."""

import pathlib
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hfjax
from hfjax.flax import nnx_model_fn

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "models.md").read_text()
KEY = jax.random.key(0)
ROWS, ROW, IMAGE = (
    np.ones(shape, np.float32) for shape in ((2, 3, 4), (2, 4), (2, 5, 5, 4))
)
TOKENS = np.zeros((2, 3), np.int32)


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Float32, and biases that are added as Flax and Equinox add them."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


def told(model_fn, params, x):
    """Return what the parameters get, in the words of the page."""
    x = jnp.asarray(x)
    outputs = jax.eval_shape(model_fn, params, x)
    targets = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), outputs)
    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    lines = hfjax.preconditioners.layers(objective, params, (x, targets)).values()
    found = {re.sub(r"\d+ blocks with factors", "blocks", line) for line in lines}
    kinds = {line.split()[0].strip(":") for line in found} - {"bias"}
    # A bias that is shared, or of no layer, is told beside the kernels.
    (kind,) = kinds - {"diagonal"} or kinds
    return kind


def linen(module, x, *args):
    params = module.init(KEY, x, *args)
    return told(lambda p, x: module.apply(p, x, *args), params, x)


def of_nnx(module, x, call=None, wrt=nnx.Param):
    fn = nnx_model_fn(module, call=call, wrt=wrt)
    return told(fn, nnx.state(module, wrt), x)


def equinox(module, x, call=lambda module, x: module(x)):
    params, rest = eqx.partition(module, eqx.is_inexact_array)
    return told(
        lambda p, x: jax.vmap(lambda x: call(eqx.combine(p, rest), x))(x), params, x
    )


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x):
            return nn.tanh(module(x)), None

        scan = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(nn.Dense(4), x)[0]


class LinenTied(nn.Module):
    @nn.compact
    def __call__(self, t):
        embed = nn.Embed(7, 4)
        return embed.attend(nn.tanh(embed(t)))


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 4, 4))
        return jnp.einsum("net,etk->nek", x, kernel)


class LinenModes(nn.Module):
    @nn.compact
    def __call__(self, x):
        re, im = (self.param(k, nn.initializers.normal(), (3, 4, 4)) for k in "ri")
        return modes(x, re, im)


def modes(x, re, im):
    """Multiply what `rfft` gives, mode by mode, as a Fourier layer does."""
    x = jnp.fft.rfft(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, 2), (0, 0)]), axis=-2)
    y = jnp.einsum("...mj,mjk->...mk", x, re + 1j * im)
    return jnp.fft.irfft(y, axis=-2)


def nnx_stack():
    @nnx.vmap(axis_size=3)
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    return stack(jax.random.split(KEY, 3))


def scan_nnx(module, x):
    graph, params = nnx.split(module)

    def layer(x, params):
        return jnp.tanh(nnx.merge(graph, params)(x)), None

    return jax.lax.scan(layer, x, params)[0]


class NnxExperts(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((3, 4, 4)))

    def __call__(self, x):
        return jnp.einsum("net,etk->nek", x, self.kernel[...])


def eqx_stack():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))
    return layers(jax.random.split(KEY, 3))


def scan_eqx(module, x):
    params, rest = eqx.partition(module, eqx.is_inexact_array)

    def layer(x, params):
        return jnp.tanh(eqx.combine(params, rest)(x)), None

    return jax.lax.scan(layer, x, params)[0]


class NnxModes(nnx.Module):
    def __init__(self):
        self.re, self.im = (
            nnx.Param(jnp.ones((3, 4, 4))),
            nnx.Param(jnp.ones((3, 4, 4))),
        )

    def __call__(self, x):
        return modes(x, self.re[...], self.im[...])


class EqxModes(eqx.Module):
    re: jax.Array
    im: jax.Array

    def __call__(self, x):
        return modes(x, self.re, self.im)


class EqxExperts(eqx.Module):
    kernel: jax.Array

    def __call__(self, x):
        return jnp.einsum("et,etk->ek", x, self.kernel)


def recurrent_nnx(cell):
    return nnx.RNN(cell, rngs=nnx.Rngs(0))


def recurrent_eqx(cell, x):
    def step(state, x):
        return cell(x, state), None

    hidden = jnp.zeros(4)
    is_lstm = isinstance(cell, eqx.nn.LSTMCell)
    state, _ = jax.lax.scan(step, (hidden, hidden) if is_lstm else hidden, x)
    return state


def first(x):
    return np.moveaxis(x, -1, 1)


KINDS = {
    "dense": (
        lambda: linen(nn.Dense(3), ROWS),
        lambda: of_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), ROWS),
        lambda: equinox(eqx.nn.Linear(4, 3, key=KEY), ROW),
    ),
    "dense, several axes": (
        lambda: linen(nn.DenseGeneral((2, 3)), ROWS),
        lambda: of_nnx(nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0)), ROWS),
        None,
    ),
    "convolution": (
        lambda: linen(nn.Conv(3, (3, 2), strides=2), IMAGE),
        lambda: of_nnx(nnx.Conv(4, 3, (3, 2), strides=2, rngs=nnx.Rngs(0)), IMAGE),
        lambda: equinox(eqx.nn.Conv2d(4, 3, 3, key=KEY), first(IMAGE)),
    ),
    "convolution with groups": (
        lambda: linen(nn.Conv(4, (3, 3), feature_group_count=2), IMAGE),
        lambda: of_nnx(
            nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)), IMAGE
        ),
        lambda: equinox(eqx.nn.Conv2d(4, 4, 3, groups=2, key=KEY), first(IMAGE)),
    ),
    "transposed convolution": (
        lambda: linen(nn.ConvTranspose(3, (2, 2)), IMAGE),
        lambda: of_nnx(nnx.ConvTranspose(4, 3, (2, 2), rngs=nnx.Rngs(0)), IMAGE),
        lambda: equinox(eqx.nn.ConvTranspose2d(4, 3, 2, key=KEY), first(IMAGE)),
    ),
    "multi-head attention": (
        lambda: linen(nn.MultiHeadDotProductAttention(num_heads=2), ROWS),
        lambda: of_nnx(
            nnx.MultiHeadAttention(2, in_features=4, decode=False, rngs=nnx.Rngs(0)),
            ROWS,
        ),
        lambda: equinox(
            eqx.nn.MultiheadAttention(2, 4, key=KEY), ROWS, lambda m, x: m(x, x, x)
        ),
    ),
    "embedding": (
        lambda: linen(nn.Embed(7, 4), TOKENS),
        lambda: of_nnx(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), TOKENS),
        lambda: equinox(
            eqx.nn.Embedding(7, 4, key=KEY), TOKENS, lambda m, t: jax.vmap(m)(t)
        ),
    ),
    "embedding, also the last layer": (
        lambda: linen(LinenTied(), TOKENS),
        lambda: of_nnx(
            nnx.Embed(7, 4, rngs=nnx.Rngs(0)),
            TOKENS,
            lambda m, t: m.attend(jnp.tanh(m(t))),
        ),
        lambda: equinox(
            eqx.nn.Embedding(7, 4, key=KEY),
            TOKENS,
            lambda m, t: jnp.tanh(jax.vmap(m)(t)) @ m.weight.T,
        ),
    ),
    "layer normalisation": (
        lambda: linen(nn.LayerNorm(), ROWS),
        lambda: of_nnx(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), ROWS),
        lambda: equinox(eqx.nn.LayerNorm(4), ROW),
    ),
    "LSTM cell": (
        lambda: linen(nn.RNN(nn.LSTMCell(4)), ROWS),
        lambda: of_nnx(recurrent_nnx(nnx.LSTMCell(4, 4, rngs=nnx.Rngs(0))), ROWS),
        lambda: equinox(eqx.nn.LSTMCell(4, 4, key=KEY), ROWS, recurrent_eqx),
    ),
    "LSTM cell, optimised": (
        lambda: linen(nn.RNN(nn.OptimizedLSTMCell(4)), ROWS),
        lambda: of_nnx(
            recurrent_nnx(nnx.OptimizedLSTMCell(4, 4, rngs=nnx.Rngs(0))), ROWS
        ),
        None,
    ),
    "GRU cell": (
        lambda: linen(nn.RNN(nn.GRUCell(4)), ROWS),
        lambda: of_nnx(recurrent_nnx(nnx.GRUCell(4, 4, rngs=nnx.Rngs(0))), ROWS),
        lambda: equinox(eqx.nn.GRUCell(4, 4, key=KEY), ROWS, recurrent_eqx),
    ),
    "stack of layers in a scan": (
        lambda: linen(LinenStack(), ROW),
        lambda: of_nnx(nnx_stack(), ROW, scan_nnx),
        lambda: equinox(eqx_stack(), ROW, scan_eqx),
    ),
    "mixture of experts, by `einsum`": (
        lambda: linen(LinenExperts(), ROWS),
        lambda: of_nnx(NnxExperts(), ROWS),
        lambda: equinox(EqxExperts(jnp.ones((3, 4, 4))), ROWS),
    ),
    "Fourier layer (FNO)": (
        lambda: linen(LinenModes(), ROWS),
        lambda: of_nnx(NnxModes(), ROWS),
        lambda: equinox(EqxModes(jnp.ones((3, 4, 4)), jnp.ones((3, 4, 4))), ROWS),
    ),
    "low-rank adapter (LoRA)": (
        lambda: linen(nn.Sequential([nn.Dense(2, use_bias=False), nn.Dense(3)]), ROW),
        lambda: of_nnx(
            nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)), ROW, wrt=nnx.LoRAParam
        ),
        None,
    ),
    "weight normalisation": (
        lambda: linen(nn.WeightNorm(nn.Dense(3)), ROW),
        lambda: of_nnx(
            nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
            ROW,
        ),
        lambda: equinox(eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=KEY)), ROW),
    ),
}


def test_the_page_has_every_layer():
    table = PAGE[PAGE.index("| layer |") :].split("\n\n")[0]
    assert re.findall(r"^\| (.*?) \|", table, re.MULTILINE) == ["layer", *KINDS]


@pytest.mark.parametrize("name", KINDS)
def test_layers_get_what_the_page_says(name):
    (row,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", PAGE, re.MULTILINE)
    said = [cell.strip() for cell in row.split("|")]
    assert [make() if make else "" for make in KINDS[name]] == said
