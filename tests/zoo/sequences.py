"""Networks for sequences: transformers, recurrent cells, experts, adapters."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from problems import normal
from zoo.specimen import (
    KEY,
    Specimen,
    equinox,
    half_squares,
    linen,
    nnx_module,
    of_labels,
    spread,
    summed_over_labels,
)

import hfjax
from hfjax.flax import nnx_model_fn

LABELLED = hfjax.losses.softmax_cross_entropy_with_integer_labels()
TOKENS = jnp.array([[1, 4, 2, 5], [3, 0, 0, 6], [2, 2, 1, 0]])
LENGTHS = jnp.array([4, 2, 3])
WITHIN = (jnp.arange(4)[None] < LENGTHS[:, None]).astype(float)
"""Weights of positions: 0 for padding."""


class Tagger(nn.Module):
    """Masked attention of two heads, as Flax's `nlp_seq`."""

    @nn.compact
    def __call__(self, inputs):
        tokens, lengths = inputs
        within = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        x = nn.Embed(7, 4, name="embed")(tokens)
        places = self.param("places", nn.initializers.normal(), (1, 4, 4))
        x = x + places
        mask = nn.make_attention_mask(within, within)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = nn.LayerNorm(name="norm")(x + attention(x, mask=mask))
        return nn.Dense(3, name="out")(x)


def tagger():
    model_fn, params = linen(Tagger(), (TOKENS, LENGTHS))
    tags = jnp.where(WITHIN > 0, (TOKENS * 2) % 3, -100)
    batch = ((TOKENS, LENGTHS), tags, WITHIN * jnp.array([[1.0, 0.5, 2.0, 1.0]]))
    return Specimen(model_fn, LABELLED, of_labels, params, batch)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        return (1 + scale) * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


class Einsum(nn.Module):
    shape: tuple

    @nn.compact
    def __call__(self, how, x):
        w = self.param("w", nn.initializers.normal(0.5), self.shape)
        return jnp.einsum(how, x, w)


def rotated(x):
    """Return x with its pairs of entries turned by the position (RoPE)."""
    places, half = jnp.arange(x.shape[1]), x.shape[-1] // 2
    angles = places[:, None] / 100.0 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[None, :, None], jnp.cos(angles)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Gemma(nn.Module):
    """A block of Gemma: two heads for queries, one for keys and values; tied ends."""

    @nn.compact
    def __call__(self, tokens):
        embedding = self.param("embedding", nn.initializers.normal(), (7, 4))
        x = embedding[tokens] * 4**0.5
        y = RMSNorm(name="before")(x)
        q = rotated(Einsum((2, 4, 4), name="q")("btd,ndh->btnh", y))
        k, v = Einsum((2, 1, 4, 4), name="kv")("bsd,ckdh->cbskh", y)
        q = q.reshape(*q.shape[:2], 1, 2, 4) / 2
        scores = jnp.einsum("btkgh,bskh->bkgts", q, rotated(k))
        earlier = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        scores = jnp.where(earlier, scores, -1e30)
        y = jnp.einsum("bkgts,bskh->btkgh", nn.softmax(scores), v)
        y = y.reshape(*x.shape[:2], 2, 4)
        x = x + Einsum((2, 4, 4), name="out")("btnh,nhd->btd", y)
        y = RMSNorm(name="between")(x)
        gate, up = Einsum((2, 4, 3), name="gating")("btd,cdf->cbtf", y)
        x = x + Einsum((3, 4), name="down")("btf,fd->btd", nn.gelu(gate) * up)
        return RMSNorm(name="after")(x) @ embedding.T


def gemma():
    model_fn, params = linen(Gemma(), TOKENS[:, :3])
    batch = (TOKENS[:, :3], TOKENS[:, 1:])
    return Specimen(model_fn, LABELLED, summed_over_labels, params, batch, damping=3.0)


class Seq2Seq(nn.Module):
    """An LSTM reads a sequence of some length, and another goes on from its state.

    The kernels of the first one's gates are concatenated.
    """

    @nn.compact
    def __call__(self, inputs):
        source, lengths, target = inputs
        cell = nn.OptimizedLSTMCell(3, param_dtype=float, name="encoder")
        encoder = nn.RNN(cell, return_carry=True)
        carry, _ = encoder(jax.nn.one_hot(source, 3), seq_lengths=lengths)
        decoder = nn.RNN(nn.LSTMCell(3, param_dtype=float, name="decoder"))
        states = decoder(jax.nn.one_hot(target, 3), initial_carry=carry)
        return nn.Dense(3, name="out")(states)


def seq2seq():
    source, target = TOKENS % 3, TOKENS[:, ::-1] % 3
    inputs = (source, LENGTHS, target)
    model_fn, params = linen(Seq2Seq(), inputs)
    after = jnp.roll(target, -1, axis=1)
    return Specimen(model_fn, LABELLED, of_labels, params, (inputs, after, WITHIN))


class Classifier(eqx.Module):
    """As Equinox's `train_rnn`, whose model ends in a sigmoid."""

    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear

    def __call__(self, x):
        def step(state, x):
            return self.cell(x, state), None

        state, _ = jax.lax.scan(step, jnp.zeros(4), x)
        return jax.nn.sigmoid(self.linear(state))


def of_probabilities(p, t):
    return -(t * jnp.log(p) + (1 - t) * jnp.log(1 - p))


def gru():
    params, rest = equinox(
        lambda: Classifier(eqx.nn.GRUCell(2, 4, key=KEY), eqx.nn.Linear(4, 1, key=KEY))
    )

    def model_fn(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)[:, 0]

    x = normal(np.random.default_rng(3), 3, 4, 2)
    batch = (x, jnp.array([1.0, 0.0, 1.0]))
    return Specimen(model_fn, of_probabilities, of_probabilities, params, batch)


class Experts(nn.Module):
    """Each token goes to two of three experts, whose kernels are stacked."""

    @nn.compact
    def __call__(self, x):
        logits = nn.Dense(3, use_bias=False, name="router")(x)
        best, chosen = jax.lax.top_k(logits, 2)
        sent = jax.nn.one_hot(chosen, 3)
        shares = jnp.einsum("btk,btke->ebt", nn.softmax(best), sent)
        up = self.param("up", nn.initializers.normal(0.5), (3, 4, 5))
        down = self.param("down", nn.initializers.normal(0.5), (3, 5, 3))
        x = jnp.einsum("btke,btd->ebtd", sent, x)
        h = nn.gelu(jnp.einsum("ebtd,edf->ebtf", x, up))
        y = jnp.einsum("ebtf,efd->ebtd", h, down)
        return jnp.einsum("ebt,ebtd->btd", shares, y)


def experts():
    x = normal(np.random.default_rng(4), 3, 4, 4)
    model_fn, params = linen(Experts(), x)
    batch = (x, TOKENS % 3)
    return Specimen(
        model_fn, LABELLED, summed_over_labels, params, batch, damping=3.0, routed=True
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.LayerNorm(name="before")(x))
        y = nn.gelu(nn.Dense(3, name="up")(nn.LayerNorm(name="between")(x)))
        return x + nn.Dense(4, name="down")(y)


class Scanned(nn.Module):
    """Two blocks in a scan, each computed again for the gradient."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            lambda block, x: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = stack(nn.remat(Block)(name="blocks"), x)
        return nn.Dense(2, name="head")(jnp.mean(x, axis=1))


def scanned():
    rng = np.random.default_rng(5)
    x, t = normal(rng, 3, 3, 4), normal(rng, 3, 2)
    model_fn, params = linen(Scanned(), x)
    loss = hfjax.losses.squared_error()
    return Specimen(model_fn, loss, half_squares, params, (x, t))


class Adapted(nnx.Module):
    """Two dense layers that stay as they are, with adapters of rank 2."""

    def __init__(self, rngs):
        self.first = nnx.LoRALinear(4, 5, lora_rank=2, rngs=rngs)
        self.last = nnx.LoRALinear(5, 3, lora_rank=2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


def lora():
    x = normal(np.random.default_rng(6), 3, 4)
    model = nnx_module(lambda: Adapted(nnx.Rngs(0)))
    params = spread(nnx.state(model, nnx.LoRAParam))
    model_fn = nnx_model_fn(model, wrt=nnx.LoRAParam)
    return Specimen(model_fn, LABELLED, of_labels, params, (x, jnp.array([2, 0, 1])))


class Causal(nn.Module):
    """A causal convolution whose kernel is normalised, as in a temporal network."""

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(3, (2,), padding="CAUSAL", name="conv")
        return nn.Dense(2, name="out")(jnp.tanh(nn.WeightNorm(conv)(x)))


def weight_norm():
    rng = np.random.default_rng(7)
    x, t = normal(rng, 3, 4, 2), normal(rng, 3, 4, 2)
    model_fn, params = linen(Causal(), x)

    def held(params, x):
        (scale,) = jax.tree.leaves(params["WeightNorm_0"])
        v, b = params["conv"]["kernel"], params["conv"]["bias"]
        length = jnp.sqrt(jnp.sum(v**2, axis=(0, 1)))
        kernel = scale * v / jax.lax.stop_gradient(length)
        y = nn.Conv(3, (2,), padding="CAUSAL").apply(
            {"params": {"kernel": kernel, "bias": b}}, x
        )
        return nn.Dense(2).apply({"params": params["out"]}, jnp.tanh(y))

    loss = hfjax.losses.squared_error()
    batch = (x, t, jnp.array([1.0, 0.5, 2.0]))
    return Specimen(model_fn, loss, half_squares, params, batch, held=held)
