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
# # Swapping parts
#
# Every part of an update is an argument. Here each is swapped in turn, on one small problem:
# a deep autoencoder from a random start. All other parts are those of Martens & Sutskever
# (2012), called "report" below. This shows how to swap parts, and that it matters. Which is
# best on one toy problem proves little: [how to choose](../docs/choosing.md) has figures of
# larger ones.

# %%
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hfjax

plt.rcParams["figure.dpi"] = 66

# %% [markdown]
# ## A problem
#
# 100 images of 4 × 4 pixels, each a soft spot somewhere: three numbers make an image. Six
# layers of 16 tanh units, of which the third has only four, are to find them. The layers
# are a `scan`, with the bias as a 17th input that is always 1; so all parameters are one
# array, which compiles quickly.

# %%
side = jnp.linspace(0, 1, 4)
pixels = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(16, 2)
spots = jax.random.uniform(jax.random.key(1), (100, 3))  # Two for where, one for size.
distances = jnp.sum((pixels - spots[:, None, :2]) ** 2, axis=-1)
images = jnp.exp(-distances / (0.05 + 0.2 * spots[:, 2:]))
batch = (images, images)

layers, units = 6, 16
present = jnp.ones((layers, units)).at[2, 4:].set(0)


def model_fn(params, x):
    def layer(hidden, weights_and_units):
        weights, present = weights_and_units
        hidden = jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1.0)
        return present * jnp.tanh(hidden @ weights), None

    return jax.lax.scan(layer, x, (params, present))[0]


objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
sparse = hfjax.initializers.sparse(8, scale=0.6)
starts = [
    sparse(key, (layers, units + 1, units))
    for key in jax.random.split(jax.random.key(5), 3)
]

figure, axes = plt.subplots(1, 6, figsize=(6, 1.2), layout="constrained")
for axis, image in zip(axes, images[:6], strict=True):
    axis.imshow(image.reshape(4, 4), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## The parts
#
# One `tx` for each row of the table below. All have at most 100 iterations of conjugate
# gradients, so that an update of one costs about what an update of another does.

# %%
lm = hfjax.damping.levenberg_marquardt
cg = partial(
    hfjax.cg.conjugate_gradient,
    max_iterations=100,
    stopping=hfjax.stopping.martens2010(),
    keep=hfjax.iterates.grid(),
    warm_start_decay=0.95,
)
make = partial(
    hfjax.hessian_free,
    objective,
    preconditioner=hfjax.preconditioners.diagonal(),
    backtracking=hfjax.backtracking.early_stop(),
)
signs = partial(hfjax.diagonals.ggn_rademacher, num_probes=4)

variants = {
    # The default: Kronecker factors, λ by search over one run.
    "default": hfjax.hessian_free(objective),
    # Martens & Sutskever's: λ by Levenberg & Marquardt, Fisher diagonal, Martens' stopping rule.
    "report": make(solver=cg()),
    # damping=
    "λ constant, 0.01": make(solver=cg(), damping=hfjax.damping.constant(0.01)),
    "D = diag(B)": make(solver=cg(), damping=lm(matrix="curvature_diagonal")),
    # preconditioner=
    "P = I": make(solver=cg(), preconditioner=None),
    "P of random signs": make(
        solver=cg(),
        preconditioner=hfjax.preconditioners.diagonal(signs, exponent=1.0),
    ),
    # stopping=
    "report's eq. 2": make(solver=cg(stopping=hfjax.stopping.martens_sutskever2012())),
    "residual ≤ 0.1": make(solver=cg(stopping=hfjax.stopping.residual(0.1))),
    # solver=
    "trust region": make(
        damping=hfjax.trust_region.radius(),
        solver=hfjax.trust_region.steihaug_toint(max_iterations=100),
    ),
    "Krylov subspace": make(
        damping=hfjax.damping.constant(0.0), solver=hfjax.krylov.subspace_descent()
    ),
    # a whole recipe
    "momentum_like": hfjax.recipes.momentum_like(objective, initial_damping=1.0),
    # curvature=
    "Hessian": make(solver=cg(), curvature=hfjax.curvature.hessian),
}

# %% [markdown]
# Two recipes have no program of their own here. On one batch `recipes.martens2010` has the
# same parts as "report", constant by constant, but its λ starts at 45; λ is a number of the
# state, and may be set there.
# `recipes.curvature_guarded` is for evaluation data of their own, and there are none.
#
# ## Thirty updates of each, from three starts
#
# Compiling takes longer than training, and two programs compile side by side.


# %%
def train(tx, damping=None, step=None):
    """Run thirty updates from each start; return the compiled step and what they did."""

    def one_update(params, state):
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    step = step or jax.jit(one_update)
    runs = []
    for params in starts:
        state = tx.init(params)
        if damping is not None:
            state = optax.tree.set(state, damping=jnp.float32(damping))
        history, thetas = [], [params]
        for _ in range(30):
            params, state = step(params, state)
            history.append(hfjax.diagnostics.scalars(state))
            thetas.append(params)
        runs.append((history, thetas, state))
    return step, runs


with ThreadPoolExecutor(max_workers=2) as pool:
    done = dict(zip(variants, pool.map(train, variants.values()), strict=True))
report_step = done["report"][0]
done["martens2010, λ from 45"] = train(variants["report"], 45.0, report_step)


# %%
def products(history):
    """Return the products with the curvature matrix so far, after each update."""
    return np.cumsum([row["cg_iterations"] for row in history])


def at_products(history, budget):
    """Return f of the last update before more than so many products are spent."""
    values = [row["value_after"] for row in history]
    return values[np.sum(products(history) <= budget) - 1]


print(
    f"{'':24s}{'f after 30 updates':>22s}{'products':>10s}{'f at 500':>10s}  rejected"
)
for name, (_, runs) in done.items():
    histories = [history for history, _, _ in runs]
    ends = sorted(1000 * history[-1]["value_after"] for history in histories)
    spent = np.mean([products(history)[-1] for history in histories])
    at = 1000 * np.median([at_products(history, 500) for history in histories])
    rejected = sum(not row["accepted"] for history in histories for row in history)
    print(
        f"{name:24s}{ends[1]:8.1f} ({ends[0]:5.1f} …{ends[2]:5.1f})"
        f"{spent:10.0f}{at:10.1f}{rejected:10d}"
    )
print("f in thousandths, the median of three starts (least … largest); rejected of 90.")
reasons = [row["cg_reason"] for history, _, _ in done["Hessian"][1] for row in history]
share = np.mean([reason == "nonpositive curvature" for reason in reasons])
print(f"Hessian: {share:.0%} of the runs met negative curvature.")

# %% [markdown]
# `products` are the iterations of conjugate gradients, the mean of the three starts, and
# `f at 500` is what f had come to by the last update that ended within 500 of them. They
# are what an update costs: compare by products rather than by updates.

# %%
groups = {
    "damping": ["λ constant, 0.01", "D = diag(B)"],
    "preconditioner": ["P = I", "P of random signs"],
    "stopping rule": ["report's eq. 2", "residual ≤ 0.1"],
    "solver": ["trust region", "Krylov subspace"],
    "set-up": ["default", "martens2010, λ from 45", "momentum_like"],
    "curvature": ["Hessian"],
}
colours = ["tab:orange", "tab:blue", "tab:green"]
figure, axes = plt.subplots(
    2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained"
)
for axis, (group, names) in zip(axes.flat, groups.items(), strict=True):
    for name, colour in zip(["report", *names], ["black", *colours], strict=False):
        for number, (history, _, _) in enumerate(done[name][1]):
            axis.plot(
                products(history),
                [row["value_after"] for row in history],
                color=colour,
                lw=1,
                label=None if number else name,
            )
    axis.set(title=group, yscale="log")
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
for axis in axes[1]:
    axis.set(xlabel="products")
for axis in axes[:, 0]:
    axis.set(ylabel="objective f")
plt.show()

# %% [markdown]
# What each changed **here**, from three starts of one toy problem:
#
# - **Damping.** One λ is good for some of the updates only: too low for the first, or too
#   high for the last. D = diag(B) changed little, and for the worse.
# - **Preconditioner.** Hardly any difference beyond that among the starts.
# - **Stopping rule.** Equation 2 of Martens & Sutskever runs longer: at least as far in as many updates,
#   and behind in as many products. The residual's rule, as loose as it is here, does it
#   the other way round.
# - **Solver.** The trust region has to find its radius, starts from 0 in every update, and
#   is far behind. A Krylov subspace of 20 needs no λ and is ahead for its products; but
#   the gradients that it takes within the subspace, some tens an update, are not counted.
# - **Set-up.** By default, the optimizer finds λ by search and ends its runs when they no
#   longer pay: a fourth of the products for thirty updates, and far ahead at 500. (Layers in
#   a scan have no Kronecker factors: its preconditioner is a diagonal here.) λ from 45 is
#   far too high for a loss of this size, and costs about ten updates. `momentum_like`, made
#   for small batches, runs shorter, and gets at least as far for its products.
# - **Curvature.** With the Hessian many runs end early, where they meet negative
#   curvature, and f is far behind. The Gauss-Newton matrix has none.
#
# The parts of Martens & Sutskever are the best at nothing here: by updates longer runs are as
# good, and by products shorter ones are better.
#
# ## Where iterations are wasted
#
# One run of conjugate gradients from parameters near the start, and f along it, as in figure 4
# of Martens & Sutskever (2012). With the λ that the rule had reached, f falls with the model
# M, and here even below it, because M counts the damping too.

# %%
history, thetas, _ = done["report"][1][0]
theta, damping = thetas[6], history[5]["damping"]
cg_run = jax.jit(
    lambda params, damping: hfjax.diagnostics.cg_run(
        objective, params, batch, damping=damping, max_iterations=100
    )
)
print(f"λ = {damping:.2g}")
hfjax.diagnostics.plot_cg_run(cg_run(theta, damping))

# %% [markdown]
# With a thirtieth of it M falls further, and f turns after about twenty iterations: the
# model is trusted beyond where it holds. Backtracking takes the marked iterate; what was
# run beyond it is lost, and ρ, small, raises λ for the next update.

# %%
print(f"λ = {damping / 30:.2g}")
hfjax.diagnostics.plot_cg_run(cg_run(theta, damping / 30))

# %% [markdown]
# ## What conjugate gradients saw
#
# The coefficients of the last run are in `state.record`, and they give eigenvalues of
# A = G + λI (without a preconditioner; else of P⁻¹A) for no further product. Here the run ends by its limit long before it comes to
# eigenvalues as small as λ, the dashed line: few iterations are a damping of their own.

# %%
history, _, state = done["P = I"][1][0]
values = hfjax.spectrum.ritz_values(state.record.coefficients)
print(f"{len(values)} eigenvalues seen in {history[-1]['cg_iterations']} iterations")
hfjax.diagnostics.plot_spectrum(values, damping=history[-2]["damping"])
