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
# # Can a killed run continue as if nothing had happened?
#
# You learn how to save checkpoints with [Orbax](https://orbax.readthedocs.io), and see that a
# run that was killed and started again ends with the same numbers, bit for bit. This takes
# half a minute.
#
# The next update needs two trees: the parameters, and the state of the optimizer (λ, the warm
# start, the number of updates). Batches and random numbers are functions of the number of
# updates, so their order survives as well.

# %%
import hashlib
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
import orbax.checkpoint as ocp
from flax import nnx

import hfjax

folder = Path(os.environ.get("CHECKPOINT_FOLDER") or tempfile.mkdtemp()).absolute()

# %% [markdown]
# ## A problem
#
# A small Flax network learns a function of two variables from 600 points. Each update uses 200
# of them, in turn. The optimizer carries more from one update to the next than by default, so
# there is more to lose: each run of conjugate gradients starts from the last solution, ρ adapts
# λ, and the preconditioner draws random signs.

# %%
x = jax.random.uniform(jax.random.key(0), (600, 2))
data = (x, jnp.sin(6 * x[:, :1]) * x[:, 1:])

model = nnx.Sequential(
    nnx.Linear(2, 24, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(24, 1, rngs=nnx.Rngs(1))
)
graph, params = nnx.split(model, nnx.Param)

objective = hfjax.Objective(
    lambda params, x: nnx.merge(graph, params)(x), hfjax.losses.squared_error()
)
tx = hfjax.hessian_free(
    objective,
    damping=hfjax.damping.levenberg_marquardt(),
    solver=hfjax.cg.conjugate_gradient(
        stopping=hfjax.stopping.martens2010(), warm_start_decay=0.95
    ),
    preconditioner=hfjax.preconditioners.diagonal(hfjax.diagonals.ggn_rademacher),
)


@jax.jit
def train_step(run):
    params, state = run["params"], run["state"]
    batch = hfjax.minibatching.in_turn(data, 200, state.count)
    _, grads = objective.value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params, batch=batch)
    params = optax.apply_updates(params, updates)
    return {"params": params, "state": state}, objective.value(params, data)


# %% [markdown]
# ## The loop
#
# Copy this loop. Orbax writes a checkpoint under a temporary name and renames it once it is
# complete, so a kill during a write leaves the previous checkpoint intact. It writes in the
# background, and what it writes must not change meanwhile: so it gets a copy of the list. The
# restored trees take their structure, types and devices from the trees that you pass.


# %%
class Killed(Exception):
    """Stands for the end of the process."""


def train(folder, updates, killed_at=None):
    run, losses = {"params": params, "state": tx.init(params)}, []
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        newest = manager.latest_step()
        if newest is not None:
            like = ocp.args.Composite(
                run=ocp.args.StandardRestore(run), losses=ocp.args.JsonRestore()
            )
            restored = manager.restore(newest, args=like)
            run, losses = restored["run"], restored["losses"]
        print(f"update {len(losses)}: starting here")
        while (count := int(run["state"].count)) < updates:
            if count == killed_at:
                raise Killed
            run, loss = train_step(run)
            losses.append(float(loss))
            if (count + 1) % 5 == 0:
                items = ocp.args.Composite(
                    run=ocp.args.StandardSave(run),
                    losses=ocp.args.JsonSave(list(losses)),
                )
                manager.save(count + 1, args=items)
                print(f"update {count + 1}: f = {loss:.2e}")
    return run, losses


# %% [markdown]
# ## Undisturbed, and killed
#
# The first run is not disturbed. The second is killed after 23 updates, three after its last
# checkpoint, and then started again.

# %%
undisturbed, losses = train(folder / "undisturbed", 60)

# %%
try:
    train(folder / "killed", 60, killed_at=23)
except Killed:
    print("killed")

# %%
resumed, resumed_losses = train(folder / "killed", 60)


# %% [markdown]
# ## Are the results the same?


# %%
def digest(run):
    """Hash every bit of parameters and state."""
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(run):
        bits.update(jax.device_get(leaf).tobytes())
    return bits.hexdigest()


assert digest(resumed) == digest(undisturbed)
assert resumed_losses == losses
print("identical:", digest(resumed)[:16])

# %%
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
counts = range(1, len(losses) + 1)
axes.semilogy(counts, losses, color="0.75", linewidth=5, label="undisturbed")
axes.semilogy(
    counts, resumed_losses, color="C0", linewidth=1.2, label="killed, resumed"
)
for count, word, color, side in [
    (20, "resumed here", "C2", "right"),
    (23, "killed", "C3", "left"),
]:
    axes.axvline(count, color=color, linestyle=":")
    offset = (-4 if side == "right" else 4, 0)
    axes.annotate(
        word,
        (count, min(losses)),
        offset,
        textcoords="offset points",
        color=color,
        ha=side,
    )
axes.set_xlabel("updates")
axes.set_ylabel("f on all data")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
