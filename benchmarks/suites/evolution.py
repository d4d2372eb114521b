"""Equations of one space coordinate and time, whose solutions are known to rounding.

Points are (t, x). The networks that solved them with the lowest published errors are in
`equations`.

| equation | where | u(0, x) |
|---|---|---|
| Burgers | uₜ + u uₓ = ν uₓₓ, x in [−1, 1], t in [0, 1] | −sin πx |
| standing wave | uₜₜ = 4 uₓₓ, x in [0, 1], 0 at its ends | sin πx + ½ sin 4πx, at rest |
| pulse | uₜₜ = uₓₓ, x in [−1, 1] periodic, t in [0, 2] | of width 0.2, moving right |
| Korteweg-de Vries | uₜ + u uₓ + 0.022² uₓₓₓ = 0, x in [−1, 1] periodic | cos πx |
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suites.derivatives import Taylor
from benchmarks.suites.pde import Draw, Equation

PI = math.pi
_WIDTH = 0.2  # of the pulse
_DISPERSION = 0.022
_MODES, _DEGREE, _STEPS = 256, 48, 4000  # of the solution of Korteweg-de Vries


def burgers(viscosity: float, name: str) -> Equation:
    """Build Burgers' equation; u is given at t = 0.

    The solution is by Cole and Hopf: with y = x − √(4νt) z,

        u = −∫ sin(πy) e(z) dz / ∫ e(z) dz,    e(z) = exp(−cos(πy) / 2πν − z²).

    The trapezoidal rule is exact to rounding here, as the integrands are analytic and
    vanish at both ends.
    """

    def solution(points: jax.Array) -> jax.Array:
        t, x = points[..., :1], points[..., 1:]
        z = jnp.arange(-13, 13.1, 0.15)
        y = x - jnp.sqrt(4 * viscosity * t) * z
        exponents = -jnp.cos(PI * y) / (2 * PI * viscosity) - z * z
        # Without the largest one, or all of them could underflow in float32. It cancels,
        # so nothing has to be differentiated.
        largest = jax.lax.stop_gradient(jnp.max(exponents, axis=-1, keepdims=True))
        weights = jnp.exp(exponents - largest)
        numerator = jnp.sum(jnp.sin(PI * y) * weights, axis=-1)
        return -numerator / jnp.sum(weights, axis=-1)

    return Equation(
        title=f"Burgers, ν = {name}",
        coordinates=2,
        spatial=(),
        residual=lambda points, found: burgers_residual(found, viscosity),
        solution=solution,
        inside=_box((0.0, 1.0), (-1.0, 1.0)),
        given=_box((0.0, 0.0), (-1.0, 1.0)),
    )


def burgers_residual(found: Taylor, viscosity: float | jax.Array) -> jax.Array:
    """Compute uₜ + u uₓ − ν uₓₓ."""
    u, slope, bend = found.along(1, 2)
    return found.along(0, 1)[1] + u * slope - viscosity * bend


def wave_residual(found: Taylor, speed: float) -> jax.Array:
    """Compute uₜₜ − c² uₓₓ."""
    return found.along(0, 2)[2] - speed**2 * found.along(1, 2)[2]


def standing_wave(end: float) -> Equation:
    """Build the standing wave until `end`.

    Returns:
      The equation; u is given at t = 0 for the first half of the points, at the ends of
      [0, 1] for the others, and uₜ at t = 0.
    """

    def solution(points: jax.Array) -> jax.Array:
        t, x = points[..., 0], points[..., 1]
        high = jnp.sin(4 * PI * x) * jnp.cos(8 * PI * t)
        return jnp.sin(PI * x) * jnp.cos(2 * PI * t) + high / 2

    start = _box((0.0, 0.0), (0.0, 1.0))

    def given(key: jax.Array, cases: int) -> jax.Array:
        half = cases // 2
        walls = _box((0.0, end), (0.0, 1.0))(jax.random.fold_in(key, 1), cases - half)
        return jnp.concatenate(
            [start(key, half), walls.at[:, 1].set(jnp.round(walls[:, 1]))]
        )

    return Equation(
        title=f"Standing wave until t = {end:g}",
        coordinates=2,
        spatial=(),
        residual=lambda points, found: wave_residual(found, 2.0),
        solution=solution,
        inside=_box((0.0, end), (0.0, 1.0)),
        given=given,
        moving=start,
    )


def pulse(x: jax.Array) -> jax.Array:
    """Compute Σₙ exp(−(x + 2n)² / 2·0.2²), by its Fourier series."""
    k = np.arange(1, 16)
    amplitudes = _WIDTH * (2 * PI) ** 0.5 * np.exp(-((k * PI * _WIDTH) ** 2) / 2)
    mean = _WIDTH * (PI / 2) ** 0.5
    return mean + jnp.sum(amplitudes * jnp.cos(PI * k * x[..., None]), axis=-1)


def from_pulse(points: jax.Array, output: jax.Array) -> jax.Array:
    """Return u(0, x) + t uₜ(0, x) + t² times the network's output."""
    t, x = points[..., 0], points[..., 1]
    start, slope = jax.jvp(pulse, (x,), (jnp.ones_like(x),))
    return start - t * slope + t * t * output


def from_sine(points: jax.Array, output: jax.Array) -> jax.Array:
    """Return −sin πx + t times the network's output."""
    return points[..., 0] * output - jnp.sin(PI * points[..., 1])


def wave_pulse() -> Equation:
    """Build the pulse that passes its period once, which `from_pulse` starts."""
    return Equation(
        title="Wave pulse",
        coordinates=2,
        spatial=(),
        residual=lambda points, found: wave_residual(found, 1.0),
        solution=lambda points: pulse(points[..., 1] - points[..., 0]),
        inside=_box((0.0, 2.0), (-1.0, 1.0)),
        given=_box((0.0, 0.0), (-1.0, 1.0)),
    )


def korteweg_de_vries(end: float) -> Equation:
    """Build the equation of Korteweg and de Vries until `end`; u is given at t = 0."""

    def residual(points: jax.Array, found: Taylor) -> jax.Array:
        del points
        u, slope, _, third = found.along(1, 3)
        return found.along(0, 1)[1] + u * slope + _DISPERSION**2 * third

    def solution(points: jax.Array) -> jax.Array:
        table = kdv_table(end)
        t, x = points[..., :1], points[..., 1:]
        # Chebyshev polynomials in t: cos(n arccos s), by their recurrence.
        s = 2 * t / end - 1
        polynomials = [jnp.ones_like(s), s]
        for _ in range(_DEGREE - 2):
            polynomials.append(2 * s * polynomials[-1] - polynomials[-2])
        amplitudes = jnp.concatenate(polynomials, axis=-1) @ jnp.asarray(table)
        angles = PI * x * np.arange(table.shape[1] // 2)
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        return jnp.sum(amplitudes * waves, axis=-1)

    return Equation(
        title=f"Korteweg-de Vries until t = {end:g}",
        coordinates=2,
        spatial=(),
        residual=residual,
        solution=solution,
        inside=_box((0.0, end), (-1.0, 1.0)),
        given=_box((0.0, 0.0), (-1.0, 1.0)),
    )


@functools.cache
def kdv_table(end: float) -> np.ndarray:
    """Solve Korteweg-de Vries, to about 1e-13 until t = 0.25.

    Fourier modes in x; in t the rule of Runge and Kutta, of order 4, with the exact
    factor exp(i 0.022² k³ t) of the linear part, in extended precision where NumPy has
    it.

    Returns:
      `[polynomials, 2 · modes]`: Chebyshev coefficients in t of the amplitudes of
      cos(kπx), then of sin(kπx).
    """
    real = np.longdouble
    pi = np.arctan2(real(0), real(-1))
    k = pi * np.arange(_MODES // 2 + 1)
    nodes = (1 - np.cos(pi * (np.arange(_DEGREE) + real(0.5)) / _DEGREE)) / 2
    place = pi * np.arange(_MODES, dtype=real) * 2 / _MODES
    modes, now = np.fft.rfft(np.cos(place)), real(0)
    found: Any = []
    for node in nodes * end:
        steps = math.ceil((node - now) * _STEPS / end)
        h, now = (node - now) / steps, node
        half = np.exp(0.5j * h * real(_DISPERSION) ** 2 * k**3)

        def change(modes: np.ndarray, h: np.floating = h) -> np.ndarray:
            return -0.5j * h * k * np.fft.rfft(np.fft.irfft(modes, _MODES) ** 2)

        for _ in range(steps):
            a = change(modes)
            b = change(half * (modes + a / 2))
            c = change(half * modes + b / 2)
            d = change(half * half * modes + half * c)
            modes = half * (half * (modes + a / 6) + (b + c) / 3) + d / 6
        found.append(modes * 2 / _MODES)
    amplitudes: Any = np.stack(found)[:, :-1]
    amplitudes[:, 0] /= 2
    both = np.concatenate([amplitudes.real, -amplitudes.imag], axis=1)
    order = np.arange(_DEGREE)[:, None]
    transform = (
        np.cos(order * np.arccos(2 * nodes - 1)) * np.where(order, 2, 1) / _DEGREE
    )
    return np.asarray(transform @ both, float)


def _box(times: tuple[float, float], places: tuple[float, float]) -> Draw:
    """Return what draws points uniformly from a rectangle."""
    ends = np.array([times, places]).T

    def draw(key: jax.Array, cases: int) -> jax.Array:
        unit = jax.random.uniform(key, (cases, 2), jnp.zeros(()).dtype)
        return unit * (ends[1] - ends[0]) + ends[0]

    return draw
