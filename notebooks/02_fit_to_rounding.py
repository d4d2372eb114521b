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
# # Inverse problems, with error bars
#
# Parameters from noisy measurements, and how well they are known. Three times the same
# few lines: a regression of which NIST has certified the answer to eleven digits; hares and
# lynxes, where the model is a differential equation that is solved inside; and an unknown
# field in an equation whose solution is a network. Parameters are few, so every step is
# solved for exactly (`sample_space.cholesky`). It is not corrected for how the model bends
# along it: corrected steps are longer, and where there are several minima may lead to
# another than the nearest. (In the second example they do, to one of eight times the f.)
# Error bars are those of the Laplace approximation: the inverse of the Gauss-Newton matrix
# at the fit. The whole notebook takes about 65 s of one core.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hfjax

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 72
squared_error = hfjax.losses.squared_error()


def fit(objective, params, batch, updates):
    """Update so often, in one compiled loop; return the parameters and f on the way."""
    solver = hfjax.sample_space.cholesky(corrections=0)
    tx = hfjax.hessian_free(objective, solver=solver)

    def update(carry, _):
        params, state = carry
        _, grads = objective.value_and_grad(params, batch)
        step, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, step)
        return (params, state), (params, state.info.value_after)

    (params, _), way = jax.lax.scan(update, (params, tx.init(params)), length=updates)
    return params, way


def inverse_of_ggn(objective, params, batch):
    """Return G⁻¹ as a matrix, of the parameters laid out in one vector."""
    product = hfjax.curvature.ggn(objective, params, batch)
    flat, unravel = ravel_pytree(params)
    columns = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])
    return jnp.linalg.inv(columns(jnp.eye(len(flat))))


def deviations(jacobian, covariance):
    """Return √diag(J C Jᵀ), the standard deviations of what depends on the parameters."""
    return jnp.sqrt(jnp.sum(jacobian @ covariance * jacobian, axis=-1))


# %% [markdown]
# ## An answer that is known to eleven digits
#
# *Thurber* of NIST's Statistical Reference Datasets for nonlinear regression, "higher level
# of difficulty": 37 measurements of the mobility of electrons in a semiconductor against
# the logarithm of their density, seven parameters. Data, starts, certified parameters and
# certified standard deviations are from
# [the file](https://www.itl.nist.gov/div898/strd/nls/data/LINKS/DATA/Thurber.dat)
# (R. Thurber, NIST, 197?).

# %%
table = """
80.574 -3.067  84.248 -2.981  87.264 -2.921  87.195 -2.912  89.076 -2.840
89.608 -2.797  89.868 -2.702  90.101 -2.699  92.405 -2.633  95.854 -2.481
100.696 -2.363  101.060 -2.322  401.672 -1.501  390.724 -1.460  567.534 -1.274
635.316 -1.212  733.054 -1.100  759.087 -1.046  894.206 -0.915  990.785 -0.714
1090.109 -0.566  1080.914 -0.545  1122.643 -0.400  1178.351 -0.309  1260.531 -0.109
1273.514 -0.103  1288.339 0.010  1327.543 0.119  1353.863 0.377  1414.509 0.790
1425.208 0.963  1421.384 1.006  1442.962 1.115  1464.350 1.572  1468.705 1.841
1447.894 2.047  1457.628 2.200
"""
y, x = jnp.array(np.fromstring(table, sep=" ").reshape(-1, 2).T)
starts = jnp.array(
    [[1000, 1000, 400, 40, 0.7, 0.3, 0.03], [1300, 1500, 500, 75, 1, 0.4, 0.05]]
)
certified = np.array(
    [
        [1.2881396800e03, 4.6647963344e00],
        [1.4910792535e03, 3.9571156086e01],
        [5.8323836877e02, 2.8698696102e01],
        [7.5416644291e01, 5.5675370270e00],
        [9.6629502864e-01, 3.1333340687e-02],
        [3.9797285797e-01, 1.4984928198e-02],
        [4.9727297349e-02, 6.5842344623e-03],
    ]
)


def mobility(b, x):
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def digits(found, right):
    """Return how many digits agree, as NIST counts: −log₁₀ of the relative error."""
    return -np.log10(np.abs(found - right) / np.abs(right))


objective = hfjax.Objective(mobility, squared_error)
thurber = jax.jit(lambda start: fit(objective, start, (x, y), 40))
for number, start in enumerate(starts, 1):
    b, (way, values) = thurber(start)
    worst = digits(way, certified[:, 0]).min(axis=1)
    print(f"start {number}, the worst parameter's digits after 5, 10, …, 30 updates:")
    print("   ", ", ".join(f"{n:.1f}" for n in worst[4:30:5]))


@jax.jit
def unchecked(b):
    _, grads = objective.value_and_grad(b, (x, y))
    return b - inverse_of_ggn(objective, b, (x, y)) @ grads


# f is rounded at its sixteenth digit, and flat: the last digits of b do not show in it.
for _ in range(20):
    b = unchecked(b)

variance = 2 * len(x) * values[-1] / (len(x) - 7)  # f is half the mean square.
covariance = variance / len(x) * inverse_of_ggn(objective, b, (x, y))
found = np.stack([b, np.sqrt(np.diag(covariance))], axis=1)
print(f"\n{'':4s}{'found':>18s}{'digits':>8s}{'deviation':>18s}{'digits':>8s}")
for name, row, right in zip("1234567", found, certified, strict=True):
    n, m = digits(row, right)
    print(f"b{name:3s}{row[0]:18.10e}{n:8.1f}{row[1]:18.10e}{m:8.1f}")
print(f"residual standard deviation {variance**0.5:.10f} (certified: 13.714600784)")

# %% [markdown]
# The covariance is s² (n G)⁻¹, with G of the mean over n cases and s² the residual
# variance over n − 7. Parameters are of sizes from 0.03 to 1,000, and nothing was scaled. An
# update that does not lower f is refused, and f is known to sixteen digits: that is enough
# for eight of the parameters' digits; the rest are of twenty steps that nobody checks.

# %%
across = jnp.linspace(-3.2, 2.4, 200)
band = deviations(jax.jacobian(mobility)(b, across), covariance)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.plot(x, y, "k.", ms=4)
axis.plot(across, mobility(b, across), "C0", lw=1)
axis.fill_between(
    across,
    mobility(b, across) - 2 * band,
    mobility(b, across) + 2 * band,
    color="C0",
    alpha=0.3,
    lw=0,
)
axis.set(xlabel="log density", ylabel="mobility", title="fit ± 2 deviations")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Hares and lynxes
#
# Pelts in thousands that the Hudson's Bay Company collected from 1900 to 1920, the numbers
# of Howard (2009, *Modeling Basics*) after Hewitt (1921), as in
# [Carpenter's case study for Stan](https://mc-stan.org/users/documentation/case-studies/lotka-volterra-predator-prey.html)
# (2018). Lotka-Volterra says of hares u and lynxes v
#
# u′ = (α − β v) u,  v′ = (δ u − γ) v.
#
# Errors are of the logarithm, and so are all six parameters: four rates and the two
# populations in 1900. The model is the solution of the equation, by the classical
# Runge-Kutta method at twenty steps a year: any function that JAX differentiates will do.

# %%
hares = """
30.0 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22.0 25.4 27.1
40.3 57.0 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7
"""
lynxes = """
4.0 6.1 9.8 35.2 59.4 41.7 19.0 13.0 8.3 9.1 7.4
8.0 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6
"""
pelts = jnp.log(np.stack([np.fromstring(t, sep=" ") for t in (hares, lynxes)], axis=1))
STEPS = 20


def orbit(params):
    """Return the logarithms of both at each step, from 1900 to 1920."""
    alpha, beta, gamma, delta = jnp.exp(params["rates"])

    def slope(z):
        return jnp.stack([alpha - beta * jnp.exp(z[1]), delta * jnp.exp(z[0]) - gamma])

    def step(z, _):
        h = 1 / STEPS
        k1 = slope(z)
        k2 = slope(z + h / 2 * k1)
        k3 = slope(z + h / 2 * k2)
        k4 = slope(z + h * k3)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), z

    last, before = jax.lax.scan(step, params["start"], length=20 * STEPS)
    return jnp.concatenate([before, last[None]])


years = jnp.arange(21)
objective = hfjax.Objective(lambda p, year: orbit(p)[STEPS * year], squared_error)
start = {"rates": jnp.log(jnp.array([1, 0.05, 1, 0.05])), "start": pelts[0]}
params, (_, values) = jax.jit(lambda p: fit(objective, p, (years, pelts), 30))(start)
print(
    "f after 1, 5, 10, 15, 30 updates:", values[jnp.array([0, 4, 9, 14, 29])].round(6)
)

noise = jnp.sqrt(2 * 21 * values[-1] / (2 * 21 - 6))
covariance = noise**2 / 21 * inverse_of_ggn(objective, params, (years, pelts))
spread = ravel_pytree(params)[1](jnp.sqrt(jnp.diag(covariance)))
stan = [(0.545, 0.064), (0.028, 0.004), (0.803, 0.092), (0.024, 0.004)]
stan += [(33.956, 2.856), (5.933, 0.535)]
logs, relative = (jnp.concatenate([p["rates"], p["start"]]) for p in (params, spread))
print(f"{'':8s}{'here':>17s}{'Stan':>18s}")
for name, log, share, (mean, sd) in zip(
    ("α", "β", "γ", "δ", "u(1900)", "v(1900)"), logs, relative, stan, strict=True
):
    value = np.exp(log)
    print(f"{name:8s}{value:8.3f} ± {share * value:6.3f}{mean:9.3f} ± {sd:6.3f}")
print(f"{'noise':8s}{noise:8.3f}{'':9s}{0.25:9.3f}")

# %% [markdown]
# Beside the means and deviations of Stan's posterior, from the printed output of that case
# study. It has priors, which are wide, a noise for each of the two, and 4,000 draws. This
# has thirty updates.
#
# What depends on the parameters gets its deviation from its gradient, g: √(gᵀ C g). For
# that the matrix is not needed, `cg.inverse` gives C g by products. The number of lynxes
# around which theirs swings is α/β:

# %%
product = hfjax.curvature.ggn(objective, params, (years, pelts))
gradient = jax.grad(lambda p: p["rates"][0] - p["rates"][1])(params)
solved = hfjax.cg.inverse(product, tolerance=1e-10)(gradient)
by_products = noise * jnp.sqrt(optax.tree.vdot(gradient, solved) / 21)
level = jnp.exp(params["rates"][0] - params["rates"][1])
flat = ravel_pytree(gradient)[0]
print(f"α/β = {level:.2f} ± {level * by_products:.2f} thousand; by the matrix ", end="")
print(f"± {level * deviations(flat, covariance):.2f}")

# %%
_, unravel = ravel_pytree(params)
jacobian = jax.jacobian(lambda flat: orbit(unravel(flat)))(ravel_pytree(params)[0])
band = deviations(jacobian, covariance)
path, time = orbit(params), 1900 + jnp.arange(20 * STEPS + 1) / STEPS
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for column, name in enumerate(("hares", "lynxes")):
    colour, middle, wide = f"C{column}", path[:, column], 2 * band[:, column]
    axis.plot(1900 + years, jnp.exp(pelts[:, column]), "o", color=colour, ms=3.5)
    axis.plot(time, jnp.exp(middle), color=colour, lw=1, label=name)
    axis.fill_between(
        time,
        jnp.exp(middle - wide),
        jnp.exp(middle + wide),
        color=colour,
        alpha=0.25,
        lw=0,
    )
axis.set(ylabel="thousand pelts", title="fit ± 2 deviations", ylim=0)
axis.set_xticks(range(1900, 1921, 5))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## An unknown field
#
# A rod conducts heat, −(k u′)′ = 10 on 0 … 1, u = 0 at both ends. u is measured at 50
# places, with a noise of σ = 0.02; k(x) is asked for. log k = Σⱼ 0.7 zⱼ cos(πjx) / (1 + j),
# with six coefficients z that are standard normal before anything is measured, and u is a
# network of 16 tanh units. Both are found at once. f is minus the logarithm of the
# posterior, a sum of four terms:
#
# - the data, over their variance σ²;
# - the equation at 80 points, which is to hold to τ = 0.05, a two-hundredth of its right
#   side;
# - the ends, to τ/10;
# - the prior of the coefficients, and a weak one of the network's weights, N(0, 30²), which
#   keeps the matrix from being singular.
#
# `weighted_sum` takes means, so each weight has the number of cases in it. G is then the
# inverse of the covariance.

# %%
TERMS, UNITS, SIGMA, TAU = 6, 16, 0.02, 0.05
places, inside, ends = (
    (jnp.arange(50) + 0.5) / 50,
    jnp.linspace(0, 1, 80),
    jnp.arange(2.0),
)


def log_k(coefficients, x):
    order = jnp.arange(TERMS)
    return jnp.cos(jnp.pi * order * x[:, None]) * 0.7 / (1 + order) @ coefficients


def u(params, x):
    net = params["network"]
    hidden = jnp.tanh(x[:, None] * net["weights"] + net["biases"])
    return hidden @ net["outputs"] + net["offset"]


def equation(params, x):
    def derivative(function):
        return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    slope = derivative(lambda x: u(params, x))
    flow = derivative(lambda x: jnp.exp(log_k(params["log k"], x)) * slope(x))
    return -flow(x)


def prior(params, x):
    del x
    weights = jax.tree.map(lambda w: w[None] / 30, params["network"])
    return params["log k"][None], weights


objective = hfjax.objective.weighted_sum(
    [
        (len(places) / SIGMA**2, hfjax.Objective(u, squared_error)),
        (len(inside) / TAU**2, hfjax.Objective(equation, squared_error)),
        (len(ends) / (TAU / 10) ** 2, hfjax.Objective(u, squared_error)),
        (1.0, hfjax.Objective(prior, squared_error)),
    ]
)
keys = jax.random.split(jax.random.key(0))
start = {
    "log k": jnp.zeros(TERMS),
    "network": {
        "weights": 4 * jax.random.normal(keys[0], (UNITS,)),
        "biases": 2 * jax.random.normal(keys[1], (UNITS,)),
        "outputs": jnp.zeros(UNITS),
        "offset": jnp.zeros(()),
    },
}
one = jnp.zeros(1)  # The prior is of one case, and has no inputs.
shown = jnp.linspace(0, 1, 41)


@jax.jit
def field(measured):
    """Return the parameters; log k where it is shown, and its deviation."""
    batch = (
        (places, measured),
        (inside, jnp.full(len(inside), 10.0)),
        (ends, jnp.zeros(2)),
        (one, jax.tree.map(jnp.zeros_like, prior(start, one))),
    )
    params, _ = fit(objective, start, batch, 2000)
    covariance = inverse_of_ggn(objective, params, batch)
    flat, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda flat: log_k(unravel(flat)["log k"], shown))(flat)
    return params, log_k(params["log k"], shown), deviations(jacobian, covariance)


# %% [markdown]
# To have something to compare with: in one dimension the equation can be integrated, k u′ =
# c − 10 x. That makes data, and a second way to the same posterior, with six unknowns and
# without a network.


# %%
def integrated(coefficients, x):
    fine = jnp.linspace(0, 1, 2001)
    resistance = jnp.exp(-log_k(coefficients, fine))

    def integral(y):
        return jnp.concatenate([one, jnp.cumsum(y[1:] + y[:-1]) / 2 / 2000])

    first, second = integral(resistance), integral(10 * fine * resistance)
    return jnp.interp(x, fine, second[-1] / first[-1] * first - second)


@jax.jit
def without_network(measured):
    objective = hfjax.objective.weighted_sum(
        [
            (len(places) / SIGMA**2, hfjax.Objective(integrated, squared_error)),
            (1.0, hfjax.Objective(lambda z, x: z[None], squared_error)),
        ]
    )
    batch = (places, measured), (one, jnp.zeros((1, TERMS)))
    z, _ = fit(objective, jnp.zeros(TERMS), batch, 40)
    covariance = inverse_of_ggn(objective, z, batch)
    jacobian = jax.jacobian(log_k)(z, shown)
    return log_k(z, shown), deviations(jacobian, covariance)


def draw(seed):
    """Draw coefficients from the prior, and measurements."""
    keys = jax.random.split(jax.random.key(seed))
    truth = jax.random.normal(keys[0], (TERMS,))
    noise = SIGMA * jax.random.normal(keys[1], places.shape)
    return truth, integrated(truth, places) + noise


truth, measured = draw(1)
params, middle, wide = field(measured)
other, other_wide = without_network(measured)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(places, measured, "k.", ms=4, label="measured")
left.plot(shown, integrated(truth, shown), "0.6", lw=3, label="truth")
left.plot(shown, u(params, shown), "C0", lw=1.2, label="network")
left.set(xlabel="x", title="u")
right.plot(shown, jnp.exp(log_k(truth, shown)), "0.6", lw=3, label="truth")
right.plot(shown, jnp.exp(middle), "C0", lw=1.2, label="found, ± 2 deviations")
right.fill_between(
    shown,
    jnp.exp(middle - 2 * wide),
    jnp.exp(middle + 2 * wide),
    color="C0",
    alpha=0.25,
    lw=0,
)
for sign in (-2, 2):
    right.plot(
        shown,
        jnp.exp(other + sign * other_wide),
        "C1--",
        lw=1,
        label="without a network" if sign > 0 else None,
    )
right.set(xlabel="x", title="k")
for axis in (left, right):
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Where u is level, no heat flows, and nothing can be learned of k there but by its
# smoothness.
#
# ## Are the error bars right?
#
# Forty fields drawn from the prior, each measured once. How often does the truth lie within
# as many deviations as a normal distribution says?

# %%
scores, ratios = [], []
for seed in range(40):
    truth, measured = draw(100 + seed)
    _, middle, wide = field(measured)
    scores.append(np.abs(middle - log_k(truth, shown)) / wide)
    ratios.append(wide / without_network(measured)[1])
scores, ratios = np.array(scores), np.array(ratios)
for level, bound in ((0.5, 0.674), (0.683, 1.0), (0.954, 2.0)):
    by_field = np.mean(scores < bound, axis=1)
    error = np.std(by_field) / np.sqrt(len(by_field))
    print(
        f"within {bound:5.3f} deviations: {np.mean(by_field):6.1%} ± {error:.1%}",
        end="",
    )
    print(f", of a normal distribution {level:.1%}")
print(f"deviation, over that without a network: {np.median(ratios):.3f}, ", end="")
print(f"{np.quantile(ratios, 0.05):.3f} to {np.quantile(ratios, 0.95):.3f}")

# %% [markdown]
# ± is from field to field; neighbouring x are not independent. The Laplace approximation
# takes the posterior for normal, which it is the less, the noisier the data are. And it
# knows of no errors but those in f: not of a wrong equation, nor of a field that six
# cosines cannot be, nor of a fit that is not finished. Compare two ways where you can.
