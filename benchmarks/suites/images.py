"""The suite of images: deep autoencoders of curves and of MNIST.

The network of Hinton & Salakhutdinov (2006) and Martens (2010):

    784-400-200-100-50-25-6-25-50-100-200-400-784

The code layer is linear, the other hidden layers are logistic, and the outputs are the
logits of pixels. There is no weight decay, so that f minus its floor, the entropy of the
pixels, can go to 0.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import hfjax
from benchmarks.suites import mnist
from benchmarks.suites.curves import PIXELS, curves, entropy_floor
from benchmarks.suites.problem import (
    Kind,
    Problem,
    Suite,
    Summary,
    excess_over,
    full_batch_measurer,
    shuffled,
)

CURVES = (PIXELS, 400, 200, 100, 50, 25, 6)
DIGITS = (PIXELS, 1000, 500, 250, 30)
"""Layer sizes from the pixels to the code, as Martens had them."""

DAMPING = 45.0
"""λ of Martens' program before the first update, for losses summed over 784 outputs."""

Layers: TypeAlias = list[dict[str, jax.Array]]
"""The parameters: of each layer its `kernel`, `[inputs, units]`, and `bias`."""


class Autoencoder(NamedTuple):
    """A model as two pure functions.

    Attributes:
      init: `key -> params`: sparse kernels, biases 0 (Martens 2010, section 5).
      model_fn: `(params, images) -> logits`, both `[cases, pixels]`.
    """

    init: Callable[[jax.Array], Layers]
    model_fn: Callable[[Layers, jax.Array], jax.Array]


def sparse_layers(sizes: Sequence[int]) -> Callable[[jax.Array], Layers]:
    """Return what draws dense layers with sparse kernels and biases of 0."""

    def init(key: jax.Array) -> Layers:
        sparse = hfjax.initializers.sparse()
        keys = jax.random.split(key, len(sizes) - 1)
        shapes = itertools.pairwise(sizes)
        return [
            {"kernel": sparse(layer_key, shape), "bias": jnp.zeros(shape[1])}
            for layer_key, shape in zip(keys, shapes, strict=True)
        ]

    return init


def autoencoder(encoder_sizes: Sequence[int]) -> Autoencoder:
    """Build an autoencoder whose decoder mirrors its encoder.

    Example:
      >>> init, model_fn = autoencoder((784, 30, 5))
      >>> params = init(jax.random.key(0))
      >>> [layer["kernel"].shape for layer in params]
      [(784, 30), (30, 5), (5, 30), (30, 784)]
      >>> model_fn(params, jnp.zeros((2, 784))).shape
      (2, 784)
    """
    sizes = mirrored(encoder_sizes)
    linear = (len(encoder_sizes) - 2, len(sizes) - 2)  # the code, and the logits

    def model_fn(params: Layers, images: jax.Array) -> jax.Array:
        x = images
        for index, layer in enumerate(params):
            x = x @ layer["kernel"] + layer["bias"]
            x = x if index in linear else jax.nn.sigmoid(x)
        return x

    return Autoencoder(sparse_layers(sizes), model_fn)


def mirrored(encoder_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of all layers, from the pixels through the code and back."""
    return (*encoder_sizes, *reversed(encoder_sizes[:-1]))


def reconstruction(
    name: str, images: np.ndarray, encoder: tuple[int, ...], parts: int = 1
) -> Problem:
    """Build the problem of an autoencoder."""
    network, pixels = autoencoder(encoder), jnp.asarray(images)
    objective = hfjax.Objective(network.model_fn, hfjax.losses.sigmoid_cross_entropy())
    batch, floor = (pixels, pixels), entropy_floor(images)
    layers = "-".join(map(str, encoder))
    return Problem(
        summary=Summary(
            title=f"{name}, {len(images):,} images, encoder {layers}",
            value="f − floor",
            milestones=excess_over((77.0, 27.0, 10.0, 1.0, 0.1)),
            floor=floor,
            note=f"Floor: {floor:.3f} nats an image, the entropy of the pixels.",
        ),
        objective=objective,
        start=network.init,
        data=lambda seed: batch,
        measurer=full_batch_measurer(objective, batch, floor),
        minibatches=shuffled(batch),
        parts=parts,
        damping=DAMPING,
        loss="sigmoid",
        layered=True,
    )


def _curves(data_dir: str, cases: int, parts: int) -> Problem:
    del data_dir
    return reconstruction("Curves", curves(cases), CURVES, parts)


def _digits(data_dir: str, cases: int, parts: int) -> Problem:
    return reconstruction("MNIST", mnist.images(data_dir)[:cases], DIGITS, parts)


def _kind(words: str, build: Callable[..., Problem], cases: int, parts: int) -> Kind:
    build_it = functools.partial(build, cases=cases, parts=parts)
    return Kind(f"autoencoder of {words}", build_it, needs_mnist=build is _digits)


# Parts of 5,000 are Martens' for his 20,000 curves.
PROBLEMS = {
    "curves1000": _kind("1,000 curves, for a short demonstration", _curves, 1_000, 1),
    "curves2000": _kind("2,000 curves", _curves, 2_000, 1),
    "curves20000": _kind("20,000 curves, as many as Martens had", _curves, 20_000, 4),
    "mnist10000": _kind("MNIST's first 10,000 images", _digits, 10_000, 2),
    "mnist": _kind("MNIST's 60,000 images", _digits, 60_000, 8),
}

SUITE = Suite(
    name="images",
    title="deep autoencoders, by the excess of f over its floor",
    problems=PROBLEMS,
    default=("curves2000",),
    optimizers=("hfjax", "martens2010", "adam", "muon", "lbfgs", "kfac"),
    seconds=180.0,
)
