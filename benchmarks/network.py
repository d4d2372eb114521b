"""The deep autoencoder of Hinton & Salakhutdinov (2006) and Martens (2010).

    784-400-200-100-50-25-6-25-50-100-200-400-784

The code layer is linear, the other hidden layers are logistic, and the outputs are
the logits of pixels.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

import hfjax

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


def autoencoder(encoder_sizes: Sequence[int]) -> Autoencoder:
    """Build an autoencoder whose decoder mirrors its encoder.

    Args:
      encoder_sizes: from the pixels to the code, both included.

    Returns:
      Its two functions.

    Example:
      >>> init, model_fn = autoencoder((784, 30, 5))
      >>> params = init(jax.random.key(0))
      >>> [layer["kernel"].shape for layer in params]
      [(784, 30), (30, 5), (5, 30), (30, 784)]
      >>> model_fn(params, jnp.zeros((2, 784))).shape
      (2, 784)
    """
    sizes = mirrored(encoder_sizes)
    layers = len(sizes) - 1
    linear = (len(encoder_sizes) - 2, layers - 1)  # the code, and the logits

    def init(key: jax.Array) -> Layers:
        sparse = hfjax.initializers.sparse()
        keys = jax.random.split(key, layers)
        shapes = itertools.pairwise(sizes)
        return [
            {"kernel": sparse(layer_key, shape), "bias": jnp.zeros(shape[1])}
            for layer_key, shape in zip(keys, shapes, strict=True)
        ]

    def model_fn(params: Layers, images: jax.Array) -> jax.Array:
        x = images
        for index, layer in enumerate(params):
            x = x @ layer["kernel"] + layer["bias"]
            x = x if index in linear else jax.nn.sigmoid(x)
        return x

    return Autoencoder(init, model_fn)


def mirrored(encoder_sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of all layers, from the pixels through the code and back.

    Args:
      encoder_sizes: from the pixels to the code, both included.

    Returns:
      The sizes, as many as matrices and one more.
    """
    return (*encoder_sizes, *reversed(encoder_sizes[:-1]))
