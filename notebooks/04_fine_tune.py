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
# # Your model, beside Adam
#
# Five models as people write them: a transformer that is fine-tuned, a convolutional
# network with batch normalisation, a Fourier neural operator, a variational autoencoder
# and a graph network. For each of them you see what the preconditioner finds in the model,
# and hfjax beside Adam on the same function f, from the same start, for the same seconds.
#
# hfjax runs with its defaults, on all examples. Adam has minibatches of 50 and the best of
# three learning rates. f is the training loss; nothing here is about generalisation. Seconds
# are those of the processor, which other work on the machine changes little.

# %%
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hfjax
from hfjax.flax import nnx_model_fn

plt.rcParams["figure.dpi"] = 72
SECONDS = 6.0
RUNS = {}

# %% [markdown]
# ## Two functions for all of them
#
# `found` sums up what `preconditioners.layers` says about each parameter: a share of the
# parameters has Kronecker factors (one pair, or one for each of several blocks), the rest
# the diagonal.


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


def hfjax_run(objective, params, batch, seconds):
    """Train with hfjax; return seconds and f after each update, and the seconds before."""
    tx = hfjax.hessian_free(objective)

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
    while rows[-1][0] < seconds:
        params, state, _ = step(params, state, batch)
        value = float(state.info.value_after)
        rows.append((time.process_time() - start, value))
    return params, rows, compiling


def adam_run(objective, params, batch, seconds, rate, size=50, steps=50):
    """The same with Adam, which is measured after so many steps."""
    tx, cases = optax.adam(rate), len(jax.tree.leaves(batch)[0])

    @jax.jit
    def some_steps(params, state, batch, key):
        def one(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (size,), 0, cases)
            part = jax.tree.map(lambda leaf: leaf[chosen], batch)
            _, grads = objective.value_and_grad(params, part)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, steps)
        (params, state), _ = jax.lax.scan(one, (params, state), keys)
        return params, state, objective.value(params, batch)

    start = time.process_time()
    state = tx.init(params)
    jax.block_until_ready(some_steps(params, state, batch, jax.random.key(0)))
    compiling = time.process_time() - start
    rows = [(0.0, float(jax.jit(objective.value)(params, batch)))]
    start = time.process_time()
    while rows[-1][0] < seconds:
        params, state, value = some_steps(
            params, state, batch, jax.random.key(len(rows))
        )
        value = float(value)  # Waits for it.
        rows.append((time.process_time() - start, value))
    return params, rows, compiling


def race(name, objective, params, batch):
    """Run both, print where they got to, and return the parameters of hfjax."""
    trained, rows, compiling = hfjax_run(objective, params, batch, SECONDS)
    print(
        f"hfjax: f from {rows[0][1]:.3g} to {min(f for _, f in rows):.3g} in "
        f"{len(rows) - 1} updates, {compiling:.0f} s before the second one"
    )
    runs = {}
    for rate in (1e-2, 3e-3, 1e-3):
        runs[rate] = adam_run(objective, params, batch, SECONDS, rate)[1:]
    best = min(runs, key=lambda rate: min(f for _, f in runs[rate][0]))
    adam, compiling = runs[best]
    print(
        f"Adam, {best:g} of three rates: to {min(f for _, f in adam):.3g} in "
        f"{50 * (len(adam) - 1):,} steps, {compiling:.0f} s before"
    )
    RUNS[name] = {"hfjax": rows, "Adam": adam}
    return trained


# %% [markdown]
# ## A transformer, fine-tuned
#
# Two blocks of nnx, with low-rank adapters (LoRA) in every linear layer. It has learnt,
# with Adam, to sort ten digits; now it shall sort them in descending order, from 300
# examples. First only the adapters are trained, then everything but the adapters.
#
# What is trained is chosen by `wrt`, as with any optimizer of nnx.


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


def sorting(key, cases, sign):
    digits = jax.random.randint(key, (cases, 10), 0, 10)
    return digits, sign * jnp.sort(sign * digits, axis=1)


adapters = nnx.LoRAParam
weights = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
transformer = Transformer(nnx.Rngs(0))
loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()

before = hfjax.Objective(nnx_model_fn(transformer, weights), loss)
params, rows, _ = adam_run(
    before,
    nnx.state(transformer, weights),
    sorting(jax.random.key(0), 5000, 1),
    2 * SECONDS,
    rate=3e-3,
)
nnx.update(transformer, params)
print(f"f of sorting in ascending order: {rows[-1][1]:.3g}")

# %%
batch = sorting(jax.random.key(1), 300, -1)
for name, wrt in (("adapters", adapters), ("all weights", weights)):
    objective = hfjax.Objective(nnx_model_fn(transformer, wrt), loss)
    params = nnx.state(transformer, wrt)
    print(f"{name}:")
    found(objective, params, batch)
    race(f"transformer, {name}", objective, params, batch)

# %% [markdown]
# ## A convolutional network with batch normalisation
#
# Batch normalisation makes each output depend on the whole batch: `whole_batch=True` says
# so. f, its gradient and its curvature are then those of the batch as one. (If you train
# on the running statistics instead, nothing has to be said: see [models that change
# between updates](../docs/changing.md).)


# %%
def shapes(key, cases, side=16):
    """Draw noisy rings, crosses and bars, and which they are."""
    keys = jax.random.split(key, 4)
    kind = jax.random.randint(keys[0], (cases,), 0, 3)
    middle = jax.random.uniform(keys[1], (cases, 1, 1, 2), minval=5, maxval=11)
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(side)] * 2, indexing="ij"), -1)
    y, x = jnp.moveaxis(grid - middle, -1, 0)
    ring = jnp.exp(-((jnp.hypot(x, y) - 3.5) ** 2))
    bar = jnp.exp(-(x**2)) * (jnp.abs(y) < 4)
    cross = jnp.maximum(bar, jnp.exp(-(y**2)) * (jnp.abs(x) < 4))
    image = jnp.choose(kind[:, None, None], [ring, cross, bar], mode="clip")
    noise = 0.5 * jax.random.normal(keys[2], image.shape)
    return (image + noise)[..., None], kind


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for channels in (8, 16):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=False)(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


batch = shapes(jax.random.key(0), 400)
figure, axes = plt.subplots(1, 9, figsize=(9, 1.1), layout="constrained")
for axis, image in zip(axes, batch[0], strict=False):
    axis.imshow(image[..., 0], cmap="gray_r")
    axis.set(xticks=[], yticks=[])
plt.show()

# %%
module = ConvNet()
variables = module.init(jax.random.key(1), batch[0])


def model_fn(params, images):
    variables_now = {"params": params, "batch_stats": variables["batch_stats"]}
    return module.apply(variables_now, images, mutable=["batch_stats"])[0]


objective = hfjax.Objective(model_fn, loss, whole_batch=True)
found(objective, variables["params"], batch)
race("convolutions", objective, variables["params"], batch)


# %% [markdown]
# ## A Fourier neural operator
#
# Burgers' equation uₜ + u uₓ = ν uₓₓ on a circle: the operator maps u at t = 0 to u at
# t = 1. The data are exact, by the substitution of Hopf and Cole. The kernel of each
# Fourier mode is complex; it is stored as its real and its imaginary part, since
# parameters must be real.


# %%
GRID, MODES, VISCOSITY = 64, 12, 0.1


def burgers(key, cases):
    """Draw smooth functions, and what the equation makes of them."""
    k = jnp.arange(1, 6)
    x = 2 * jnp.pi * jnp.arange(GRID) / GRID
    waves = jnp.concatenate([jnp.sin(k * x[:, None]), jnp.cos(k * x[:, None])], 1)
    integrals = jnp.concatenate([-jnp.cos(k * x[:, None]), jnp.sin(k * x[:, None])], 1)
    decay = jnp.tile(0.4 / k, 2)
    factors = decay * jax.random.normal(key, (cases, 10))
    start, potential = factors @ waves.T, factors @ (integrals / jnp.tile(k, 2)).T
    frequency = jnp.arange(GRID // 2 + 1)
    heated = jnp.fft.rfft(jnp.exp(-potential / (2 * VISCOSITY)))
    heated = heated * jnp.exp(-VISCOSITY * frequency**2)
    phi = jnp.fft.irfft(heated)
    return start, -2 * VISCOSITY * jnp.fft.irfft(1j * frequency * heated) / phi


class Spectral(nn.Module):
    """Multiplies the lowest Fourier modes, each by a matrix of its own."""

    @nn.compact
    def __call__(self, x):
        shape, width = (MODES, x.shape[-1], x.shape[-1]), x.shape[-1]
        init = nn.initializers.normal(1 / width)
        real, imaginary = (self.param(n, init, shape) for n in ("real", "imaginary"))
        modes = jnp.fft.rfft(x, axis=1)[:, :MODES]
        modes = jnp.einsum("nki,kio->nko", modes, jax.lax.complex(real, imaginary))
        return jnp.fft.irfft(modes, n=GRID, axis=1)


class FourierOperator(nn.Module):
    width: int = 12

    @nn.compact
    def __call__(self, u):
        place = jnp.broadcast_to(jnp.linspace(0, 1, GRID, endpoint=False), u.shape)
        x = nn.Dense(self.width)(jnp.stack([u, place], axis=-1))
        for _ in range(3):
            x = nn.gelu(Spectral()(x) + nn.Dense(self.width)(x))
        return nn.Dense(1)(nn.gelu(nn.Dense(32)(x)))[..., 0]


batch = burgers(jax.random.key(0), 200)
module = FourierOperator()
params = module.init(jax.random.key(1), batch[0])
objective = hfjax.Objective(module.apply, hfjax.losses.squared_error())
found(objective, params, batch)
params = race("Fourier operator", objective, params, batch)

start, end = burgers(jax.random.key(2), 3)
figure, axes = plt.subplots(1, 3, figsize=(9, 2), layout="constrained", sharey=True)
for axis, *lines in zip(axes, start, end, module.apply(params, start), strict=True):
    for line, style, label in zip(
        lines, ("0.7", "k", "C0--"), ("t = 0", "t = 1", "hfjax"), strict=True
    ):
        axis.plot(line, style, label=label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xticks=[])
axes[0].legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# ## A variational autoencoder
#
# Its outputs are the image and the two arrays that describe the distribution of the code.
# `losses.tree` gives each its own loss, both in closed form. The noise is part of the
# inputs, one draw for each example: within an update f has to stay the same function.


# %%
class Autoencoder(nn.Module):
    codes: int = 4

    @nn.compact
    def __call__(self, inputs):
        image, noise = inputs
        hidden = nn.tanh(nn.Dense(64)(image))
        mean, log_variance = nn.Dense(self.codes)(hidden), nn.Dense(self.codes)(hidden)
        code = mean + noise * jnp.exp(log_variance / 2)
        logits = nn.Dense(image.shape[-1])(nn.tanh(nn.Dense(64)(code)))
        return {"pixels": logits, "code": (mean, log_variance)}


images = jnp.clip(shapes(jax.random.key(3), 500)[0].reshape(500, -1), 0, 1)
noise = jax.random.normal(jax.random.key(4), (500, 4))
batch = ((images, noise), {"pixels": images, "code": None})
loss_of_both = hfjax.losses.tree(
    {
        "pixels": hfjax.losses.sigmoid_cross_entropy(),
        "code": hfjax.losses.gaussian_kl_divergence(),
    }
)
module = Autoencoder()
params = module.init(jax.random.key(5), batch[0])
objective = hfjax.Objective(module.apply, loss_of_both)
found(objective, params, batch)
race("autoencoder", objective, params, batch)

# %% [markdown]
# ## A graph network
#
# Graphs of unequal size are padded to the largest and stacked, and the model is written
# for one graph and mapped over them. Each has up to ten points in space; the target is the
# energy of a soft attraction between neighbours.


# %%
def graphs(key, cases, most=10):
    keys = jax.random.split(key, 2)
    place = jax.random.normal(keys[0], (cases, most, 3))
    count = jax.random.randint(keys[1], (cases, 1), 4, most + 1)
    real = jnp.arange(most) < count
    gap = place[:, :, None] - place[:, None]
    distance = jnp.sqrt(jnp.sum(gap**2, -1) + 1e-6)
    pairs = real[:, :, None] & real[:, None] & ~jnp.eye(most, dtype=bool)
    edges = jnp.where(pairs & (distance < 2), 1.0, 0.0)
    energy = -jnp.sum(edges * jnp.exp(-(distance**2)), axis=(1, 2)) / 2
    return (distance, edges, real.astype(jnp.float32)), energy[:, None]


class GraphNetwork(nn.Module):
    @nn.compact
    def __call__(self, graph):
        distance, edges, real = graph
        nodes = jnp.ones((*real.shape, 16))
        for _ in range(2):
            size = (*distance.shape, 16)
            pairs = jnp.concatenate(
                [
                    jnp.broadcast_to(nodes[:, None], size),
                    jnp.broadcast_to(nodes[None], size),
                    distance[..., None],
                ],
                axis=-1,
            )
            messages = nn.Dense(16)(nn.silu(nn.Dense(32)(pairs)))
            incoming = jnp.einsum("ij,ijk->ik", edges, messages)
            both = jnp.concatenate([nodes, incoming], axis=-1)
            nodes = nodes + nn.Dense(16)(nn.silu(nn.Dense(32)(both)))
        return nn.Dense(1)(real @ nodes)


batch = graphs(jax.random.key(6), 300)
module = GraphNetwork()
first = jax.tree.map(lambda leaf: leaf[0], batch[0])
params = module.init(jax.random.key(7), first)
objective = hfjax.Objective(
    lambda params, inputs: jax.vmap(lambda graph: module.apply(params, graph))(inputs),
    hfjax.losses.squared_error(),
)
found(objective, params, batch)
race("graph network", objective, params, batch)

# %% [markdown]
# ## All of them
#
# f against the seconds of training. Compiling is not counted; it is printed above, and takes
# hfjax some five times as long as Adam.

# %%
figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
for axis, (name, runs) in zip(axes.flat, RUNS.items(), strict=True):
    for (label, rows), colour in zip(runs.items(), ("k", "C1"), strict=True):
        seconds, values = np.array(rows).T
        axis.plot(seconds, np.minimum.accumulate(values), color=colour, label=label)
    axis.set(title=name, yscale="log", xlabel="seconds", ylabel="lowest f so far")
    axis.spines[["top", "right"]].set_visible(False)
axes[0, 0].legend(frameon=False)
plt.show()

# %% [markdown]
# Where many small steps pay, Adam is ahead: on the transformer, whose batches can be small, on
# the variational autoencoder and, in these few seconds, on the graph network. On the
# convolutional network and on the operator hfjax gets to a precision that Adam does not. With
# the adapters alone its first update goes too far, and later ones gain little. One option of
# the search for λ prevents this, and brings hfjax level with Adam: see
# [low-rank adapters](../docs/models.md#low-rank-adapters).
#
# Six seconds are ten to thirty updates of hfjax. Once its curves fall, they keep falling here:
# set `SECONDS` higher to see whether the lines cross. [How to choose](../docs/choosing.md) has
# figures of longer runs.
