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
# # What does an update see?
#
# You learn how to look at the curvature matrix of a model, at one run of conjugate gradients
# (CG), and at what a preconditioner changes. The model is small enough to compare every estimate
# with the full matrix, and the notebook takes under a minute on one core.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree

import hfjax

jax.config.update("jax_enable_x64", True)  # So that estimates can be compared.
plt.rcParams["figure.dpi"] = 72

# %% [markdown]
# ## A model in the middle of its training
#
# A small autoencoder: 200 images of 4 × 4 pixels go through a code of four numbers. After twelve
# updates there is still something to learn. The updates use plain conjugate gradients, without a
# preconditioner.


# %%
def initial(key, sizes=(16, 12, 4, 12, 16)):
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer {number}": {
            "kernel": jax.random.normal(key, (m, n)) / jnp.sqrt(m),
            "bias": jnp.zeros(n),
        }
        for number, (key, m, n) in enumerate(
            zip(keys, sizes[:-1], sizes[1:], strict=True), 1
        )
    }


def model_fn(params, x):
    *hidden, last = params.values()
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


side = jnp.linspace(0, 1, 4)
pixels = jnp.stack(jnp.meshgrid(side, side), axis=-1).reshape(16, 2)
spots = jax.random.uniform(jax.random.key(0), (200, 3))  # Two for where, one for size.
distances = jnp.sum((pixels - spots[:, None, :2]) ** 2, axis=-1)
images = jnp.exp(-distances / (0.05 + 0.2 * spots[:, 2:]))
batch = (images, images)

objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
optimizer = hfjax.hessian_free(
    objective,
    damping=hfjax.damping.levenberg_marquardt(),
    solver=hfjax.cg.conjugate_gradient(max_iterations=60),
    preconditioner=None,
)
start = initial(jax.random.key(1))
fit = hfjax.fit(objective, start, batch, optimizer=optimizer, updates=12)
params, damping = fit.params, float(fit.state.damping)
flat, unravel = ravel_pytree(params)
print(f"{flat.size} parameters, f: {fit.history.value[0]:.2f} -> {fit.value:.2f}")
print(f"λ = {damping:.2g}")

# %% [markdown]
# ## The spectrum of G
#
# An update minimises a quadratic model of f with the matrix A = G + λI, where G is the
# Gauss-Newton matrix. hfjax never stores G: it multiplies G by a vector. Everything in
# `hfjax.spectrum` works from such products, so it also works for millions of parameters.
#
# A product with one flat vector compiles faster than one with a tree of arrays.


# %%
@jax.jit
def product(v):
    of_tree = hfjax.curvature.ggn(objective, params, batch)
    return ravel_pytree(of_tree(unravel(v)))[0]


largest = hfjax.spectrum.eigenvalues(
    product, flat, key=jax.random.key(2), num=8, num_iterations=40
)
density = hfjax.spectrum.density(
    product, flat, key=jax.random.key(3), num_probes=8, num_iterations=40
)
trace = hfjax.spectrum.trace(product, flat, key=jax.random.key(4), num_probes=100)

# The truth, for comparison: all of G, one column for each parameter.
matrix = np.asarray(jax.vmap(product)(jnp.eye(flat.size)), np.float64)
exact = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]

print("largest eigenvalues:", *(f"{value:.4f}" for value in largest.values[:5]))
print("exact:              ", *(f"{value:.4f}" for value in exact[:5]))
print(f"trace: {trace.value:.3f} ± {trace.standard_error:.3f}, exact {exact.sum():.3f}")

# %% [markdown]
# `density` estimates the whole spectrum from a few random vectors. It tells how many eigenvalues are
# above any bound. Above λ, the curvature matters more for the step than the damping. Forty products
# for each vector resolve the eigenvalues above λ here, but not the many small ones: below 10⁻³ the
# estimate is a single step.


# %%
def above(bound):
    """Estimate how many eigenvalues are above a bound, once for each random vector."""
    return flat.size * jnp.sum(density.weights * (density.nodes > bound), axis=1)


bounds = np.logspace(-8, np.log10(2 * exact[0]), 200)
counts = np.array([above(bound) for bound in bounds])
middle, spread = counts.mean(axis=1), counts.std(axis=1) / np.sqrt(counts.shape[1])

figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
axis.plot(
    bounds, [(exact > bound).sum() for bound in bounds], "k", lw=1.2, label="exact"
)
axis.plot(bounds, middle, color="tab:blue", lw=1.2, label="from the density")
axis.fill_between(
    bounds, middle - spread, middle + spread, color="tab:blue", alpha=0.25
)
axis.axvline(damping, color="gray", ls="--", lw=1, label="λ")
axis.set(xscale="log", xlabel="bound", ylabel="eigenvalues of G above it")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()
print(
    f"above λ: {np.mean(above(damping)):.0f} estimated, {(exact > damping).sum()} exact, "
    f"of {flat.size}"
)

# %% [markdown]
# ## One run of conjugate gradients
#
# `cg_run` repeats the run of one update, but lets it go on, and evaluates f along the way. M is the
# quadratic model that the run minimises; it includes the damping. First, the λ of the optimizer:


# %%
def cg_run(preconditioner):
    """Return a compiled run, as a function of λ."""
    return jax.jit(
        lambda damping: hfjax.diagnostics.cg_run(
            objective,
            params,
            batch,
            damping=damping,
            preconditioner=preconditioner,
            max_iterations=150,
            interval=3,
        )
    )


plain = cg_run(None)
first = plain(damping)
hfjax.diagnostics.plot_cg_run(first)

# %% [markdown]
# f falls with M, and further than M, because M includes the damping. After some fifty iterations
# nothing more happens. Now a hundredth of this λ:

# %%
hfjax.diagnostics.plot_cg_run(plain(damping / 100))

# %% [markdown]
# M falls much further, but f rises after twelve iterations: the step has left the region where M
# describes f. All later iterations are wasted. An update avoids this in two ways. It ends a run early,
# and it takes an iterate, or a λ, for which f is low.
#
# A run also reveals eigenvalues of A, at no extra cost. Its coefficients define the matrix of
# Lanczos, whose eigenvalues are called Ritz values. They find the largest eigenvalues first.

# %%
ritz = hfjax.spectrum.ritz_values(first.coefficients)
print("Ritz values:  ", *(f"{value:.4f}" for value in ritz[:5]))
print("exact, G + λI:", *(f"{value:.4f}" for value in exact[:5] + damping))
hfjax.diagnostics.plot_spectrum(ritz, damping=damping)

# %% [markdown]
# ## What a preconditioner changes
#
# CG needs few iterations if the eigenvalues are close together. With a preconditioner P, the
# eigenvalues of P⁻¹A count. The default is Kronecker factors of the layers; the diagonal is the
# choice of Martens (2010).

# %%
rules = {
    "none": plain,
    "diagonal": cg_run(hfjax.preconditioners.diagonal()),
    "kronecker": cg_run(hfjax.preconditioners.kronecker()),
}
print("iterations to so much of the decrease of M  50 %  90 %  99 %")
for low in (damping, damping / 100):
    runs = {name: run(low) for name, run in rules.items()}
    deepest = min(float(run.model_values[-1]) for run in runs.values())
    for name, run in runs.items():
        gained = np.asarray(run.model_values) / deepest
        needed = [
            f"{np.argmax(gained >= share):6d}" if gained[-1] >= share else " > 150"
            for share in (0.5, 0.9, 0.99)
        ]
        print(f"λ = {low:7.1e}, {name:28s}", *needed, sep="")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, run in runs.items():
    values = hfjax.spectrum.ritz_values(run.coefficients)
    left.plot(1 - np.asarray(run.model_values) / deepest, label=name, lw=1.3)
    right.plot(np.arange(1, len(values) + 1), values / values[0], ".", ms=4)
left.set(
    yscale="log",
    ylim=(3e-3, 1.2),
    xlabel="CG iteration",
    ylabel="left to gain in M",
    title=f"λ = {damping / 100:.1e}",
)
right.set(yscale="log", xlabel="rank", ylabel="Ritz value of P⁻¹A / the largest")
left.legend(frameon=False)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# With Kronecker factors, two iterations do what takes ten, or thirty at the lower λ. The eigenvalues of
# P⁻¹A are closer together, and many are near the largest. The last per cent is another matter: at
# the higher λ it takes longer than without a preconditioner. That costs little, because an update
# does not need the last per cent. The diagonal does not help here.

# %% [markdown]
# ## What `layers` finds
#
# Kronecker factors need to know which arrays are kernels of layers. hfjax finds out by
# reading the traced program of the model. `layers` reports what it found, before any training.


# %%
def report(objective):
    for path, found in hfjax.preconditioners.layers(objective, params, batch).items():
        print(f"{path:24s}{found}")


report(objective)

# %% [markdown]
# A parameter that is used in another way gets the diagonal. Here the kernel of layer 2 is
# squared before it is used, so it is no longer a kernel that multiplies inputs:


# %%
def squared(params, x):
    layer = params["layer 2"]
    return model_fn({**params, "layer 2": {**layer, "kernel": layer["kernel"] ** 2}}, x)


report(hfjax.Objective(squared, hfjax.losses.squared_error()))
