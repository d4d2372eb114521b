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
# # Does it compute the same on many devices?
#
# You learn four ways to run the same updates on eight devices, and see that they agree with one
# device to the last digits. This takes a few minutes.
#
# The eight devices are virtual devices of the CPU, so nothing gets faster here. On eight GPUs, leave
# out the line that makes them.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hfjax

jax.config.update("jax_num_cpu_devices", 8)  # Before the first computation.
jax.config.update("jax_enable_x64", True)  # So that rounding stays small to the end.

mesh = jax.make_mesh((8,), ("cases",), axis_types=(AxisType.Auto,))
replicated = NamedSharding(mesh, PartitionSpec())
sharded = NamedSharding(mesh, PartitionSpec("cases"))
print(f"{jax.device_count()} devices: {mesh}")

# %% [markdown]
# ## A problem
#
# A network learns a function of two variables from 1,003 points. Eight devices need a multiple of
# eight. So five examples of weight 0 fill up the batch; they change nothing.

# %%
cases, padding = 1003, 5
x = jax.random.uniform(jax.random.key(0), (cases + padding, 2))
batch = (
    x,
    jnp.sin(6 * x[:, :1]) * x[:, 1:],
    jnp.where(jnp.arange(cases + padding) < cases, 1.0, 0.0),
)


def model_fn(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


keys = jax.random.split(jax.random.key(1))
params = {
    "in": jax.random.normal(keys[0], (2, 128)),
    "bias": jnp.zeros(128),
    "out": jax.random.normal(keys[1], (128, 1)) / 12,
}
loss = hfjax.losses.squared_error()


def train_step(objective):
    """Return the optimizer, and one update with it: the loop's body, wherever it runs."""
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=1.0),
        solver=hfjax.cg.conjugate_gradient(max_iterations=30),
    )

    def step(params, state, batch):
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return tx, step


def train(tx, step, params, batch, *, state=None, first=lambda leaf: leaf, updates=10):
    """Run the loop; return f after each update, and the parameters."""
    state = tx.init(params) if state is None else state
    values = []
    for _ in range(updates):
        params, state = step(params, state, batch)
        values.append(float(first(state.info.value_after)))
    return np.array(values), params


# %% [markdown]
# ## On one device

# %%
objective = hfjax.Objective(model_fn, loss)
tx, step = train_step(objective)
alone, _ = train(tx, jax.jit(step), params, batch)
print(f"f: {alone[0]:.4f} -> {alone[-1]:.6f}")

# %% [markdown]
# ## 1. `jit` with sharded arrays
#
# This is the way to choose. Shard the batch over the devices, copy the parameters to each, and call
# the same step: JAX finds out what has to be summed. The objective does not change.

# %%
placed = jax.device_put(batch, sharded)
by_jit, _ = train(tx, jax.jit(step), jax.device_put(params, replicated), placed)

# %% [markdown]
# ## 2. `shard_map`
#
# Here the step is what one device does with its own examples. Tell the objective the axis of the
# devices: `axis_name`. Take the gradient from `objective.value_and_grad`, not from `jax.grad`, whose
# result would be summed over the devices once too often or not at all.

# %%
mapped_objective = hfjax.Objective(model_fn, loss, axis_name="cases")
tx_mapped, step_mapped = train_step(mapped_objective)
P = PartitionSpec
by_shard_map, _ = train(
    tx_mapped,
    jax.jit(
        jax.shard_map(
            step_mapped,
            mesh=mesh,
            in_specs=(P(), P(), P("cases")),
            out_specs=(P(), P()),
        )
    ),
    jax.device_put(params, replicated),
    placed,
)

# %% [markdown]
# ## 3. `pmap`
#
# This is for older programs that use it. Every array gets a leading axis for the devices.

# %%
folded = jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch)
copies = jax.tree.map(
    lambda leaf: jnp.stack([leaf] * 8), (params, tx_mapped.init(params))
)
by_pmap, _ = train(
    tx_mapped,
    jax.pmap(step_mapped, axis_name="cases"),
    copies[0],
    folded,
    state=copies[1],
    first=lambda leaf: leaf[0],
)

# %% [markdown]
# ## 4. Sharded parameters
#
# If a model is too large for one device, shard the parameters as well. Here this is done for each
# array whose leading axis is a multiple of eight. The state is sharded like the parameters, and so
# is every vector of conjugate gradients.

# %%
layout = jax.tree.map(
    lambda leaf: sharded if leaf.shape[0] % 8 == 0 else replicated, params
)
params_sharded = jax.device_put(params, layout)
by_fsdp, after = train(tx, jax.jit(step), params_sharded, placed)
weights = after["out"]
print(
    f"{weights.shape} lies as {weights.addressable_shards[0].data.shape} on each device"
)

# %% [markdown]
# ## Are the numbers the same?
#
# They are the same up to rounding, because sums over examples are taken in another order. Here the
# difference stays near 10⁻¹⁵. In longer runs it may grow, and it may jump if rounding decides
# between two iterates of conjugate gradients that are equally good.

# %%
ways = {
    "jit": by_jit,
    "shard_map": by_shard_map,
    "pmap": by_pmap,
    "jit, sharded parameters": by_fsdp,
}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
updates = np.arange(1, len(alone) + 1)
left.plot(updates, alone, "k-", lw=1, label="one device")
markers = dict(zip(ways, "o+x.", strict=True))
for name, values in ways.items():
    left.plot(updates, values, markers[name], ms=6, fillstyle="none", label=name)
    gap = np.abs(values / alone - 1)
    right.plot(
        updates, np.maximum(gap, 1e-17), markers[name] + "-", lw=0.8, ms=6, label=name
    )
    print(f"{name:24s} largest relative difference of f: {np.max(gap):.1e}")
left.set(xlabel="update", ylabel="f", yscale="log", title="Objective")
right.set(
    xlabel="update",
    yscale="log",
    ylim=(1e-17, 1e-2),
    title="Relative difference from one device",
)
left.legend(frameon=False, fontsize=8)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
