"""The networks of the suite `minibatch` that are written in Flax."""

import jax
from flax import linen as nn

from benchmarks.suites.curves import SIDE
from benchmarks.suites.transformer_networks import Body

BLOCKS, WIDTH, HEADS = 4, 160, 5
_CHANNELS, _DENSE, _LABELS = (16, 32), 64, 10


class Convolutional(nn.Module):
    """A digit from an image: two convolutions, each of which halves the sides."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Map `[cases, pixels]` to logits of the digits."""
        x = pixels.reshape(-1, SIDE, SIDE, 1)
        for channels in _CHANNELS:
            x = nn.relu(nn.Conv(channels, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Dense(_DENSE)(x.reshape(len(x), -1)))
        return nn.Dense(_LABELS)(x)


class Reader(nn.Module):
    """Each symbol of a text from those before it.

    Attributes:
      symbols: how many there are.
    """

    symbols: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        """Map `[cases, steps]` to logits of the next symbol."""
        x = nn.Embed(self.symbols, WIDTH)(text)
        body = Body(self.symbols, BLOCKS, WIDTH, HEADS, 4 * WIDTH)
        return body(x, nn.make_causal_mask(text))
