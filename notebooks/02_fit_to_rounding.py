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
# # How do I fit parameters to data, with error bars?
#
# You learn how to fit a formula, a differential equation and an unknown field to noisy
# measurements with `hfjax.least_squares`, and how well the data determine what you fit. The
# notebook takes about a minute on one core.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.flatten_util import ravel_pytree

import hfjax

jax.config.update("jax_enable_x64", True)
plt.rcParams["figure.dpi"] = 72

# %% [markdown]
# ## A curve whose answer is known to eleven digits
#
# *Thurber* is a problem of NIST's Statistical Reference Datasets for nonlinear regression, of
# the "higher level of difficulty": 37 measurements of the mobility of electrons in a
# semiconductor against the logarithm of their density, and seven parameters. Data, starts,
# certified parameters and certified standard deviations come from
# [NIST's file](https://www.itl.nist.gov/div898/strd/nls/data/LINKS/DATA/Thurber.dat)
# (R. Thurber, NIST, 197?).
#
# Write a function that returns the residuals, and call `least_squares`. There is nothing to
# tune: no learning rate, no tolerance, no units of the parameters.

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


def residuals(b, x, y):
    return mobility(b, x) - y


fit = hfjax.least_squares(residuals, starts[0], x, y)
print(f"{len(fit.history.value)} updates. {fit.reason.words}")


def digits(found, right):
    """Return how many digits agree, as NIST counts: −log₁₀ of the relative error."""
    return -np.log10(np.abs(found - right) / np.abs(right))


for number, start in enumerate(starts, 1):
    fit = hfjax.least_squares(residuals, start, x, y)
    found = np.stack([fit.params, fit.standard_errors()], axis=1)
    print(
        f"\nstart {number}{'found':>14s}{'digits':>8s}{'std. error':>18s}{'digits':>8s}"
    )
    for name, row, right in zip("1234567", found, certified, strict=True):
        n, m = digits(row, right)
        print(f"b{name:3s}{row[0]:18.10e}{n:8.1f}{row[1]:18.10e}{m:8.1f}")
deviation = np.sqrt(2 * fit.value / (len(x) - 7))
print(f"\nresidual standard deviation {deviation:.10f} (certified: 13.714600784)")

# %% [markdown]
# NIST prints eleven digits, so about eleven is all that the comparison can show.
#
# `fit.covariance()` is σ² (JᵀJ)⁻¹, where J is the derivative of the residuals and σ² is estimated
# from the residuals. The error of anything that depends on the parameters follows from its
# own derivative. Here is the fitted curve, with a band of two standard errors:


# %%
def deviations(jacobian, covariance):
    """Return √diag(J C Jᵀ), the standard errors of what depends on the parameters."""
    return jnp.sqrt(jnp.sum(jacobian @ covariance * jacobian, axis=-1))


b, covariance = fit.params, fit.covariance()
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
axis.set(xlabel="log density", ylabel="mobility", title="fit ± 2 standard errors")
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## Hares and lynxes
#
# From 1900 to 1920 the Hudson's Bay Company collected these pelts, in thousands. The numbers are
# those of Howard (2009, *Modeling Basics*) after Hewitt (1921), as in
# [Carpenter's case study for Stan](https://mc-stan.org/users/documentation/case-studies/lotka-volterra-predator-prey.html)
# (2018). The equation of Lotka and Volterra describes hares u and lynxes v:
#
# u′ = (α − β v) u,  v′ = (δ u − γ) v.
#
# The errors are errors of the logarithm. All six parameters are logarithms, too: four rates, and
# the two populations in 1900. The model solves the equation by the classical Runge-Kutta method
# with twenty steps a year. Any function that JAX can differentiate will do.

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
start = {"rates": jnp.log(jnp.array([1, 0.05, 1, 0.05])), "start": pelts[0]}
fit = hfjax.least_squares(
    lambda p, pelts: orbit(p)[STEPS * years] - pelts, start, pelts
)
params, spread = fit.params, fit.standard_errors()
print(f"{len(fit.history.value)} updates. {fit.reason.words} f = {fit.value:.4f}")
noise = jnp.sqrt(2 * fit.value / (2 * 21 - 6))
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
# The column of Stan has the means and standard deviations of its posterior, from the printed
# output of that case study. It used wide priors, a separate noise for each animal, and 4,000
# draws.
#
# The population of lynxes swings around α/β. Its error needs only a gradient g: it is √(gᵀ C g).

# %%
covariance = fit.covariance()
gradient = ravel_pytree(jax.grad(lambda p: p["rates"][0] - p["rates"][1])(params))[0]
level = jnp.exp(params["rates"][0] - params["rates"][1])
print(f"α/β = {level:.2f} ± {level * deviations(gradient, covariance):.2f} thousand")

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
axis.set(ylabel="thousand pelts", title="fit ± 2 standard errors", ylim=0)
axis.set_xticks(range(1900, 1921, 5))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## An unknown field: an inverse problem
#
# A rod conducts heat: −(k u′)′ = 10 on 0 … 1, with u = 0 at both ends. You measure u at 50 places
# with a noise of σ = 0.02, and want to know the function k. Let log k = Σⱼ 0.7 zⱼ cos(πjx) / (1 + j), with
# six coefficients z that are standard normal before any measurement.
#
# The equation can be integrated: k u′ = c − 10 x, and once more for u. The residuals are the errors
# of the data over σ, and z itself, which is its prior. f is then minus the logarithm of the posterior.
# The standard deviations are known, so the covariance needs no further scale (`scale=False`).

# %%
TERMS, SIGMA = 6, 0.02
places, shown = (jnp.arange(50) + 0.5) / 50, jnp.linspace(0, 1, 41)


def log_k(z, x):
    order = jnp.arange(TERMS)
    return jnp.cos(jnp.pi * order * x[:, None]) * 0.7 / (1 + order) @ z


def u(z, x):
    """Integrate the equation twice, by the trapezoidal rule."""
    fine = jnp.linspace(0, 1, 2001)
    resistance = jnp.exp(-log_k(z, fine))

    def integral(y):
        return jnp.concatenate([jnp.zeros(1), jnp.cumsum(y[1:] + y[:-1]) / 2 / 2000])

    first, second = integral(resistance), integral(10 * fine * resistance)
    return jnp.interp(x, fine, second[-1] / first[-1] * first - second)


def draw(key):
    """Draw coefficients from the prior, and measurements."""
    keys = jax.random.split(key)
    truth = jax.random.normal(keys[0], (TERMS,))
    return truth, u(truth, places) + SIGMA * jax.random.normal(keys[1], places.shape)


def field_residuals(z, measured):
    return {"data": (u(z, places) - measured) / SIGMA, "prior": z}


def field(measured):
    """Return the coefficients; log k where it is shown, and its standard error."""
    fit = hfjax.least_squares(field_residuals, jnp.zeros(TERMS), measured)
    jacobian = jax.jacobian(log_k)(fit.params, shown)
    errors = deviations(jacobian, fit.covariance(scale=False))
    return fit.params, log_k(fit.params, shown), errors


truth, measured = draw(jax.random.key(1))
z, middle, errors = field(measured)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(places, measured, "k.", ms=4, label="measured")
left.plot(shown, u(truth, shown), "0.6", lw=3, label="truth")
left.plot(shown, u(z, shown), "C0", lw=1.2, label="fit")
left.set(xlabel="x", title="u")
right.plot(shown, jnp.exp(log_k(truth, shown)), "0.6", lw=3, label="truth")
right.plot(shown, jnp.exp(middle), "C0", lw=1.2, label="fit ± 2 standard errors")
right.fill_between(
    shown,
    jnp.exp(middle - 2 * errors),
    jnp.exp(middle + 2 * errors),
    color="C0",
    alpha=0.25,
    lw=0,
)
right.set(xlabel="x", title="k")
for axis in (left, right):
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Around the maximum of u hardly any heat flows. There the data say little about k, and its error is
# largest.
#
# ## Are the error bars right?
#
# Draw 400 fields from the prior, measure each of them once, and fit all of them in one call of
# `jax.vmap`. How often is the truth within one standard error, or two? A normal distribution says how
# often it should be.

# %%
truths, measurements = jax.vmap(draw)(jax.random.split(jax.random.key(2), 400))
_, middles, errors = jax.jit(jax.vmap(field))(measurements)
scores = jnp.abs(middles - jax.vmap(log_k, (0, None))(truths, shown)) / errors
for share, bound in ((0.5, 0.674), (0.683, 1.0), (0.954, 2.0)):
    found = jnp.mean(scores < bound, axis=1)  # One share for each field.
    spread = jnp.std(found) / jnp.sqrt(len(found))
    print(
        f"within {bound:5.3f} standard errors: {jnp.mean(found):.1%} ± {spread:.1%}, "
        f"for a normal distribution {share:.1%}"
    )

# %% [markdown]
# The ± is the spread from field to field. These error bars take the posterior for a normal
# distribution, which is less true with more noise. And they know only the errors in f: they do not
# see a wrong equation, a field that six cosines cannot describe, or a fit that has not converged
# (read `fit.reason.words`).
#
# [Fitting curves and models](../docs/least_squares.md) lists all options, such as outliers, priors and
# tolerances.
