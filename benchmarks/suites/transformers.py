"""The suite of small transformers, as people write them in Flax, that learn examples by heart.

Symbols, tags and labels are random, so all that can be learned is the examples; the floor
is what stays unknown then. About 20,000 parameters each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import hfjax
from benchmarks.suites.problem import (
    Kind,
    Problem,
    Suite,
    Summary,
    excess_over,
    full_batch_measurer,
    shuffled,
)

CASES, STEPS, SYMBOLS, TAGS, LABELS = 256, 16, 32, 12, 10
PATCHES, PIXELS = 16, 9
_BLOCKS, _WIDTH, _HEADS, _HIDDEN, _MINIBATCH = 2, 32, 4, 64, 32


class Body(nn.Module):
    """Blocks of attention and of dense layers, normalised before each, and a last layer.

    Attributes:
      outputs: of each step.
    """

    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Map `[cases, steps, width]` to `[cases, steps, outputs]`."""
        start = nn.initializers.normal(0.02)
        x += self.param("place", start, (1, x.shape[1], _WIDTH))
        for _ in range(_BLOCKS):
            y = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(_HEADS)(y, mask=mask)
            y = nn.Dense(_HIDDEN)(nn.LayerNorm()(x))
            x += nn.Dense(_WIDTH)(nn.gelu(y))
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


def writer() -> Problem:
    """Build the problem of sequences to be written from their first symbol."""
    symbols = np.random.default_rng(0).integers(SYMBOLS, size=(CASES, STEPS + 1))
    # Nothing but the first symbol tells which of the sequences that begin so comes.
    counts = np.bincount(symbols[:, 0], minlength=SYMBOLS)
    floor = float(np.mean(np.log(counts[symbols[:, 0]])))
    batch = (symbols[:, :-1], symbols[:, 1:])
    title = f"{CASES} sequences of {STEPS + 1} symbols, each symbol from those before"
    return _problem(Writer(), batch, title, floor, (30.0, 10.0, 3.0, 1.0, 0.3))


def tagger() -> Problem:
    """Build the problem of sequences of different lengths with random tags."""
    generator = np.random.default_rng(0)
    symbols = generator.integers(1, SYMBOLS + 1, size=(CASES, STEPS))
    tags = generator.integers(TAGS, size=symbols.shape)
    lengths = generator.integers(STEPS // 2, STEPS + 1, size=CASES)
    there = np.arange(STEPS) < lengths[:, None]
    floor = float(np.mean(np.sum(~there, axis=1)) * np.log(TAGS))
    batch = (np.where(there, symbols, 0), np.where(there, tags, 0))
    title = f"Tags of {CASES} sequences of {STEPS // 2} to {STEPS} symbols"
    return _problem(Tagger(), batch, title, floor, (20.0, 10.0, 3.0, 1.0, 0.3))


def vision() -> Problem:
    """Build the problem of random images with random labels."""
    generator = np.random.default_rng(0)
    patches = generator.standard_normal((CASES, PATCHES, PIXELS), dtype=np.float32)
    batch = (patches, generator.integers(LABELS, size=CASES))
    title = f"Labels of {CASES} images of {PATCHES} patches"
    return _problem(Vision(), batch, title, 0.0, (1.0, 0.3, 0.1, 0.03, 0.01))


def _problem(
    network: nn.Module,
    arrays: Any,
    title: str,
    floor: float,
    milestones: tuple[float, ...],
) -> Problem:
    batch = jax.tree.map(jnp.asarray, arrays)
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
    objective = hfjax.Objective(lambda p, x: network.apply({"params": p}, x), loss)

    def start(key: jax.Array) -> Any:
        return network.init(key, batch[0][:1])["params"]

    return Problem(
        summary=Summary(
            title=title,
            value="f − the lowest",
            milestones=excess_over(milestones),
            floor=floor,
        ),
        objective=objective,
        start=start,
        data=lambda seed: batch,
        measurer=full_batch_measurer(objective, batch, floor),
        minibatches=shuffled(batch, _MINIBATCH),
        loss="softmax",
    )


SUITE = Suite(
    name="transformers",
    title="small transformers that learn examples by heart, by f above its floor",
    problems={
        "writer": Kind("sequences, each symbol from those before", lambda _: writer()),
        "tagger": Kind("tags of sequences of different lengths", lambda _: tagger()),
        "vision": Kind("labels of images in patches", lambda _: vision()),
    },
    default=("writer", "tagger", "vision"),
    optimizers=("hfjax", "lowest", "ratio", "adam", "muon", "lbfgs"),
    seconds=20.0,
)
