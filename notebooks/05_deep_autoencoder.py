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
# # A deep autoencoder
#
# The problem that Hessian-free optimisation became known by (Martens 2010): images of
# curves go through a code of six numbers, and should come out again. It is a small one
# here, 16 × 16 pixels and 2,000 images, to take less than a minute on two free cores;
# `python -m benchmarks compare`, in a checkout, has 28 × 28 pixels and the layers of
# the paper.

# %%
import itertools
import time

import IPython
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hfjax
from hfjax import diagnostics

plt.rcParams["figure.dpi"] = 72

# %% [markdown]
# ## Images
#
# Three random points make a curve, the quadratic through them, drawn in ink of a soft
# pen. Six numbers are all there is to know about an image.

# %%
SIDE = 16


def curves(rng, cases):
    """Draw images, `[cases, pixels]`, of values from 0 to 1."""
    points = 2.5 + rng.uniform(size=(cases, 3, 2)) * (SIDE - 6)
    t = np.linspace(0, 1, 100)[:, None]
    basis = (2 * (t - 0.5) * (t - 1), 4 * t * (1 - t), 2 * t * (t - 0.5))
    path = np.concatenate(basis, axis=1) @ points
    middles = (path[:, 1:] + path[:, :-1]) / 2
    lengths = np.linalg.norm(np.diff(path, axis=1), axis=-1)
    pen = np.exp(-((middles[..., None] - np.arange(SIDE)) ** 2))  # of rows, of columns
    rows, columns = pen[:, :, 1] * lengths[..., None], pen[:, :, 0]
    return jnp.asarray(1 - np.exp(-(rows.mT @ columns))).reshape(cases, -1)


rng = np.random.default_rng(0)
train, test = curves(rng, 2000), curves(rng, 500)


def show(rows):
    """Draw the first ten images of each row."""
    _, grid = plt.subplots(
        len(rows),
        10,
        figsize=(8, 0.87 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for axes, (name, images) in zip(grid, rows.items(), strict=True):
        for axis, image in zip(axes, images[:10], strict=True):
            axis.imshow(image.reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name)
    plt.show()


show({"training": train})

# %% [markdown]
# ## Network
#
# 256-100-50-25-6 and back: logistic units, but for the code, which is linear. In the
# sparse start each unit has 15 incoming weights, and all others are zero.

# %%
SIZES = (SIDE**2, 100, 50, 25, 6, 25, 50, 100, SIDE**2)


def init(key):
    sparse = hfjax.initializers.sparse()
    return [
        {"kernel": sparse(key, shape), "bias": jnp.zeros(shape[1])}
        for key, shape in zip(
            jax.random.split(key, len(SIZES) - 1),
            itertools.pairwise(SIZES),
            strict=True,
        )
    ]


def model_fn(params, images):
    x = images
    for index, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        if index not in (3, 7):  # Neither the code nor the outputs, which are logits.
            x = jax.nn.sigmoid(x)
    return x


@jax.jit
def pixels(params, images):
    return jax.nn.sigmoid(model_fn(params, images))


@jax.jit
def error(params, images):
    """Squared error of an image, which is what Martens (2010) reports."""
    return jnp.mean(jnp.sum((pixels(params, images) - images) ** 2, axis=1))


start = jax.jit(init)(jax.random.key(0))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(start)):,} parameters")
print(f"squared error of the mean image: {jnp.sum(jnp.var(train, axis=0)):.2f}")

# %% [markdown]
# ## Objective
#
# Cross-entropy, summed over pixels, and Martens' weight decay. Pixels are shades of grey,
# so that even a perfect model has a cross-entropy: their entropy is the floor.

# %%
objective = hfjax.Objective(
    model_fn, hfjax.losses.sigmoid_cross_entropy(), weight_decay=2e-5
)
entropy = jax.scipy.special.entr(train) + jax.scipy.special.entr(1 - train)
floor = float(jnp.mean(jnp.sum(entropy, axis=1)))
value = jax.jit(lambda params: objective.value(params, (train, train)))
print(f"f at the start {value(start):.1f}, floor {floor:.2f}")

# %% [markdown]
# ## Training
#
# `recipes.martens2010` is his program, constant by constant. The gradient, the choice of
# the CG iterate and the line search are on all images, the curvature on a quarter of
# them, each in turn. The first call is for compiling; it does not count below.

# %%
tx = hfjax.recipes.martens2010(objective)


@jax.jit
def train_step(params, state, images):
    everything = (images, images)
    quarter = hfjax.minibatching.in_turn(everything, len(images) // 4, state.count)
    _, grads = objective.value_and_grad(params, everything)
    updates, state = tx.update(
        grads, state, params, batch=quarter, eval_batch=everything
    )
    return optax.apply_updates(params, updates), state


params, state = start, tx.init(start)
jax.block_until_ready((train_step(params, state, train), error(params, test)))

history = diagnostics.History()
for _ in range(36):
    params, state = train_step(params, state, train)
    history.record(state, error=float(error(params, test)))
print(hfjax.diagnostics.table(history[:6] + history[7::4]))

# %%
hfjax.diagnostics.plot(history)

# %% [markdown]
# λ starts at 45, on the safe side: steps are short, the model predicts them nearly to the
# digit (ρ near 1), and CG ends after some ten iterations. Ten updates are enough for the
# error of the mean image, which needs no code. Meanwhile λ falls by a third each time, the
# steps reach into directions of ever less curvature, and the code comes to be used.
#
# That has its price. CG needs more iterations the smaller λ is, and the model, made on
# 500 images, is less and less right about all 2,000. Near the end backtracking takes an
# early iterate of many runs, so that the rest of their work is lost; and where ρ drops
# below ¼, λ rises again.

# %%
print(f"squared error on test images after ten updates: {history[9]['error']:.2f}")
for low, high in ((1, 100), (0.1, 1), (0, 0.1)):
    # A row has the λ for the next update: the one before has this update's.
    rows = [
        row
        for before, row in itertools.pairwise(history)
        if low <= before["damping"] < high
    ]
    run, chosen = (
        np.mean([row[name] for row in rows])
        for name in ("cg_iterations", "chosen_iteration")
    )
    print(
        f"λ from {low:3g} to {high:3g}: {len(rows):2} updates, on average {run:5.1f} CG "
        f"iterations, of which the step has {chosen:4.1f}"
    )

# %% [markdown]
# ## Adam, in the same seconds
#
# Minibatches of 200, learning rate 0.003: of 0.0003, 0.001, 0.003, 0.01 and 0.03, each
# tried once by hand for 12 seconds of the processor, the one with the least error on the
# test images (on the training images 0.01 is a little better). No schedule was tried.

# %%
adam = optax.adam(3e-3)


@jax.jit
def hundred_steps(params, state, images, key):
    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, images, (200,))
        _, grads = objective.value_and_grad(params, (batch, batch))
        updates, state = adam.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jax.random.split(key, 100))[0]


adam_params, adam_state, adam_rows = start, adam.init(start), []
key = jax.random.key(1)
jax.block_until_ready(hundred_steps(start, adam_state, train, key))

began = time.perf_counter()
while not adam_rows or adam_rows[-1]["seconds"] < history[-1]["seconds"]:
    key, call_key = jax.random.split(key)
    adam_params, adam_state = hundred_steps(adam_params, adam_state, train, call_key)
    row = {"f": float(value(adam_params)), "error": float(error(adam_params, test))}
    adam_rows.append({**row, "seconds": time.perf_counter() - began})

# %%
figure = hfjax.diagnostics.plot_progress(history, floor=floor)
for axis, heights in (
    (figure.axes[0], [row["f"] - floor for row in adam_rows]),
    (figure.axes[2], [row["error"] for row in adam_rows]),
):
    axis.plot([row["seconds"] for row in adam_rows], heights, color="C1", label="Adam")
figure.axes[0].lines[0].set_label("hfjax")
figure.axes[0].legend(frameon=False)
figure.axes[2].set_ylabel("squared error, test")
IPython.display.display(figure)

# %%
print(f"{'':8}{'updates':>8}{'f − floor':>12}{'error, train':>14}{'error, test':>14}")
for name, final, updates in (
    ("hfjax", params, len(history)),
    ("Adam", adam_params, 100 * len(adam_rows)),
):
    print(
        f"{name:8}{updates:8,}{value(final) - floor:12.2f}{error(final, train):14.2f}"
        f"{error(final, test):14.2f}"
    )

# %% [markdown]
# Adam is ahead all along, and on both sets of images. So it is in the benchmark, on the
# larger images: see
# [`benchmarks/results/autoencoders.md`](../benchmarks/results/autoencoders.md). Data that can be cut
# into small batches are its ground.
#
# ## Reconstructions
#
# Test images, in the first row as they are.

# %%
show(
    {
        "test": test,
        "start": pixels(start, test),
        "hfjax": pixels(params, test),
        "Adam": pixels(adam_params, test),
    }
)

# %% [markdown]
# ## The curvature at the end
#
# The largest eigenvalues of the Gauss-Newton matrix on 500 images, by Lanczos' method, and
# its spectral density, for how many of all lie above a given λ. Both take products with
# vectors, as conjugate gradients do. Of one long vector they compile in less time.

# %%
vector, unravel = ravel_pytree(params)


@jax.jit
def spectrum(params, images):
    product = hfjax.curvature.ggn(objective, params, (images, images))

    def matvec(v):
        return ravel_pytree(product(unravel(v)))[0]

    largest = hfjax.spectrum.eigenvalues(
        matvec, vector, key=jax.random.key(0), num=40, num_iterations=100
    )
    density = hfjax.spectrum.density(
        matvec, vector, key=jax.random.key(1), num_probes=2, num_iterations=60
    )
    return largest, density


largest, density = spectrum(params, train[:500])
values, damping = largest.values, history[-1]["damping"]
print(f"residuals of the 40 largest: at most {jnp.max(largest.residuals):.1e}")
apart = int(jnp.argmax(values[:-1] / values[1:])) + 1
print(f"the widest gap is after {apart} of them")
hfjax.diagnostics.plot_spectrum(values, damping=damping)


# %%
def above(bound):
    """Count the eigenvalues above a bound: those known, else by the density."""
    if bound > values[-1]:
        return jnp.sum(values > bound)
    share = jnp.sum(density.weights * (density.nodes > bound), axis=1)
    return jnp.mean(share) * vector.size


for bound in (45, 1, damping):
    print(f"above λ = {bound:.2g}: {above(bound):.0f} of {vector.size:,} eigenvalues")

# %% [markdown]
# As many eigenvalues stand apart as the code has units. A λ of 45, as at the start, would
# leave few directions undamped, and without a preconditioner CG needs at most about an
# iteration for each. At the λ of the end there are far more: hence the longer runs.
