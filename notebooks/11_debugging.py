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
# # Why does my run not learn?
#
# You see six ways to spoil a run: how each looks in the diagnostics, what `hfjax.verify.check` says
# about it, and the cure. This takes a few minutes on one core.
#
# In short: call `check` once, before anything else. It finds faults of the set-up. Bad settings, and
# bad data for an update, show in λ, ρ and the iterations of conjugate gradients (CG).

# %%
import itertools
import textwrap

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hfjax
from hfjax.flax import nnx_model_fn

plt.rcParams["figure.dpi"] = 66

# %% [markdown]
# ## A healthy run
#
# A network learns a function of two variables from 400 points. Each point has a weight of 1, so that a
# smaller batch, below, only needs other weights and no new program.

# %%
count, units = 400, 16
x = jax.random.uniform(jax.random.key(0), (count, 2))
data = (x, jnp.sin(6 * x[:, :1]) * x[:, 1:], jnp.ones(count))

keys = jax.random.split(jax.random.key(1))
params = {
    "in": jnp.pad(2 * jax.random.normal(keys[0], (2, units)), ((0, 1), (0, 0))),
    "out": jnp.pad(jax.random.normal(keys[1], (units, 1)) / 4, ((0, 1), (0, 0))),
}


def with_one(x):
    """Append a 1 to each example: the last row of a matrix is then the bias."""
    return jnp.pad(x, ((0, 0), (0, 1)), constant_values=1)


def model_fn(params, x):
    hidden = jnp.tanh(with_one(x) @ params["in"])
    return with_one(hidden) @ params["out"]


def solver(max_iterations=250):
    """Return the solver of Martens & Sutskever (2012)."""
    return hfjax.cg.conjugate_gradient(
        max_iterations=max_iterations,
        stopping=hfjax.stopping.martens2010(),
        keep=hfjax.iterates.grid(),
        warm_start_decay=0.95,
    )


def optimizer(objective, **parts):
    """Return the optimizer with its update compiled, once for all runs below.

    Here ρ adapts λ, as in Martens & Sutskever (2012), so that a fault shows over many
    updates. By default, the optimizer searches for λ in each update, which would hide it.
    """
    parts = {
        "damping": hfjax.damping.levenberg_marquardt(),
        "solver": solver(),
        "preconditioner": hfjax.preconditioners.diagonal(),
        **parts,
    }
    tx = hfjax.hessian_free(objective, **parts)
    return tx._replace(update=jax.jit(tx.update))


loss = hfjax.losses.squared_error()
objective = hfjax.Objective(model_fn, loss)
tx = optimizer(objective)
value = jax.jit(objective.value)
gradient = jax.jit(lambda params, batch: objective.value_and_grad(params, batch)[1])


def train(grads_of, *, tx=tx, batch_of=lambda update: data, params=params, updates=50):
    """Train with the gradients and batches of these functions."""
    state, history = tx.init(params), hfjax.diagnostics.History()
    for update in range(updates):
        grads, batch = grads_of(params, update), batch_of(update)
        steps, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, steps)
        history.record(state, all_examples=float(value(params, data)))
    return history


def say(*arguments):
    """Print what `hfjax.verify.check` says."""
    for sentence in hfjax.verify.check(*arguments) or ["[]: nothing found."]:
        print(textwrap.fill(sentence, 88))


healthy = train(lambda params, update: gradient(params, data))
say(objective, tx, params, data, gradient(params, data))

# %%
plt.show()  # A notebook shows pictures of matplotlib once this has been called.
hfjax.diagnostics.plot(healthy)

# %% [markdown]
# f falls all the time. λ falls too, later more slowly. ρ is near 1 at first, and near the upper dashed
# line later. The runs of CG grow longer. α is mostly 1. A few updates that look different, here two,
# are no fault.


# %%
def compare(**runs):
    """Draw f on all examples, λ and ρ beside the healthy run, and print the last line."""
    axes = plt.subplots(1, 3, figsize=(8.2, 2.3), layout="constrained")[1]
    runs = {"healthy": healthy, **runs}
    colours = ["black", "tab:orange", "tab:blue", "tab:green"][: len(runs)]
    for (name, run), colour in zip(runs.items(), colours, strict=True):
        updates = [row["count"] for row in run]
        label = name.replace("_", " ")
        style = {"color": colour, "lw": 1.2, "label": label}
        axes[0].plot(updates, [row["all_examples"] for row in run], **style)
        axes[1].plot(updates, [row["damping"] for row in run], **style)
        ratios = np.clip([row["reduction_ratio"] for row in run], -1, 2)
        axes[2].plot(updates, ratios, **style)
        rejected = sum(not row["accepted"] for row in run)
        last = hfjax.diagnostics.line(run[-1])
        print(f"{label:22s}{rejected:3d} rejected   {last}")
    axes[0].set(title="f on all examples", yscale="log")
    axes[1].set(title="λ", yscale="log")
    axes[2].set(title="ρ (clipped to −1…2)", ylim=(-1.1, 2.1))
    axes[0].legend(frameon=False, fontsize="small")
    for axis in axes:
        axis.set(xlabel="update")
        axis.spines[["top", "right"]].set_visible(False)
    plt.show()


# %% [markdown]
# ## 1. A gradient of something else
#
# f is a mean over the examples. If your own loss is a sum, its gradient is 400 times as large. A
# gradient that was clipped, as is usual with other optimizers, is not the gradient of f either. The
# quadratic model is then wrong already at first order.

# %%
summed = jax.jit(lambda grads: jax.tree.map(lambda g: count * g, grads))
clip = optax.clip_by_global_norm(0.01)
clipped = jax.jit(lambda grads: clip.update(grads, clip.init(params))[0])

compare(
    summed=train(lambda params, update: summed(gradient(params, data))),
    clipped=train(lambda params, update: clipped(gradient(params, data))),
)
say(objective, tx, params, data, summed(gradient(params, data)))
say(objective, tx, params, data, clipped(gradient(params, data)))

# %% [markdown]
# If the gradient is too long, every step is far too long. Update after update is rejected, and λ climbs
# until the steps are so short that they pass, and lead nowhere. If the gradient is too short, f falls
# hundreds of times more than the model M predicts, so ρ is in the hundreds. λ falls and falls, which
# does not help: the steps are short for another reason. **ρ should be near 1. If it is far above 1,
# something is wrong.**
#
# Cure: pass `grads` as `objective.value_and_grad` returns them. That is the healthy run.
#
# ## 2. Weight decay outside the objective
#
# `optax.add_decayed_weights` adds weight decay to the gradient only. The f on which steps are checked
# does not contain it, and neither does the curvature.

# %%
decay = 1e-2
decayed = jax.jit(
    lambda grads, params: jax.tree.map(lambda g, p: g + decay * p, grads, params)
)
compare(
    decay_outside=train(
        lambda params, update: decayed(gradient(params, data), params),
    ),
)
say(objective, tx, params, data, decayed(gradient(params, data), params))

# %% [markdown]
# No update is rejected. But the decay works against f: ρ stays low, λ climbs, and f stops falling. A
# smaller decay does the same, later. Cure: put it into the objective, and nowhere else.

# %%
with_decay = hfjax.Objective(model_fn, loss, weight_decay=decay)
_, grads = jax.jit(with_decay.value_and_grad)(params, data)
print("Decay in the objective, and the gradient of this objective:")
say(with_decay, None, params, data, grads)
print("Decay in the objective, and added to its gradient once more:")
say(with_decay, None, params, data, decayed(grads, params))

# %% [markdown]
# ## 3. A gradient from other examples than the batch
#
# Each update draws 40 examples for the curvature and for checking the step, and 40 others for the
# gradient. So the check knows nothing about the examples that the step should improve.


# %%
def drawn(update, seed):
    """Return the data with weight 1 for forty examples, and 0 for all others."""
    key = jax.random.fold_in(jax.random.key(seed), update)
    chosen = jax.random.permutation(key, count) < 40
    return (*data[:2], chosen.astype(jnp.float32))


def batch_of(update):
    return drawn(update, seed=7)


compare(
    other_examples=train(
        lambda params, update: gradient(params, drawn(update, seed=8)),
        batch_of=batch_of,
    ),
    the_same_40=train(
        lambda params, update: gradient(params, batch_of(update)), batch_of=batch_of
    ),
    all_400=train(lambda params, update: gradient(params, data), batch_of=batch_of),
)
say(objective, tx, params, batch_of(0), gradient(params, drawn(0, seed=8)))

# %% [markdown]
# `check` sees that the gradient comes from other data. It cannot know more: a gradient from a larger
# batch that contains this one would be fine. λ gives the answer: it climbs, and f stops falling. Cure:
# compute the gradient on examples that include the batch, such as the same 40, or all 400. With only 40
# examples for curvature and check, f still jumps about. Use larger batches, or a separate
# `eval_batch`: see [how to choose](../docs/choosing.md).
#
# ## 4. Conjugate gradients always reach their limit
#
# Here CG has at most ten iterations and no preconditioner. The two inputs have different units: the
# second is a hundred times smaller, so its weights must be a hundred times larger.

# %%
scale = jnp.array([1.0, 0.01, 1.0])  # Of both variables, and of the bias.
scaled_data = (x * scale[:2], *data[1:])
scaled_params = {**params, "in": params["in"] / scale[:, None]}
short = optimizer(
    objective,
    solver=solver(10),
    preconditioner=None,
)


def train_scaled(tx):
    return train(
        lambda params, update: gradient(params, scaled_data),
        tx=tx,
        batch_of=lambda update: scaled_data,
        params=scaled_params,
    )


runs = {"10, P = I": train_scaled(short), "250, diagonal": train_scaled(tx)}
figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
for (name, run), colour in zip(runs.items(), ["tab:orange", "tab:blue"], strict=True):
    ends = np.mean([row["cg_reason"] == "max iterations" for row in run])
    print(f"{name:14s}{ends:4.0%} at the limit   {hfjax.diagnostics.line(run[-1])}")
    updates = [row["count"] for row in run]
    left.plot(updates, [row["value_after"] for row in run], color=colour, label=name)
    right.plot(updates, [row["cg_iterations"] for row in run], color=colour)
left.set(title="f", xlabel="update", yscale="log")
left.legend(frameon=False, fontsize="small")
right.set(title="iterations of conjugate gradients", xlabel="update", ylim=(0, None))
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()
say(objective, short, scaled_params, scaled_data, gradient(scaled_params, scaled_data))

# %% [markdown]
# Nothing is wrong with this set-up, and `check` says so: the settings are bad. You see it in
# `cg_reason`, and in the same number of iterations in every update. Cure: a higher limit, a
# preconditioner, or inputs of about the same scale.
#
# ## 5. A model that is random
#
# This dropout draws a new key whenever the model is called. An update evaluates the model several
# times, and each time the model is a different function. (f in the picture is without dropout.)

# %%
noise_keys = (jax.random.key(number) for number in itertools.count())


def dropping_out(params, x, mask):
    hidden = mask * jnp.tanh(with_one(x) @ params["in"]) / 0.9
    return with_one(hidden) @ params["out"]


def random_model_fn(params, x):
    mask = jax.random.bernoulli(next(noise_keys), 0.9, (len(x), units))
    return dropping_out(params, x, mask)


random_objective = hfjax.Objective(random_model_fn, loss)
random_gradient = jax.jit(
    lambda params, batch: random_objective.value_and_grad(params, batch)[1]
)
random_tx = optimizer(random_objective)
compare(
    random=train(lambda params, update: random_gradient(params, data), tx=random_tx),
)
say(random_objective, random_tx, params, data, random_gradient(params, data))

# %% [markdown]
# ρ falls at once, nearly all updates are rejected, and λ climbs. Gradient, curvature and f have
# different masks, which are compiled in and stay the same in every update. With other masks such a
# run may learn for a while, and then the pictures say little. `check` names the fault.
#
# Cure: one key for each example, in the inputs, and new keys for each batch. Then all evaluations in
# an update see the same noise.


# %%
def keyed_model_fn(params, inputs):
    x, keys = inputs
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, (units,)))
    return dropping_out(params, x, draw(keys))


keyed_objective = hfjax.Objective(keyed_model_fn, loss)
keyed = ((x, jax.random.split(jax.random.key(0), count)), *data[1:])
_, grads = jax.jit(keyed_objective.value_and_grad)(params, keyed)
say(keyed_objective, None, params, keyed, grads)

# %% [markdown]
# For a Flax module, `nnx_model_fn(model, per_case_keys=True)` does this. It also refuses batch
# normalisation in training mode, because the loss of one example would depend on all others.

# %%
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    nnx.Linear(2, 16, rngs=rngs),
    nnx.BatchNorm(16, rngs=rngs),
    nnx.tanh,
    nnx.Linear(16, 1, rngs=rngs),
)
try:
    hfjax.Objective(nnx_model_fn(model), loss).value(nnx.state(model, nnx.Param), data)
except ValueError as error:
    print(textwrap.fill(str(error), 88))

model.eval()
f = hfjax.Objective(nnx_model_fn(model), loss).value(nnx.state(model, nnx.Param), data)
print(f"After model.eval(): f is {f:.3f}.")

# %% [markdown]
# ## 6. Rounding
#
# The targets are 100,000 ± 1, such as a pressure in pascals, and the last bias starts there. In float32
# such numbers are 0.008 apart. This shows late in a run: f stops falling, and the steps that are still
# accepted have an α near 0.

# %%
offset = 100_000


def far(data, params):
    """Return targets and last bias, moved by the offset."""
    moved = {**params, "out": params["out"].at[-1].add(offset)}
    return (data[0], data[1] + offset, data[2]), moved


def train_far(data, params):
    state, values = tx.init(params), []
    for _ in range(50):
        steps, state = tx.update(gradient(params, data), state, params, batch=data)
        params = optax.apply_updates(params, steps)
        values.append(float(state.info.value_after))
    return values, params, state


far_data, far_params = far(data, params)
float32, last, state = train_far(far_data, far_params)
print("float32:", hfjax.diagnostics.line(state))
say(objective, tx, last, far_data, gradient(last, far_data))
with jax.enable_x64(True):  # In a program: jax.config.update("jax_enable_x64", True).
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (data, params))
    float64, _, state = train_far(*far(*wide))
    print("float64:", hfjax.diagnostics.line(state))

figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
axis.plot(float32, color="tab:orange", label="float32")
axis.plot(float64, color="tab:blue", label="float64")
axis.plot(
    [row["value_after"] for row in healthy],
    "k--",
    lw=1,
    label="float32, without the 100,000",
)
axis.set(xlabel="update", ylabel="f", yscale="log")
axis.legend(frameon=False, fontsize="small")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Cure: use float64, and set it before anything else. Or, cheaper, subtract their mean from the targets:
# that is the healthy run.
#
# ## What to look for
#
# | symptom | likely cause | cure | test |
# |---|---|---|---|
# | every update rejected from the first, λ climbs | gradient of a sum, or of the wrong sign | `objective.value_and_grad` | `test_what_was_done_to_the_gradient_is_named` |
# | ρ far above 1, λ falls to nothing, f hardly falls | gradient clipped or scaled down | pass it unchanged | the same |
# | ρ low and steady, λ climbs, f stops falling, nothing rejected | weight decay outside the objective | `Objective(weight_decay=…)` | `test_weight_decay_that_the_objective_lacks_is_named` |
# | ρ is noise, λ climbs | gradient from other examples than the batch, or few examples | gradient from examples that include the batch; larger batches | `test_a_gradient_from_elsewhere_is_told_with_its_cosine` |
# | `cg_reason` is always "max iterations" | limit too low, or ill-conditioned | higher `max_iterations`, a preconditioner, scaled inputs | `test_cg.py` |
# | ρ leaves 1 within the first updates, λ climbs or f hardly falls | a model that is random | a key for each example | `test_a_random_model_is_named` |
# | an error that names `model.eval()` | batch normalisation, dropout in training mode | `model.eval()`, `per_case_keys=True` | `test_batch_normalisation_in_training_mode_is_refused` |
# | f stops falling at the end, ρ about 1 or wild | rounding | float64, or smaller numbers | `test_a_gradient_that_is_rounding_is_named` |
# | rejected: nonfinite … | NaN or infinity in data, gradient, f | correct the data | the first table of [faults](../docs/faults.md) |
# | rejected: zero gradient | the optimum, or a dead network | another start | `test_all_zero_parameters_of_a_network_are_a_zero_gradient` |
#
# [`docs/faults.md`](../docs/faults.md) lists all faults that are tested, what you see of each, and its
# test. The tests of `check` are in `tests/inspection/test_verify.py`, those of Flax in
# `tests/models/test_flax.py`.
