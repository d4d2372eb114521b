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
# # How do I train a Flax model with hfjax?
#
# You train a small Flax network with one call, then with your own loop, and learn to read the
# pictures of a run. This takes about a minute on one core, most of it for compiling.

# %%
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from tqdm import tqdm

import hfjax
from hfjax.flax import nnx_model_fn

plt.rcParams["figure.dpi"] = 66

# A function of two variables: 500 points to learn from, and 500 others to test on.
x = jax.random.uniform(jax.random.key(0), (1000, 2))
t = jnp.sin(6 * x[:, :1]) * x[:, 1:]
train, test = (x[:500], t[:500]), (x[500:], t[500:])


def network():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(2, 32, rngs=rngs),
        nnx.tanh,
        nnx.Linear(32, 32, rngs=rngs),
        nnx.tanh,
        nnx.Linear(32, 1, rngs=rngs),
    )


model = network()

# f is half the mean squared error. hfjax needs model and loss as one function.
objective = hfjax.Objective(nnx_model_fn(model), hfjax.losses.squared_error())
fit = hfjax.fit(objective, nnx.state(model, nnx.Param), train, updates=60)
test_value = jax.jit(objective.value)
print(f"f: {fit.history.value[0]:.3f} -> {fit.value:.1e} in 60 updates")
print(f"f at the test points: {test_value(fit.params, test):.1e}")

# %%
side = jnp.linspace(0, 1, 60)
grid = jnp.stack(jnp.meshgrid(side, side), axis=-1)
found = objective.model_fn(fit.params, grid.reshape(-1, 2)).reshape(60, 60)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(np.append(fit.history.value, fit.value), "k.-", ms=3, lw=1)
left.set(xlabel="update", ylabel="objective f")
left.spines[["top", "right"]].set_visible(False)
shades = right.contourf(side, side, found, levels=11, cmap="coolwarm")
figure.colorbar(shades)
right.plot(*train[0].T, "k.", ms=1.5, alpha=0.5)
right.set(title="the trained network, and its 500 points", aspect="equal")
plt.show()

# %% [markdown]
# `fit.params` holds the trained parameters; `nnx.update(model, fit.params)` puts them into the
# model. `hfjax.fit` also stops at a tolerance, reports progress and goes on from an earlier fit: see
# [its page](../docs/api/fit.md).
#
# ## Your own loop
#
# hfjax is an Optax optimizer, so it fits into the loop that you have. There is one more word than
# usual, `batch=batch`. Take the gradient from `objective.value_and_grad`: gradient, curvature and the
# check of each step must belong to the same function.

# %%
model = network()
optimizer = nnx.Optimizer(model, hfjax.hessian_free(objective), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, batch):
    params = nnx.state(model, nnx.Param)
    value, grads = objective.value_and_grad(params, batch)
    optimizer.update(model, grads, batch=batch)
    return value


# The first call compiles. Make it on a copy, so that compiling does not count below.
begin = time.perf_counter()
train_step(*nnx.clone((model, optimizer)), train).block_until_ready()
compiling = time.perf_counter() - begin

history = hfjax.diagnostics.History()
bar = tqdm(range(60), file=sys.stdout, ncols=100, bar_format="{n_fmt}{postfix}")
for _ in bar:
    train_step(model, optimizer, train)
    error = float(test_value(nnx.state(model, nnx.Param), test))
    row = history.record(optimizer.opt_state, error=error)
    bar.set_postfix_str(hfjax.diagnostics.line(row))

# %% [markdown]
# `History.record` reads from the optimizer's state what an update did, and adds numbers of your
# own, such as `error`. Here are the first and the last few updates:

# %%
print(hfjax.diagnostics.table(history[:4] + history[-4:]))

# %% [markdown]
# - **f** is the objective after the update.
# - **λ** is the damping. The lower it is, the further the quadratic model of f is trusted. It falls in
#   a healthy run.
# - **ρ** is the decrease of f over the decrease that the model predicted. It should be near 1.
# - **CG** counts the iterations of conjugate gradients. They become more as λ falls.
# - **α** is the step size, mostly 1.

# %%
hfjax.diagnostics.plot(history)

# %% [markdown]
# ## The options
#
# All are arguments of `hessian_free`, `Objective` or `update`. Most people change none of them.
#
# | argument | meaning | change it if | module |
# |---|---|---|---|
# | `damping` | λ, by default searched for in each update | λ starts at 1: a far better first guess saves some evaluations of f | [`damping`](../docs/api/damping.md) |
# | `solver` | conjugate gradients: how many iterations, when to stop; or an exact solver | all runs end at `max_iterations`; `"auto"` solves small problems exactly | [`cg`](../docs/api/cg.md), [`sample_space`](../docs/api/sample_space.md) |
# | `preconditioner` | Kronecker factors of the layers, which even out the scales of parameters | small batches: `kronecker(decay=0.95)`; compiling takes too long: `None` | [`preconditioners`](../docs/api/preconditioners.md) |
# | `backtracking`, `line_search` | which iterate is taken, and how far along the step | hardly ever | [`backtracking`](../docs/api/backtracking.md), [`linesearch`](../docs/api/linesearch.md) |
# | `learning_rate` | the first step size tried, 1 | small batches near the end: lower it by a schedule | [`transform`](../docs/api/transform.md) |
# | `curvature` | Gauss-Newton, or the Hessian | hardly ever | [`curvature`](../docs/api/curvature.md) |
# | `Objective(weight_decay=…)` | ½ β ‖θ‖², a part of f | you want weight decay: never add it to the gradient | [`objective`](../docs/api/objective.md) |
# | `Objective(microbatch_size=…)` | how many examples are computed at once | memory is short | [`objective`](../docs/api/objective.md) |
# | `update(…, eval_batch=…)` | the data on which steps are checked | batches are small | [`minibatching`](../docs/api/minibatching.md) |
#
# `hfjax.recipes` has the choices of Martens & Sutskever (2012), in one call.
#
# ## Where to go next
#
# | | question |
# |---|---|
# | [2](02_fit_to_rounding.ipynb) | How do I fit parameters to data, with error bars? |
# | [3](03_equation.ipynb) | Can a network solve an equation to twelve digits? |
# | [4](04_fine_tune.ipynb) | How do I fine-tune a Flax model? |
# | [5](05_deep_autoencoder.ipynb) | How does a Hessian-free run train a deep autoencoder? |
# | [6](06_long_memory.ipynb) | Can a recurrent network learn to remember? |
# | [7](07_swap_a_part.ipynb) | What changes when I swap a part? |
# | [8](08_look_inside.ipynb) | What does an update see? |
# | [9](09_devices.ipynb) | Does it compute the same on many devices? |
# | [10](10_checkpoints.ipynb) | Can a killed run continue as if nothing had happened? |
# | [11](11_debugging.ipynb) | Why does my run not learn? |
# | [12](12_burgers.ipynb) | Can a network solve an equation whose solution has a front? |
# | [13](13_other_models.ipynb) | Does it work with my model? |
#
# If a few hundred cheap steps solve your task, and only the test error counts, use Adam: [how to
# choose](../docs/choosing.md) has figures for and against hfjax. [The maths](../docs/maths.md) explains
# one update.
