# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How do I fine-tune a Flax model?
#
# You learn how to fine-tune a transformer, by low-rank adapters (LoRA) or by all its weights, and
# how that compares with Adam in the same seconds. The notebook takes about two minutes on one
# core.
#
# f is the training loss of 300 examples. hfjax uses all of them in each update; Adam has
# minibatches of 50 and the better of two learning rates. Seconds are processor seconds, so other
# work on the machine hardly counts.

# %%
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hfjax
from hfjax.flax import nnx_model_fn

# Before the first computation: on a CPU this compiles a third faster.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
plt.rcParams["figure.dpi"] = 72
SECONDS = 5.0
RUNS = {}

# %% [markdown]
# ## A transformer that can sort
#
# Two blocks of Flax nnx, with an adapter in every linear layer. Adam first trains everything but
# the adapters, until the model sorts ten digits in ascending order.


# %%
class Block(nnx.Module):
    def __init__(self, width, heads, rngs):
        def linear(inputs, units):
            return nnx.LoRALinear(inputs, units, lora_rank=4, rngs=rngs)

        self.heads = heads
        self.first, self.second = (nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x):
        qkv = self.qkv(self.first(x)).reshape(*x.shape[:2], 3 * self.heads, -1)
        mixed = jax.nn.dot_product_attention(*jnp.split(qkv, 3, axis=2))
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.second(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs, width=32):
        self.token = nnx.Embed(10, width, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (10, width)))
        self.blocks = nnx.List([Block(width, 4, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, tokens):
        x = self.token(tokens) + self.place[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def sorting(key, count, sign):
    digits = jax.random.randint(key, (count, 10), 0, 10)
    return digits, sign * jnp.sort(sign * digits, axis=1)


transformer = Transformer(nnx.Rngs(0))
loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
adapters = nnx.LoRAParam
weights = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


# %% [markdown]
# ## Two functions that train
#
# The loop of hfjax is the usual one of Optax, with `batch=batch` in the update. One option is
# set: with `lower=0.25` the search for λ refuses a step if f falls by less than a quarter of what
# the quadratic model predicts. At the start of fine-tuning the model is sure of wrong answers, and
# without this option the first step goes much too far ([figures](../docs/models.md#low-rank-adapters)).


# %%
def hfjax_run(objective, params, batch):
    """Train with hfjax; return parameters, f after each update, seconds to compile."""
    tx = hfjax.hessian_free(objective, damping=hfjax.damping.searched(lower=0.25))

    @jax.jit
    def step(params, state, batch):
        value, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    start = time.process_time()
    state = tx.init(params)
    *_, value = jax.block_until_ready(step(params, state, batch))
    compiling = time.process_time() - start
    rows = [(0.0, float(value))]
    start = time.process_time()
    while rows[-1][0] < SECONDS:
        params, state, _ = step(params, state, batch)
        value = float(state.info.value_after)
        rows.append((time.process_time() - start, value))
    return params, rows, compiling


def adam_runs(objective, params, batch, rates, seconds=SECONDS, size=50, steps=50):
    """Train with Adam at each rate, on minibatches; return the same, by rate."""
    adam, examples = optax.scale_by_adam(), len(jax.tree.leaves(batch)[0])

    @jax.jit
    def some_steps(params, state, batch, rate, key):
        def one(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (size,), 0, examples)
            part = jax.tree.map(lambda leaf: leaf[chosen], batch)
            _, grads = objective.value_and_grad(params, part)
            updates, state = adam.update(grads, state)
            updates = jax.tree.map(lambda u: -rate * u, updates)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        (params, state), _ = jax.lax.scan(one, (params, state), keys)
        return params, state, objective.value(params, batch)

    def run(rate):
        now, rows = (params, adam.init(params)), []
        start = time.process_time()
        while not rows or rows[-1][0] < seconds:
            *now, value = some_steps(*now, batch, rate, jax.random.key(len(rows)))
            value = float(value)  # Waits for it.
            rows.append((time.process_time() - start, value))
        return now[0], rows, compiling

    start = time.process_time()
    first = adam.init(params)
    jax.block_until_ready(some_steps(params, first, batch, 0.0, jax.random.key(0)))
    compiling = time.process_time() - start
    return {rate: run(rate) for rate in rates}


def lowest(run):
    """Return the lowest f of a run."""
    return min(value for _, value in run[1])


def race(name, objective, params, batch):
    """Run both, print where they got to, and return the parameters of both."""
    ours = hfjax_run(objective, params, batch)
    adams = adam_runs(objective, params, batch, (1e-2, 3e-3))
    best = min(adams, key=lambda rate: lowest(adams[rate]))
    print(
        f"hfjax: f from {ours[1][0][1]:.3g} to {lowest(ours):.3g} in "
        f"{len(ours[1]) - 1} updates, after {ours[2]:.0f} s for compiling"
    )
    print(
        f"Adam, {best:g} of two rates: to {lowest(adams[best]):.3g} in "
        f"{50 * len(adams[best][1]):,} steps, after {adams[best][2]:.0f} s"
    )
    RUNS[name] = {"hfjax": ours[1], "Adam": adams[best][1]}
    return {"hfjax": ours[0], "Adam": adams[best][0]}


before = hfjax.Objective(nnx_model_fn(transformer, weights), loss)
learned = adam_runs(
    before,
    nnx.state(transformer, weights),
    sorting(jax.random.key(0), 5000, 1),
    (3e-3,),
    seconds=2 * SECONDS,
)[3e-3]
nnx.update(transformer, learned[0])
print(f"f of sorting in ascending order: {lowest(learned):.3g}")

# %% [markdown]
# ## Fine-tuning
#
# Now the model has to sort in descending order. `nnx_model_fn(model, wrt)` makes a function of the
# parameters that `wrt` selects, and keeps all others fixed. `preconditioners.layers` says what
# the preconditioner finds: Kronecker factors for the kernels, diagonals for the rest.


# %%
def found(objective, params, batch):
    """Print which kinds of parameters the preconditioner finds, and their share."""
    sizes = jax.tree.leaves(jax.tree.map(jnp.size, params))
    told = hfjax.preconditioners.layers(objective, params, batch)
    kinds = {}
    for what, size in zip(told.values(), sizes, strict=True):
        kinds.setdefault(what.split(" of ")[0].split(": ")[0], []).append(size)
    for kind, own in kinds.items():
        share = sum(own) / sum(sizes)
        print(f"{len(own):3} arrays, {share:6.1%} of the numbers: {kind}")


def wrong(objective, params):
    """Return the share of digits that are wrong in 1,000 new examples."""
    digits, targets = sorting(jax.random.key(2), 1000, -1)
    return float(
        jnp.mean(jnp.argmax(objective.model_fn(params, digits), -1) != targets)
    )


batch = sorting(jax.random.key(1), 300, -1)
for name, wrt in (("adapters", adapters), ("all weights", weights)):
    objective = hfjax.Objective(nnx_model_fn(transformer, wrt), loss)
    params = nnx.state(transformer, wrt)
    print(f"{name}:")
    found(objective, params, batch)
    for optimizer, trained in race(name, objective, params, batch).items():
        print(f"{optimizer}: {wrong(objective, trained):.1%} of new digits are wrong")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for axis, (name, runs) in zip(axes.flat, RUNS.items(), strict=True):
    for (label, rows), colour in zip(runs.items(), ("k", "C1"), strict=True):
        seconds, values = np.array(rows).T
        axis.plot(seconds, np.minimum.accumulate(values), color=colour, label=label)
    axis.set(title=name, yscale="log", xlabel="seconds", ylabel="lowest f so far")
    axis.spines[["top", "right"]].set_visible(False)
axes.flat[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Adam is ahead for almost all of these five seconds. At their end hfjax has caught up with the
# adapters, but not with all weights. Adam also compiles in about a third of the time, and fewer of
# the new digits are wrong. So choose Adam to fine-tune quickly on minibatches. hfjax is of use if f has
# to become very small: its curves still fall steeply at the end. After twenty updates of all
# weights, f is 3 · 10⁻⁶ ([figures](../docs/models.md#low-rank-adapters)).
#
# In a usual Flax loop, pass the same filter as `wrt` to `nnx.Optimizer`, as in [the
# quickstart](01_quickstart.ipynb). [`examples/nnx_finetune.py`](../examples/nnx_finetune.py) is a
# script to copy. [Other models](13_other_models.ipynb) have a notebook of their own.
