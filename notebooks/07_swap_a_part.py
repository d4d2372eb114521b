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
# # What changes when I swap a part?
#
# Every part of an update is an argument. You learn how to swap each of them, and see what that does
# on one small problem; this takes a few minutes on two cores.
#
# The problem is a deep autoencoder from a random start. One part changes at a time, and all others
# are those of Martens & Sutskever (2012), called M&S (2012) below. A toy problem does not show which
# part is best: [how to choose](../docs/choosing.md) has figures of larger ones.

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
# There are 100 images of 4 × 4 pixels. Each shows a soft spot, which three numbers describe. The
# network has six layers of 16 tanh units, but only four in the third. A `scan` runs over the layers,
# and the bias is a 17th input that is always 1. So all parameters are one array, which compiles
# quickly.

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
# There is one `tx` for each row of the table below. Each update has at most 100 iterations of
# conjugate gradients (CG).

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
    # λ by Levenberg & Marquardt, diagonal of the empirical Fisher, rule of Martens (2010).
    "M&S (2012)": make(solver=cg()),
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
    "M&S (2012), eq. 2": make(
        solver=cg(stopping=hfjax.stopping.martens_sutskever2012())
    ),
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
# On one batch, `recipes.martens2010` has the same parts as M&S (2012) here, but its λ starts at 45. So
# it needs no program of its own: λ is a number in the state, and can be set there.
#
# ## Thirty updates of each, from three starts
#
# Compiling takes longer than training, so two programs compile at a time.


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
original, (step, _) = variants["M&S (2012)"], done["M&S (2012)"]
done["martens2010, λ from 45"] = train(original, 45.0, step)


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
print(
    "f in thousandths, the median of three starts (lowest … highest); rejected of 90."
)
reasons = [row["cg_reason"] for history, _, _ in done["Hessian"][1] for row in history]
share = np.mean([reason == "nonpositive curvature" for reason in reasons])
print(f"Hessian: {share:.0%} of the runs met negative curvature.")

# %% [markdown]
# `products` are products with the curvature matrix, one for each iteration of CG, as the mean of the
# three starts. They are most of what an update costs, so compare by products rather than by updates.
# `f at 500` is f after the last update that ended within 500 products.

# %%
groups = {
    "damping": ["λ constant, 0.01", "D = diag(B)"],
    "preconditioner": ["P = I", "P of random signs"],
    "stopping rule": ["M&S (2012), eq. 2", "residual ≤ 0.1"],
    "solver": ["trust region", "Krylov subspace"],
    "set-up": ["default", "martens2010, λ from 45", "momentum_like"],
    "curvature": ["Hessian"],
}
colours = ["tab:orange", "tab:blue", "tab:green"]
figure, axes = plt.subplots(
    2, 3, figsize=(10, 5.6), sharex=True, sharey=True, layout="constrained"
)
for axis, (group, names) in zip(axes.flat, groups.items(), strict=True):
    for name, colour in zip(["M&S (2012)", *names], ["black", *colours], strict=False):
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
# From three starts of one toy problem, this is what each change did **here**:
#
# - **Damping.** A constant λ suits only some of the updates: it is too low for the first, or too high
#   for the last. D = diag(B) changed little, and for the worse.
# - **Preconditioner.** The difference is hardly larger than that between starts.
# - **Stopping rule.** Equation 2 of M&S (2012) runs longer: it gets at least as far in as many
#   updates, but not in as many products. The loose rule of the residual does the opposite.
# - **Solver.** The trust region has to find its radius, starts from 0 in every update, and is far
#   behind. A Krylov subspace of 20 needs no λ, and gets further with the same products. But it also
#   computes gradients within the subspace, some tens in an update, which the table does not count.
# - **Set-up.** By default, the optimizer searches for λ, and ends each run when it no longer pays. It
#   takes a sixth of the products for thirty updates, and is far ahead at 500. (Its preconditioner has a pair
#   of Kronecker factors for each layer of the scan.) A λ of 45 is far too high for a
#   loss of this size, and costs about ten updates. `momentum_like`, made for small batches, has
#   shorter runs, and gets as far with the same products.
# - **Curvature.** With the Hessian many runs end early, because they meet negative curvature, and f
#   is far behind. The Gauss-Newton matrix has none.
#
# ## Where iterations are wasted
#
# The next picture shows one run of CG, and f along it, from parameters near the start, as in figure 4
# of M&S (2012). With the λ that the rule had reached, f falls with the model M. It falls even below
# M, because M includes the damping.

# %%
history, thetas, _ = done["M&S (2012)"][1][0]
theta, damping = thetas[6], history[5]["damping"]
cg_run = jax.jit(
    lambda params, damping: hfjax.diagnostics.cg_run(
        objective, params, batch, damping=damping, max_iterations=100
    )
)
print(f"λ = {damping:.2g}")
hfjax.diagnostics.plot_cg_run(cg_run(theta, damping))

# %% [markdown]
# With a thirtieth of this λ, M falls further, but f rises after about twenty iterations: the step has
# left the region where the model holds. Backtracking takes the marked iterate. The later iterations
# are wasted, and the small ρ raises λ for the next update.

# %%
print(f"λ = {damping / 30:.2g}")
hfjax.diagnostics.plot_cg_run(cg_run(theta, damping / 30))

# %% [markdown]
# ## Which eigenvalues the run has seen
#
# `state.record` has the coefficients of the last run. They give eigenvalues of A = G + λI without any
# further product (with a preconditioner, those of P⁻¹A). Here the run reaches its limit before it
# sees eigenvalues as small as λ, the dashed line: a limit on the iterations has an effect like
# damping. [Look inside](08_look_inside.ipynb) has more on this.

# %%
history, _, state = done["P = I"][1][0]
values = hfjax.spectrum.ritz_values(state.record.coefficients)
print(f"{len(values)} eigenvalues seen in {history[-1]['cg_iterations']} iterations")
hfjax.diagnostics.plot_spectrum(values, damping=history[-2]["damping"])
