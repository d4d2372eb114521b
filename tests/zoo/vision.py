"""Networks for images: the CNN and the ResNet of Flax's examples, a vision transformer."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from problems import normal
from zoo.specimen import (
    KEY,
    Specimen,
    equinox,
    linen,
    nnx_module,
    of_labels,
    spread,
)

import hfjax
from hfjax.flax import nnx_model_fn

LABELS = jnp.array([2, 0, 1])


class CNN(nnx.Module):
    """As Flax's `mnist`: convolutions, batch normalisation, pools, a dense layer."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (3, 3), padding="VALID", rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.norm(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.conv2(x))
        return self.out(x.reshape(x.shape[0], -1))


def cnn(*, in_training=False):
    model = nnx_module(lambda: CNN(nnx.Rngs(0)))
    x = normal(np.random.default_rng(0), 3, 6, 6, 1)
    params = spread(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.map(jnp.float64, nnx.state(model, nnx.BatchStat)))
    if not in_training:
        nnx.jit(CNN.__call__)(
            model, 2 * x
        )  # Statistics that are not those it starts with.
        model.eval()
    return Specimen(
        nnx_model_fn(model, whole_batch=in_training),
        optax.softmax_cross_entropy_with_integer_labels,
        of_labels,
        params,
        (x, LABELS),
        whole_batch=in_training,
    )


class ResidualBlock(nn.Module):
    """Two convolutions with normalisation, and a strided one beside them."""

    @nn.compact
    def __call__(self, x):
        def layer(x, name, size, strides=1):
            x = nn.Conv(3, size, strides, use_bias=False, name=name)(x)
            return nn.BatchNorm(use_running_average=True, name=f"{name}_norm")(x)

        y = nn.relu(layer(x, "first", (3, 3), 2))
        y = layer(y, "second", (3, 3)) + layer(x, "beside", (1, 1), 2)
        return nn.Dense(3, name="out")(jnp.mean(nn.relu(y), axis=(1, 2)))


def resnet():
    x = normal(np.random.default_rng(1), 3, 4, 4, 2)
    model_fn, params = linen(ResidualBlock(), x)
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
    weights = jnp.array([1.0, 0.5, 2.0])
    return Specimen(model_fn, loss, of_labels, params, (x, LABELS, weights))


class VisionTransformer(eqx.Module):
    """Patches by a convolution, a token for the class, one block."""

    patches: eqx.nn.Conv2d
    token: jax.Array
    places: jax.Array
    norms: list
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.patches = eqx.nn.Conv2d(1, 4, 2, stride=2, key=keys[0])
        self.token = jax.random.normal(keys[1], (1, 4))
        self.places = jax.random.normal(keys[2], (5, 4))
        self.norms = [eqx.nn.LayerNorm(4), eqx.nn.LayerNorm(4)]
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=keys[3])
        self.mlp = eqx.nn.MLP(4, 4, 5, 1, activation=jax.nn.gelu, key=keys[4])
        self.head = eqx.nn.Linear(4, 3, key=keys[5])

    def __call__(self, image):
        x = self.patches(image).reshape(4, -1).T
        x = jnp.concatenate([self.token, x]) + self.places
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        x = x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))
        return self.head(x[0])


def vit():
    x = normal(np.random.default_rng(2), 3, 1, 4, 4)
    params, rest = equinox(lambda: VisionTransformer(KEY))
    loss = optax.softmax_cross_entropy_with_integer_labels

    def model_fn(params, x):
        return jax.vmap(eqx.combine(params, rest))(x)

    return Specimen(model_fn, loss, of_labels, params, (x, LABELS))
