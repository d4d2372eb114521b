"""Two small transformers for `preconditioners`, as people write them in Flax.

They repeat what they were shown: symbols are remembered over blanks, and asked for at the
end (`tasks.memorisation`). `attention` has dense layers between its attention layers, and
`experts` a mixture of experts: every expert computes, and a softmax gate weights them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import hfjax
from benchmarks.suites.tasks import memorisation

BLOCKS, WIDTH, HEADS, HIDDEN, EXPERTS = 1, 32, 4, 64, 4
SYMBOLS, COUNT, STEPS = 5, 6, 16
"""Different symbols, how many are shown, and steps of a sequence."""


class Experts(nn.Module):
    """Experts of one hidden layer, weighted by a gate at each position."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[cases, steps, width]` to an array of the same shape."""
        start = nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up", start, (EXPERTS, WIDTH, HIDDEN))
        down = self.param("down", start, (EXPERTS, HIDDEN, WIDTH))
        gate = nn.softmax(nn.Dense(EXPERTS)(x))
        hidden = nn.gelu(jnp.einsum("ntd,edh->nteh", x, up))
        return jnp.einsum("nteh,ehd,nte->ntd", hidden, down, gate)


class Transformer(nn.Module):
    """Blocks of attention and of dense layers or experts, normalised before each.

    Attributes:
      experts: whether the blocks have experts.
    """

    experts: bool

    @nn.compact
    def __call__(self, steps: jax.Array) -> jax.Array:
        """Map `[cases, steps, features]` to logits of the symbols and the blank."""
        place = self.param("place", nn.initializers.normal(0.02), (STEPS, WIDTH))
        x = nn.Dense(WIDTH)(steps) + place
        for _ in range(BLOCKS):
            x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
            y = nn.LayerNorm()(x)
            if self.experts:
                x += Experts()(y)
            else:
                x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(y)))
        return nn.Dense(SYMBOLS + 1)(nn.LayerNorm()(x))


class Block(nn.Module):
    """Attention and dense layers, normalised before each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[cases, steps, width]` to an array of the same shape."""
        x += nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        y = nn.Dense(HIDDEN)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(y * nn.sigmoid(y))


class Blocks(nn.Module):
    """A transformer whose blocks are one program, in a scan, or one program each.

    Attributes:
      blocks: how many there are.
      scanned: whether they are in a scan.
    """

    blocks: int
    scanned: bool = True

    @nn.compact
    def __call__(self, steps: jax.Array) -> jax.Array:
        """Map `[cases, steps, features]` to logits of the symbols and the blank."""
        x = nn.Dense(WIDTH)(steps)
        if self.scanned:
            stack = nn.scan(
                lambda block, x: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.blocks,
            )
            x, _ = stack(Block(), x)
        else:
            for _ in range(self.blocks):
                x = Block()(x)
        return nn.Dense(SYMBOLS + 1)(nn.LayerNorm()(x))


def problem(
    key: jax.Array, cases: int, *, experts: bool
) -> tuple[hfjax.Objective, Any, Any]:
    """Return f, where training starts, and its sequences."""
    model = Transformer(experts)
    start, data = jax.random.split(key)
    inputs, targets = memorisation(data, cases, STEPS, symbols=SYMBOLS, count=COUNT)
    params = jax.jit(model.init)(start, inputs.steps)["params"]
    objective = hfjax.Objective(
        lambda params, inputs: model.apply({"params": params}, inputs),
        hfjax.losses.softmax_cross_entropy_with_integer_labels(),
    )
    return objective, params, (inputs.steps, targets)
