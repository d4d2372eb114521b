"""The test functions of Moré, Garbow & Hillstrom (1981) for nonlinear least squares.

Each has a standard start and known minima of Σ r². Where the number of parameters or
residuals is free, it is one for which the paper has the minimum.

    from benchmarks.suites import classics

    problem = classics.PROBLEMS["Rosenbrock"]
    problem.residuals(jnp.array(problem.start))

References:
  Moré, Garbow & Hillstrom (1981), "Testing unconstrained optimization software", ACM
  Transactions on Mathematical Software 7.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.numpy import cos, exp, sin

Residuals: TypeAlias = Callable[[jax.Array], jax.Array]
"""`x -> r`."""


class Problem(NamedTuple):
    """A function to minimise.

    Attributes:
      residuals: r.
      start: the standard start.
      minima: the local minima of Σ r² that are known, the lowest first.
    """

    residuals: Residuals
    start: tuple[float, ...]
    minima: tuple[float, ...] = (0.0,)


def _numbers(words: str) -> np.ndarray:
    return np.array(words.split(), float)


def _rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def _freudenstein_roth(x: jax.Array) -> jax.Array:
    return jnp.stack(
        [
            -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
            -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
        ]
    )


def _powell_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([1e4 * x[0] * x[1] - 1, exp(-x[0]) + exp(-x[1]) - 1.0001])


def _brown_badly_scaled(x: jax.Array) -> jax.Array:
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def _beale(x: jax.Array) -> jax.Array:
    powers = np.arange(1.0, 4.0)
    return x[0] * (1 - x[1] ** powers) - np.array([1.5, 2.25, 2.625])


def _jennrich_sampson(x: jax.Array) -> jax.Array:
    i = np.arange(1.0, 11.0)
    return exp(i * x[0]) + exp(i * x[1]) - (2 + 2 * i)


def _helical_valley(x: jax.Array) -> jax.Array:
    # Within (−¼, ¾) turns.
    angle = jnp.arctan(x[1] / x[0]) / (2 * jnp.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    radius = jnp.sqrt(x[0] ** 2 + x[1] ** 2)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (radius - 1), x[2]])


_BARD = _numbers("""
    0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.1 4.39
""")


def _bard(x: jax.Array) -> jax.Array:
    u = np.arange(1.0, 16.0)
    v, w = 16 - u, np.minimum(u, 16 - u)
    return x[0] + u / (v * x[1] + w * x[2]) - _BARD


_GAUSSIAN = _numbers("""
    9e-4 4.4e-3 0.0175 0.054 0.1295 0.242 0.3521 0.3989 0.3521 0.242 0.1295
    0.054 0.0175 4.4e-3 9e-4
""")


def _gaussian(x: jax.Array) -> jax.Array:
    t = (8 - np.arange(1.0, 16.0)) / 2
    return x[0] * exp(-x[1] * (t - x[2]) ** 2 / 2) - _GAUSSIAN


_MEYER = _numbers("""
    34780.0 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427
    3820 3307 2872
""")


def _meyer(x: jax.Array) -> jax.Array:
    t = 45 + 5 * np.arange(1.0, 17.0)
    return x[0] * exp(x[1] / (t + x[2])) - _MEYER


def _gulf(x: jax.Array) -> jax.Array:
    # Where the paper has `mi` in place of the minus, it is misprinted.
    t = np.arange(1.0, 100.0) / 100
    y = 25 + (-50 * np.log(t)) ** (2 / 3)
    return exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def _box(x: jax.Array) -> jax.Array:
    t = np.arange(1.0, 11.0) / 10
    return exp(-t * x[0]) - exp(-t * x[1]) - x[2] * (np.exp(-t) - np.exp(-10 * t))


def _powell_singular(x: jax.Array) -> jax.Array:
    return jnp.stack(
        [
            x[0] + 10 * x[1],
            math.sqrt(5) * (x[2] - x[3]),
            (x[1] - 2 * x[2]) ** 2,
            math.sqrt(10) * (x[0] - x[3]) ** 2,
        ]
    )


def _wood(x: jax.Array) -> jax.Array:
    return jnp.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            math.sqrt(90) * (x[3] - x[2] ** 2),
            1 - x[2],
            math.sqrt(10) * (x[1] + x[3] - 2),
            (x[1] - x[3]) / math.sqrt(10),
        ]
    )


_KOWALIK_OSBORNE = _numbers("""
    0.1957 0.1947 0.1735 0.16 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246
""")


def _kowalik_osborne(x: jax.Array) -> jax.Array:
    u = np.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    return x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3]) - _KOWALIK_OSBORNE


def _brown_dennis(x: jax.Array) -> jax.Array:
    t = np.arange(1.0, 21.0) / 5
    one = x[0] + t * x[1] - np.exp(t)
    return one**2 + (x[2] + x[3] * np.sin(t) - np.cos(t)) ** 2


_OSBORNE_1 = _numbers("""
    0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.85 0.818 0.784 0.751 0.718 0.685
    0.658 0.628 0.603 0.58 0.558 0.538 0.522 0.506 0.49 0.478 0.467 0.457 0.448
    0.438 0.431 0.424 0.42 0.414 0.411 0.406
""")


def _osborne_1(x: jax.Array) -> jax.Array:
    t = 10 * np.arange(33.0)
    return x[0] + x[1] * exp(-t * x[3]) + x[2] * exp(-t * x[4]) - _OSBORNE_1


def _biggs(x: jax.Array) -> jax.Array:
    t = np.arange(1.0, 14.0) / 10
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * exp(-t * x[0]) - x[3] * exp(-t * x[1]) + x[5] * exp(-t * x[4]) - y


_OSBORNE_2 = _numbers("""
    1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679
    0.608 0.655 0.616 0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644
    0.624 0.661 0.612 0.558 0.533 0.495 0.5 0.423 0.395 0.375 0.372 0.391 0.396
    0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 0.645
    0.632 0.591 0.559 0.597 0.625 0.739 0.71 0.729 0.72 0.636 0.581 0.428 0.292
    0.162 0.098 0.054
""")


def _osborne_2(x: jax.Array) -> jax.Array:
    t = np.arange(65.0) / 10
    peaks = sum(x[k] * exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3))
    return x[0] * exp(-t * x[4]) + peaks - _OSBORNE_2


def _watson(x: jax.Array) -> jax.Array:
    t, j = np.arange(1.0, 30.0)[:, None] / 29, np.arange(1.0, len(x) + 1)
    derivative = ((j - 1) * t ** np.maximum(j - 2, 0)) @ x
    first = derivative - (t ** (j - 1) @ x) ** 2 - 1
    return jnp.concatenate([first, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def _penalty_1(x: jax.Array) -> jax.Array:
    return jnp.append(math.sqrt(1e-5) * (x - 1), jnp.sum(x**2) - 0.25)


def _penalty_2(x: jax.Array) -> jax.Array:
    n, a, e = len(x), math.sqrt(1e-5), exp(x / 10)
    i = np.arange(2.0, n + 1)
    y = np.exp(i / 10) + np.exp((i - 1) / 10)
    squares = jnp.sum(np.arange(n, 0.0, -1) * x**2) - 1
    middle = a * (e[1:] + e[:-1] - y), a * (e[1:] - math.exp(-0.1))
    return jnp.concatenate([x[:1] - 0.2, *middle, squares[None]])


def _variably_dimensioned(x: jax.Array) -> jax.Array:
    total = jnp.sum(np.arange(1.0, len(x) + 1) * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([total, total**2])])


def _trigonometric(x: jax.Array) -> jax.Array:
    i = np.arange(1.0, len(x) + 1)
    return len(x) - jnp.sum(cos(x)) + i * (1 - cos(x)) - sin(x)


def _brown_almost_linear(x: jax.Array) -> jax.Array:
    return jnp.append(x[:-1] + jnp.sum(x) - (len(x) + 1), jnp.prod(x) - 1)


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, 1)


def _discrete_boundary_value(x: jax.Array) -> jax.Array:
    h = 1 / (len(x) + 1)
    t, around = h * np.arange(1.0, len(x) + 1), _padded(x)
    return 2 * x - around[:-2] - around[2:] + h**2 * (x + t + 1) ** 3 / 2


def _discrete_integral(x: jax.Array) -> jax.Array:
    h = 1 / (len(x) + 1)
    t = h * np.arange(1.0, len(x) + 1)
    kernel = np.minimum(t[:, None], t) * (1 - np.maximum(t[:, None], t))
    return x + h / 2 * (kernel @ (x + t + 1) ** 3)


def _broyden_tridiagonal(x: jax.Array) -> jax.Array:
    around = _padded(x)
    return (3 - 2 * x) * x - around[:-2] - 2 * around[2:] + 1


def _broyden_banded(x: jax.Array) -> jax.Array:
    i = np.arange(len(x))
    apart = i[:, None] - i
    near = (apart != 0) & (apart <= 5) & (apart >= -1)
    return x * (2 + 5 * x**2) + 1 - near.astype(float) @ (x * (1 + x))


def _linear(x: jax.Array) -> jax.Array:
    mean = 2 / _ROWS * jnp.sum(x) + 1
    return jnp.concatenate([x - mean, jnp.full(_ROWS - len(x), -mean)])


def _linear_rank_1(x: jax.Array) -> jax.Array:
    total = jnp.sum(np.arange(1.0, len(x) + 1) * x)
    return total * np.arange(1.0, _ROWS + 1) - 1


def _linear_rank_1_zeros(x: jax.Array) -> jax.Array:
    total = jnp.sum(np.arange(2.0, len(x)) * x[1:-1])
    return jnp.pad(np.arange(1.0, _ROWS - 1) * total, 1) - 1


_ROWS = 10
"""Residuals of the linear functions."""


def _chebyquad(x: jax.Array) -> jax.Array:
    # The mean of T_i(2x − 1) minus its integral over [0, 1].
    below, here, residuals = jnp.ones_like(x), 2 * x - 1, []
    for degree in range(1, len(x) + 1):
        integral = 0 if degree % 2 else 1 / (1 - degree**2)
        residuals.append(jnp.mean(here) - integral)
        below, here = here, 2 * (2 * x - 1) * here - below
    return jnp.stack(residuals)


def _steps(n: int) -> tuple[float, ...]:
    """Return j/(n + 1) for j = 1, …, n."""
    return tuple(j / (n + 1) for j in range(1, n + 1))


_CURVED = tuple(t * (t - 1) for t in _steps(10))

PROBLEMS = {
    "Rosenbrock": Problem(_rosenbrock, (-1.2, 1.0)),  # (1)
    "Freudenstein-Roth": Problem(_freudenstein_roth, (0.5, -2.0), (0.0, 48.9842)),
    "Powell badly scaled": Problem(_powell_badly_scaled, (0.0, 1.0)),
    "Brown badly scaled": Problem(_brown_badly_scaled, (1.0, 1.0)),
    "Beale": Problem(_beale, (1.0, 1.0)),  # (5)
    "Jennrich-Sampson": Problem(_jennrich_sampson, (0.3, 0.4), (124.362,)),
    "helical valley": Problem(_helical_valley, (-1.0, 0.0, 0.0)),
    "Bard": Problem(_bard, (1.0, 1.0, 1.0), (8.21487e-3, 17.4286)),
    "Gaussian": Problem(_gaussian, (0.4, 1.0, 0.0), (1.12793e-8,)),
    "Meyer": Problem(_meyer, (0.02, 4000.0, 250.0), (87.9458,)),  # (10)
    "Gulf": Problem(_gulf, (5.0, 2.5, 0.15)),
    "Box 3d": Problem(_box, (0.0, 10.0, 20.0)),
    "Powell singular": Problem(_powell_singular, (3.0, -1.0, 0.0, 1.0)),
    "Wood": Problem(_wood, (-3.0, -1.0, -3.0, -1.0)),
    "Kowalik-Osborne": Problem(  # (15)
        _kowalik_osborne, (0.25, 0.39, 0.415, 0.39), (3.07505e-4, 1.02734e-3)
    ),
    "Brown-Dennis": Problem(_brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,)),
    "Osborne 1": Problem(_osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.46489e-5,)),
    "Biggs EXP6": Problem(_biggs, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.65565e-3)),
    "Osborne 2": Problem(
        _osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5),
        (4.01377e-2,),
    ),
    "Watson 6": Problem(_watson, (0.0,) * 6, (2.28767e-3,)),  # (20)
    "Watson 9": Problem(_watson, (0.0,) * 9, (1.39976e-6,)),
    "Watson 12": Problem(_watson, (0.0,) * 12, (4.72238e-10,)),
    "penalty I": Problem(
        _penalty_1, tuple(float(j) for j in range(1, 11)), (7.08765e-5,)
    ),  # (23)
    "penalty II": Problem(_penalty_2, (0.5,) * 4, (9.37629e-6,)),
    "variably dimensioned": Problem(
        _variably_dimensioned, tuple(1 - j / 10 for j in range(1, 11))
    ),
    "trigonometric": Problem(_trigonometric, (0.1,) * 10, (0.0, 2.79506e-5)),
    "Brown almost-linear": Problem(_brown_almost_linear, (0.5,) * 10, (0.0, 1.0)),
    "discrete boundary value": Problem(_discrete_boundary_value, _CURVED),
    "discrete integral": Problem(_discrete_integral, _CURVED),
    "Broyden tridiagonal": Problem(_broyden_tridiagonal, (-1.0,) * 10),  # (30)
    "Broyden banded": Problem(_broyden_banded, (-1.0,) * 10),
    "linear, full rank": Problem(_linear, (1.0,) * 5, (5.0,)),
    "linear, rank 1": Problem(_linear_rank_1, (1.0,) * 5, (90 / 42,)),
    "linear, rank 1, zeros": Problem(_linear_rank_1_zeros, (1.0,) * 5, (124 / 34,)),
    "Chebyquad 7": Problem(_chebyquad, _steps(7)),  # (35)
    "Chebyquad 8": Problem(_chebyquad, _steps(8), (3.51687e-3,)),
}
"""The functions, in the paper's order; every fifth has its number there."""
