"""Generative and contrastive models: an autoencoder, a flow, a game, pairs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from problems import layers, mlp, normal
from zoo.specimen import Specimen, linen, of_logits

import hfjax


class VAE(nn.Module):
    """As Flax's `vae`, whose noise comes with the data."""

    @nn.compact
    def __call__(self, inputs):
        x, noise = inputs
        h = nn.relu(nn.Dense(5, name="encode")(x))
        mean, log_variance = nn.Dense(2, name="mean")(h), nn.Dense(2, name="log")(h)
        z = mean + jnp.exp(log_variance / 2) * noise
        logits = nn.Dense(6, name="out")(nn.relu(nn.Dense(5, name="decode")(z)))
        return {"image": logits, "latent": (mean, log_variance)}


def vae():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 2, (3, 6)).astype(float))
    inputs = (x, normal(rng, 3, 2))
    model_fn, params = linen(VAE(), inputs)
    losses = hfjax.losses
    kl = losses.gaussian_kl_divergence()
    loss = losses.tree({"image": losses.sigmoid_cross_entropy(), "latent": kl})

    def plain(outputs, targets):
        mean, s = outputs["latent"]
        divergence = jnp.sum(jnp.exp(s) + mean**2 - 1 - s) / 2
        return of_logits(outputs["image"], targets["image"]) + divergence

    batch = (inputs, {"image": x, "latent": None})
    return Specimen(model_fn, loss, plain, params, batch)


def flow():
    """Two coupling layers of RealNVP; −log N(z) − log |det| of the pair that it returns."""
    rng = np.random.default_rng(1)
    params = [layers(rng, 1, 4, 2), layers(rng, 1, 4, 2)]

    def model_fn(params, x):
        log_det = 0.0
        for net in params:
            kept, changed = jnp.split(x, 2, axis=-1)
            s, shift = jnp.split(mlp(net, kept), 2, axis=-1)
            x = jnp.concatenate([changed * jnp.exp(jnp.tanh(s)) + shift, kept], -1)
            log_det += jnp.sum(jnp.tanh(s), axis=-1)
        return x, log_det

    def loss(outputs, targets):
        z, log_det = outputs
        return 0.5 * jnp.sum(z**2, axis=-1) - log_det

    def plain(outputs, targets):
        z, log_det = outputs
        return z @ z / 2 - log_det

    x = normal(rng, 4, 2)
    return Specimen(model_fn, loss, plain, params, (x, jnp.zeros(4)))


def contrastive():
    """NT-Xent of three pairs, all of which are a single example."""
    rng = np.random.default_rng(2)
    params = layers(rng, 3, 4, 2)

    def model_fn(params, pairs):
        return jax.vmap(lambda x: mlp(params, x))(pairs)

    def similarities(z):
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        return jnp.where(jnp.eye(6, dtype=bool), -1e30, z @ z.T / 0.5)

    def loss(outputs, targets):
        def one(z, partners):
            logs = jax.nn.log_softmax(similarities(z))
            return -jnp.take_along_axis(logs, partners[:, None], axis=1)[:, 0].mean()

        return jax.vmap(one)(outputs, targets)

    def plain(z, partners):
        unit = z / jnp.sqrt(jnp.sum(z * z, axis=1))[:, None]
        s = jnp.exp(2 * unit @ unit.T) * (1 - jnp.eye(6))
        chosen = s[jnp.arange(6), partners]
        return -jnp.sum(jnp.log(chosen / jnp.sum(s, axis=1))) / 6

    partners = jnp.array([[3, 4, 5, 0, 1, 2]])
    batch = (normal(rng, 1, 6, 3), partners)
    return Specimen(model_fn, loss, plain, params, batch, damping=10.0)


def generator():
    """One player of a GAN: the other one stays as it is during an update."""
    rng = np.random.default_rng(3)
    params, judge = layers(rng, 2, 5, 2), layers(rng, 2, 4, 1)

    def model_fn(params, noise):
        return mlp(judge, mlp(params, noise))

    batch = (normal(rng, 4, 2), jnp.ones((4, 1)))
    loss = hfjax.losses.sigmoid_cross_entropy()
    return Specimen(model_fn, loss, of_logits, params, batch)
