"""The networks of the suite `transformers`, as people write them in Flax."""

import jax
import jax.numpy as jnp
from flax import linen as nn

SYMBOLS, TAGS, LABELS = 32, 12, 10
_BLOCKS, _WIDTH, _HEADS, _HIDDEN = 2, 32, 4, 64


class Body(nn.Module):
    """Blocks of attention and of dense layers, normalised before each, and a last layer.

    Attributes:
      outputs: of each step.
      blocks: how many.
      width: of what blocks add to.
      heads: of attention.
      hidden: units of the dense layers.
    """

    outputs: int
    blocks: int = _BLOCKS
    width: int = _WIDTH
    heads: int = _HEADS
    hidden: int = _HIDDEN

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map `[cases, steps, width]` to `[cases, steps, outputs]`."""
        start = nn.initializers.normal(0.02)
        x += self.param("place", start, (1, x.shape[1], self.width))
        for _ in range(self.blocks):
            y = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
            y = nn.Dense(self.hidden)(nn.LayerNorm()(x))
            x += nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(self.outputs)(nn.LayerNorm()(x))


class Writer(nn.Module):
    """Each symbol of a sequence from those before it."""

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        """Map `[cases, steps]` to logits of the next symbol."""
        x = nn.Embed(SYMBOLS, _WIDTH)(symbols)
        return Body(SYMBOLS)(x, nn.make_causal_mask(symbols))


class Tagger(nn.Module):
    """A tag for each symbol of a sequence, which 0 fills up."""

    @nn.compact
    def __call__(self, symbols: jax.Array) -> jax.Array:
        """Map `[cases, steps]` to logits of the tags, which are 0 where nothing is."""
        there = symbols > 0
        x = nn.Embed(SYMBOLS + 1, _WIDTH)(symbols)
        logits = Body(TAGS)(x, nn.make_attention_mask(there, there))
        return jnp.where(there[..., None], logits, 0)


class Vision(nn.Module):
    """A label for an image of patches."""

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Map `[cases, patches, pixels]` to logits of the labels."""
        return jnp.mean(Body(LABELS)(nn.Dense(_WIDTH)(patches)), axis=1)
