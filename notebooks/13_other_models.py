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
# # Does it work with my model?
#
# You see hfjax on four models as people write them: a convolutional network with batch
# normalisation, a Fourier neural operator, a variational autoencoder and a graph network. You
# learn what each of them needs, and how hfjax compares with Adam; this takes about three minutes
# on one core.
#
# For each model, `found` prints what the preconditioner finds, and `race` runs both optimizers on
# the same f, from the same start, for the same seconds. hfjax runs with its defaults on all
# examples. Adam has minibatches of 50 and the better of two learning rates. f is the training
# loss, and seconds are processor seconds. A [transformer](04_fine_tune.ipynb) has its own
# notebook.

# %%
import os
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hfjax

# Before the first computation: on a CPU this compiles a third faster.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
plt.rcParams["figure.dpi"] = 72
SECONDS = 4.0
RUNS = {}

# %% [markdown]
# ## The functions for all of them


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


def hfjax_run(objective, params, batch):
    """Train with hfjax; return parameters, f after each update, seconds to compile."""
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
    while rows[-1][0] < SECONDS:
        params, state, _ = step(params, state, batch)
        value = float(state.info.value_after)
        rows.append((time.process_time() - start, value))
    return params, rows, compiling


def adam_runs(objective, params, batch, rates, size=50, steps=50):
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
        while not rows or rows[-1][0] < SECONDS:
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


# %% [markdown]
# ## A convolutional network with batch normalisation
#
# Batch normalisation makes each output depend on the whole batch. Pass `whole_batch=True`: f, its
# gradient and its curvature are then computed on the batch as a whole. You do not need it if you
# train with the running statistics: see [models that change between
# updates](../docs/changing.md).


# %%
def shapes(key, count, side=16):
    """Draw noisy rings, crosses and bars, and which they are."""
    keys = jax.random.split(key, 4)
    kind = jax.random.randint(keys[0], (count,), 0, 3)
    middle = jax.random.uniform(keys[1], (count, 1, 1, 2), minval=5, maxval=11)
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


loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
objective = hfjax.Objective(model_fn, loss, whole_batch=True)
found(objective, variables["params"], batch)
_ = race("convolutions", objective, variables["params"], batch)


# %% [markdown]
# ## A Fourier neural operator
#
# The operator maps u at t = 0 to u at t = 1, for Burgers' equation uₜ + u uₓ = ν uₓₓ on a circle. The
# substitution of Hopf and Cole makes exact data. Each Fourier mode has a complex kernel.
# Parameters must be real, so it is stored as a real and an imaginary part.


# %%
GRID, MODES, VISCOSITY = 64, 12, 0.1


def burgers(key, count):
    """Draw smooth functions, and what the equation makes of them."""
    k = jnp.arange(1, 6)
    x = 2 * jnp.pi * jnp.arange(GRID) / GRID
    waves = jnp.concatenate([jnp.sin(k * x[:, None]), jnp.cos(k * x[:, None])], 1)
    integrals = jnp.concatenate([-jnp.cos(k * x[:, None]), jnp.sin(k * x[:, None])], 1)
    decay = jnp.tile(0.4 / k, 2)
    factors = decay * jax.random.normal(key, (count, 10))
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
params = race("Fourier operator", objective, params, batch)["hfjax"]

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
# Its outputs are the image, and the mean and variance of the code. `losses.tree` gives each of them
# its own loss. The noise is part of the inputs, one draw for each example, because f must stay
# the same function within an update.


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
_ = race("autoencoder", objective, params, batch)

# %% [markdown]
# ## A graph network
#
# Each graph has up to ten points in space, and the target is the energy of a soft attraction
# between neighbours. Graphs of unequal size are padded to the largest and stacked. The model is
# written for one graph, and `vmap` maps it over all of them.


# %%
def graphs(key, count, most=10):
    keys = jax.random.split(key, 2)
    place = jax.random.normal(keys[0], (count, most, 3))
    nodes = jax.random.randint(keys[1], (count, 1), 4, most + 1)
    real = jnp.arange(most) < nodes
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
_ = race("graph network", objective, params, batch)

# %% [markdown]
# ## All four
#
# Compiling does not count here. It is printed above.

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
for axis, (name, runs) in zip(axes.flat, RUNS.items(), strict=True):
    for (label, rows), colour in zip(runs.items(), ("k", "C1"), strict=True):
        seconds, values = np.array(rows).T
        axis.plot(seconds, np.minimum.accumulate(values), color=colour, label=label)
    axis.set(title=name, yscale="log", xlabel="seconds", ylabel="lowest f so far")
    axis.spines[["top", "right"]].set_visible(False)
axes.flat[0].legend(frameon=False)
plt.show()

# %% [markdown]
# All four models train with the defaults of hfjax, and nearly all of their parameters have
# Kronecker factors. In these four seconds hfjax gets much lower than Adam on the convolutional network
# and on the operator. On the autoencoder the two are about level. On the graph network Adam is ahead,
# though hfjax still falls fast. hfjax takes three to four times as long to compile.
#
# Four seconds are few. Set `SECONDS` higher to see whether the lines cross. [How to
# choose](../docs/choosing.md) has figures of longer runs, and [models](../docs/models.md) lists the
# layers that get Kronecker factors.
