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
# # Flax in five minutes
#
# A small network of Flax, trained by hfjax: the loop, a live line, the pictures, and the
# same seconds of Adam beside it. First a function to be fitted to high precision, where
# Hessian-free optimisation is at home; then a classification, where it is not needed.

# %%
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import hfjax
from hfjax.flax import nnx_model_fn

plt.rcParams["figure.dpi"] = 66

# %% [markdown]
# ## Data and model
#
# A function of two variables, at 500 points to learn from and at 500 others to test on.

# %%
x = jax.random.uniform(jax.random.key(0), (1000, 2))
t = jnp.sin(6 * x[:, :1]) * x[:, 1:]
train, test = (x[:500], t[:500]), (x[500:], t[500:])

figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
shades = axis.tricontourf(*x.T, t[:, 0], levels=8, cmap="coolwarm")
figure.colorbar(shades, label="target")
axis.set(xlabel="first variable", ylabel="second variable")
plt.show()


# %%
def network(outputs):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(2, 32, rngs=rngs),
        nnx.tanh,
        nnx.Linear(32, 32, rngs=rngs),
        nnx.tanh,
        nnx.Linear(32, outputs, rngs=rngs),
    )


model = network(outputs=1)

# %% [markdown]
# ## Objective, optimizer, step
#
# hfjax needs to know f as a whole, model and loss: gradient, curvature and the check of
# each step have to be of the same function. `nnx_model_fn` makes a pure function of the
# module; `squared_error` is half the squared error, and f its mean over the cases.
#
# The step is what it is with any other optimizer of Optax, and one word longer:
# `batch=batch`.

# %%
objective = hfjax.Objective(nnx_model_fn(model), hfjax.losses.squared_error())
tx = hfjax.hessian_free(objective)
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, batch):
    params = nnx.state(model, nnx.Param)
    value, grads = objective.value_and_grad(params, batch)
    optimizer.update(model, grads, batch=batch)
    return value


# %% [markdown]
# The first call compiles, which takes longer than the training below. Here it is done on
# a copy, so that the clock of the run starts when training does.

# %%
start = time.perf_counter()
train_step(*nnx.clone((model, optimizer)), train).block_until_ready()
compiling = time.perf_counter() - start
print(f"compiled, and one update: {compiling:.1f} s")

# %% [markdown]
# ## The loop
#
# `History.record` reads what an update did out of the optimizer's state, and takes
# numbers of yours, as `error`. `diagnostics.line` makes a line of it for a progress bar:
# f, λ, ρ (how well the quadratic model predicted the change of f: 1 is exactly), the
# iterations of conjugate gradients, and the step size α. It changes in place while the
# loop runs; its last state is left.

# %%
test_value = jax.jit(objective.value)
test_value(nnx.state(model, nnx.Param), test).block_until_ready()

history = hfjax.diagnostics.History()
bar = tqdm(range(60), file=sys.stdout, ncols=100, bar_format="{n_fmt}{postfix}")
for _ in bar:
    train_step(model, optimizer, train)
    error = float(test_value(nnx.state(model, nnx.Param), test))
    row = history.record(optimizer.opt_state, error=error)
    bar.set_postfix_str(hfjax.diagnostics.line(row))

# %% [markdown]
# Every update as a line of text is `print(hfjax.diagnostics.table(history))`; here the
# first and the last few of them.

# %%
print(hfjax.diagnostics.table(history[:4] + history[-4:]))

# %% [markdown]
# ## Pictures
#
# Falling λ and ρ near 1 are a healthy run. As f falls, the quadratic model is trusted
# further, and conjugate gradients run longer.

# %%
hfjax.diagnostics.plot(history)

# %% [markdown]
# The same run against time and against products with the curvature matrix, which are
# what an update costs. `error` is the objective at the test points.

# %%
hfjax.diagnostics.plot_progress(history)

# %% [markdown]
# ## Adam, given the same seconds
#
# A hundred steps of Adam in one compiled loop, so that Python does not hold it up, on all
# cases or on 50 drawn at random, at three learning rates each. All start from the same
# weights. The table has each run of Adam at its lowest f.


# %%
def adam_runs(objective, params, train, measure, seconds, sizes):
    """Run Adam for some seconds at each rate and batch size; return rows by name."""
    adam = optax.scale_by_adam()
    cases = len(train[0])

    def hundred_steps(params, state, rate, key, size):
        def one(carry, key):
            params, state = carry
            chosen = jax.random.randint(key, (size,), 0, cases)
            part = jax.tree.map(lambda leaf: leaf[chosen], train)
            _, grads = objective.value_and_grad(
                params, train if size == cases else part
            )
            updates, state = adam.update(grads, state)
            return (
                jax.tree.map(lambda p, u: p - rate * u, params, updates),
                state,
            ), None

        return jax.lax.scan(one, (params, state), jax.random.split(key, 100))[0]

    compiled = jax.jit(hundred_steps, static_argnames="size")
    runs = {}
    for size in sizes:
        for rate in (1e-3, 3e-3, 1e-2):
            now = params, adam.init(params)
            jax.block_until_ready(compiled(*now, rate, jax.random.key(0), size))
            rows, start = [], time.perf_counter()
            while not rows or rows[-1]["seconds"] < seconds:
                now = compiled(*now, rate, jax.random.key(len(rows)), size)
                value, error = measure(now[0])
                rows.append(
                    {
                        "seconds": time.perf_counter() - start,
                        "steps": 100 * (len(rows) + 1),
                        "f": value,
                        "error": error,
                    }
                )
            runs[f"Adam {rate:g}, {size} cases"] = rows
    return runs


def compare(history, runs, compiling):
    """Print where each run got to, Adam at its lowest f; return the best Adam's name."""
    print(f"{'':26s}{'seconds':>8s}{'updates':>9s}{'f':>10s}{'test error':>12s}")
    last = history[-1]
    print(
        f"{'hfjax':26s}{last['seconds']:8.2f}{len(history):9d}"
        f"{last['value_after']:10.2g}{last['error']:12.2g}"
    )
    lowest = {name: min(rows, key=lambda row: row["f"]) for name, rows in runs.items()}
    for name, row in lowest.items():
        print(
            f"{name:26s}{row['seconds']:8.2f}{row['steps']:9d}"
            f"{row['f']:10.2g}{row['error']:12.2g}"
        )
    best = min(lowest, key=lambda name: lowest[name]["f"])
    speed = runs[best][-1]["steps"] / runs[best][-1]["seconds"]
    print(f"Compiling apart. That of hfjax took {compiling:.1f} s,")
    print(f"in which the best Adam takes another {compiling * speed:,.0f} steps.")
    return best


def measure(params):
    return float(test_value(params, train)), float(test_value(params, test))


params = nnx.state(network(outputs=1), nnx.Param)
runs = adam_runs(objective, params, train, measure, history[-1]["seconds"], (500, 50))
best = compare(history, runs, compiling)

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for name, rows in runs.items():
    best_of_it = name == best
    axis.plot(
        [row["seconds"] for row in rows],
        np.minimum.accumulate([row["f"] for row in rows]),
        color="tab:orange" if best_of_it else "0.75",
        lw=1.5 if best_of_it else 0.8,
        zorder=2 if best_of_it else 1,
        label=f"{name} (best)" if best_of_it else None,
    )
axis.plot([], [], color="0.75", lw=0.8, label="Adam, other settings")
axis.plot(
    [row["seconds"] for row in history],
    [row["value_after"] for row in history],
    "k.-",
    lw=1.5,
    ms=3,
    label="hfjax",
)
axis.set(xlabel="seconds of training", ylabel="lowest f so far", yscale="log")
axis.legend(frameon=False, fontsize="small")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Adam is ahead at first, and stays behind where high precision is asked for. Seconds are
# of the machine that this ran on, and of this size of problem: compare within the picture.
# And count compiling, where a program is run once: 70,000 steps of Adam, about what fits
# into that time, came to 1e-7 when they were tried (not shown).
#
# ## A classification
#
# Three arms of a spiral, 600 points with noise, 2,000 others to test on. Another loss and
# three outputs; nothing else changes. A little weight decay belongs into the objective,
# and not into the gradient: without it f has no minimum once all points are on the right
# side.


# %%
def spiral(key, cases):
    keys = jax.random.split(key, 3)
    arm = jax.random.randint(keys[0], (cases,), 0, 3)
    radius = jnp.sqrt(jax.random.uniform(keys[1], (cases,)))
    angle = 2 * jnp.pi * (arm / 3 + radius) + 0.25 * jax.random.normal(
        keys[2], (cases,)
    )
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1), arm


points, others = spiral(jax.random.key(3), 600), spiral(jax.random.key(4), 2000)
model = network(outputs=3)
objective = hfjax.Objective(
    nnx_model_fn(model),
    hfjax.losses.softmax_cross_entropy_with_integer_labels(),
    weight_decay=1e-4,
)
optimizer = nnx.Optimizer(model, hfjax.hessian_free(objective), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, batch):
    params = nnx.state(model, nnx.Param)
    value, grads = objective.value_and_grad(params, batch)
    optimizer.update(model, grads, batch=batch)
    return value


@jax.jit
def value_and_error(params):
    chosen = jnp.argmax(objective.model_fn(params, others[0]), axis=1)
    return objective.value(params, points), jnp.mean(chosen != others[1])


def measure(params):
    return tuple(map(float, value_and_error(params)))


params = nnx.state(network(outputs=3), nnx.Param)
measure(params)
start = time.perf_counter()
train_step(*nnx.clone((model, optimizer)), points).block_until_ready()
compiling = time.perf_counter() - start

history = hfjax.diagnostics.History()
for _ in range(40):
    train_step(model, optimizer, points)
    error = measure(nnx.state(model, nnx.Param))[1]
    history.record(optimizer.opt_state, error=error)

seconds = history[-1]["seconds"]
runs = adam_runs(objective, params, points, measure, seconds, (600, 100))
best = compare(history, runs, compiling)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, rows, colour in (
    ("hfjax", history, "black"),
    (best, runs[best], "tab:orange"),
):
    left.plot(
        [row["seconds"] for row in rows],
        [row["error"] for row in rows],
        ".-",
        color=colour,
        ms=3,
        lw=1.2,
        label=name,
    )
left.set(
    xlabel="seconds of training", ylabel="share of test points wrong", ylim=(0, None)
)
left.legend(frameon=False, fontsize="small")
left.spines[["top", "right"]].set_visible(False)

side = jnp.linspace(-1.1, 1.1, 150)
grid = jnp.stack(jnp.meshgrid(side, side), axis=-1)
classes = jnp.argmax(model(grid.reshape(-1, 2)), axis=1).reshape(150, 150)
pale, full = ["#d9ede4", "#fbe3cf", "#e6e3f1"], ["#1b9e77", "#d95f02", "#7570b3"]
right.contourf(side, side, classes, levels=[-0.5, 0.5, 1.5, 2.5], colors=pale)
for arm, colour in enumerate(full):
    right.plot(*points[0][points[1] == arm].T, ".", color=colour, ms=3)
right.set(aspect="equal", xticks=[], yticks=[], title="hfjax: points and classes")
plt.show()

# %% [markdown]
# At the end there is little between them, and Adam is there first, and compiles sooner.
# Where some hundreds of cheap steps solve a task, and test error is all that counts, use
# Adam: [how to choose](../docs/choosing.md) says more, with figures.
#
# ## The knobs
#
# All are arguments of `hessian_free`. Most people change none of them; `recipes` has the
# choices of Martens & Sutskever (2012), in one call.
#
# | argument | what it means | turn it when | module |
# |---|---|---|---|
# | `damping` | λ: how far the quadratic model is trusted, found by itself | λ starts at 1: a first guess that is far off costs some evaluations of f | [`damping`](../docs/api/damping.md) |
# | `solver` | conjugate gradients: how many iterations, when to stop | all runs end at `max_iterations`; memory is short: `iterates.best()` | [`cg`](../docs/api/cg.md), [`stopping`](../docs/api/stopping.md) |
# | `preconditioner` | Kronecker factors of the layers, which evens out the scales of parameters | small batches: `kronecker(decay=0.95)`; compiling takes too long: `None` | [`preconditioners`](../docs/api/preconditioners.md) |
# | `backtracking` | which λ, or which iterate of conjugate gradients, is taken | hardly ever | [`backtracking`](../docs/api/backtracking.md), [`iterates`](../docs/api/iterates.md) |
# | `line_search` | how far along the step | hardly ever | [`linesearch`](../docs/api/linesearch.md) |
# | `learning_rate` | the first step size tried, 1 | small batches near the end: lower it by a schedule | [`transform`](../docs/api/transform.md) |
# | `curvature` | Gauss-Newton, or the Hessian | hardly ever | [`curvature`](../docs/api/curvature.md) |
# | `Objective(weight_decay=…)` | ½ β ‖θ‖², part of f | as with any optimizer | [`objective`](../docs/api/objective.md) |
# | `Objective(microbatch_size=…)` | how many cases at once | memory is short | [`objective`](../docs/api/objective.md) |
# | `update(…, eval_batch=…)` | data that steps are checked on | batches are small | [`minibatching`](../docs/api/minibatching.md) |
#
# ## Where to go next
#
# - [Your model](04_fine_tune.ipynb): a transformer, a convolutional network with batch
#   normalisation, a Fourier operator, an autoencoder and a graph network, beside Adam.
# - [Swapping parts](07_swap_a_part.ipynb): what each of these does to one problem.
# - [Debugging](11_debugging.ipynb): a run that does not learn, and how to find out why.
# - [A differential equation to 10⁻⁶](03_equation.ipynb), and [inverse
#   problems](02_fit_to_rounding.ipynb) with error bars.
# - [The deep autoencoder](05_deep_autoencoder.ipynb), [recurrent networks](06_long_memory.ipynb),
#   [many devices](09_devices.ipynb), [checkpoints](10_checkpoints.ipynb).
# - [The maths of one update](../docs/maths.md).
#
# ## The three lines that most people need
#
# ```python
# objective = hfjax.Objective(nnx_model_fn(model), hfjax.losses.squared_error())
# optimizer = nnx.Optimizer(model, hfjax.hessian_free(objective), wrt=nnx.Param)
# optimizer.update(model, grads, batch=batch)  # in the step, under nnx.jit
# ```
#
# with `value, grads = objective.value_and_grad(nnx.state(model, nnx.Param), batch)`.
