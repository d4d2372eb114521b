"""Fine-tune a transformer of Flax nnx with the Hessian-free optimizer, and with Adam.

    python examples/nnx_finetune.py

Replace `Transformer` and `digits` by your own. Adam trains the transformer to sort digits.
Then both train it to sort them downwards: all weights, or (`--adapters`) only LoRA's.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import hfjax
from hfjax.flax import nnx_model_fn

WEIGHTS, WIDTH = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), 16


class Transformer(nnx.Module):
    def __init__(self, rngs):
        linear = functools.partial(nnx.LoRALinear, lora_rank=4, rngs=rngs)
        self.embed = nnx.Embed(16, WIDTH, rngs=rngs)  # Ten digits, six places.
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)])
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 64), linear(64, WIDTH)
        self.head = linear(WIDTH, 10)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.embed(jnp.arange(10, 16)[None])
        qkv = self.qkv(self.norms[0](x)).reshape(*x.shape[:2], 6, -1)  # Two heads.
        mixed = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=2))
        x = x + self.out(mixed.reshape(x.shape))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def digits(seed, cases, sign):
    found = jax.random.randint(jax.random.key(seed), (cases, 6), 0, 10)
    return found, sign * jnp.sort(sign * found, axis=1)


def train(name, tx, model, trained, batch, size):
    """Train some variables; the others are constants of f, as they are in the model now."""
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
    objective = hfjax.Objective(nnx_model_fn(model, trained), loss)
    tx = optax.with_extra_args_support(tx or hfjax.hessian_free(objective))

    @jax.jit
    def step(params, state, key):
        part = jax.tree.map(lambda x: jax.random.permutation(key, x)[:size], batch)
        _, grads = objective.value_and_grad(params, part)
        updates, state = tx.update(grads, state, params, batch=part)
        return optax.apply_updates(params, updates), state

    params, count = nnx.state(model, trained), 0
    now, before = (params, tx.init(params)), objective.value(params, batch)
    jax.block_until_ready(step(*now, jax.random.key(0)))  # Compiles.
    end = time.process_time() + args.seconds
    while time.process_time() < end:
        now, count = step(*now, jax.random.key(count)), count + 1
        jax.block_until_ready(now)
    ends = f"from {before:.3g} to {objective.value(now[0], batch):.3g}"
    print(f"{name}: f {ends} in {count} updates")
    return now[0]


parser = argparse.ArgumentParser()
parser.add_argument("--adapters", action="store_true")
parser.add_argument("--seconds", type=float, default=3.0, help="of each optimizer")
args = parser.parse_args()
model, adam = Transformer(nnx.Rngs(0)), optax.adam(5e-3)
nnx.update(model, train("sorting", adam, model, WEIGHTS, digits(0, 5000, 1), 50))
trained, batch = nnx.LoRAParam if args.adapters else WEIGHTS, digits(1, 300, -1)
train("Adam", adam, model, trained, batch, 50)
nnx.update(model, train("hfjax", None, model, trained, batch, 300))
