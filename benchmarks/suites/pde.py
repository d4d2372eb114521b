"""Partial differential equations whose solutions are known, and points to learn from.

Each has the residual of the equation, the solution, and two draws of points: inside, and
where the solution is given, which is on the boundary, at the start, or both. They are
from Dangel, Müller & Zeinhofer (2024), "Kronecker-factored approximate curvature for
physics-informed neural networks", and its program. Time is the first coordinate.

| equation | inside | where u is given |
|---|---|---|
| Poisson | −Δu = f on the unit cube | its faces |
| heat | ∂u/∂t = ¼Δu, x in the unit cube, t in [0, 1] | half at t = 0, half on the faces |
| log-Fokker-Planck | below, x in [−5, 5]ᵈ, t in [0, 1] | at t = 0 |

The last equation is for q = log p, where dX = −½X dt + √2 dW starts from N(0, I):

    ∂q/∂t − d/2 − ½x·∇q − |∇q|² − Δq = 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suites.derivatives import Derivatives

Solution = Callable[[jax.Array], jax.Array]
"""`points -> u`: `[cases, coordinates]` to `[cases]`, or one point to a scalar."""

Draw = Callable[[jax.Array, int], jax.Array]
"""`(key, cases) -> points`, `[cases, coordinates]`."""


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation with a known solution.

    Attributes:
      title: in a few words.
      coordinates: of a point, time included.
      spatial: those that the Laplacian is over.
      residual: `(points, derivatives) -> [cases]`, 0 for the solution. The derivatives
        are `Derivatives`, or `Taylor` if it needs others than those.
      solution: u.
      inside: draws points of the domain, uniformly; errors are measured on such.
      given: draws points where u is given.
      moving: draws points where its derivative by the first coordinate is given too.
    """

    title: str
    coordinates: int
    spatial: tuple[int, ...]
    residual: Callable[[jax.Array, Any], jax.Array]
    solution: Solution
    inside: Draw
    given: Draw
    moving: Draw | None = None


def poisson(
    dimension: int, name: str, solution: Solution, source: Solution
) -> Equation:
    """Build −Δu = f on the unit cube.

    Returns:
      The equation; points on the boundary are of a face drawn for each.
    """

    def residual(points: jax.Array, found: Derivatives) -> jax.Array:
        return found.laplacian + source(points)

    return Equation(
        title=f"Poisson {dimension}d, {name}",
        coordinates=dimension,
        spatial=tuple(range(dimension)),
        residual=residual,
        solution=solution,
        inside=lambda key, cases: _uniform(key, cases, dimension),
        given=lambda key, cases: _faces(key, cases, dimension),
    )


def heat(dimension: int, solution: Solution) -> Equation:
    """Build ∂u/∂t = ¼Δu for t in [0, 1] on the unit cube.

    Returns:
      The equation; the first half of the points where u is given are on the boundary,
      at any time, the others in the cube at t = 0.
    """

    def residual(points: jax.Array, found: Derivatives) -> jax.Array:
        del points
        return found.gradient[:, 0] - found.laplacian / 4

    def given(key: jax.Array, cases: int) -> jax.Array:
        times, faces, start = jax.random.split(key, 3)
        half = cases // 2
        boundary = jnp.concatenate(
            [_uniform(times, half, 1), _faces(faces, half, dimension)], axis=1
        )
        return jnp.concatenate(
            [boundary, _at_start(_uniform(start, cases - half, dimension))]
        )

    return Equation(
        title=f"Heat {dimension}+1d",
        coordinates=dimension + 1,
        spatial=tuple(range(1, dimension + 1)),
        residual=residual,
        solution=solution,
        inside=lambda key, cases: _uniform(key, cases, dimension + 1),
        given=given,
    )


def log_fokker_planck(dimension: int) -> Equation:
    """Build the equation of the log-density of an Ornstein-Uhlenbeck process.

    Its drift is −½x and its diffusion √2; it starts from N(0, I), and is
    N(0, (2 − e⁻ᵗ) I) at t.

    Returns:
      The equation, for t in [0, 1] and x in [−5, 5]ᵈ; u is given at t = 0 only.
    """

    def residual(points: jax.Array, found: Derivatives) -> jax.Array:
        slope = found.gradient[:, 1:]
        return (
            found.gradient[:, 0]
            - dimension / 2
            - jnp.sum(points[:, 1:] * slope, axis=1) / 2
            - jnp.sum(jnp.square(slope), axis=1)
            - found.laplacian
        )

    def solution(points: jax.Array) -> jax.Array:
        variance = 2 - jnp.exp(-points[..., 0])
        squares = jnp.sum(jnp.square(points[..., 1:]), axis=-1)
        norm = dimension / 2 * jnp.log(2 * math.pi * variance)
        return -squares / (2 * variance) - norm

    def box(key: jax.Array, cases: int) -> jax.Array:
        return 10 * _uniform(key, cases, dimension) - 5

    def inside(key: jax.Array, cases: int) -> jax.Array:
        times, places = jax.random.split(key)
        return jnp.concatenate([_uniform(times, cases, 1), box(places, cases)], axis=1)

    return Equation(
        title=f"log-Fokker-Planck {dimension}+1d",
        coordinates=dimension + 1,
        spatial=tuple(range(1, dimension + 1)),
        residual=residual,
        solution=solution,
        inside=inside,
        given=lambda key, cases: _at_start(box(key, cases)),
    )


def _uniform(key: jax.Array, cases: int, dimension: int) -> jax.Array:
    return jax.random.uniform(key, (cases, dimension), jnp.zeros(()).dtype)


def _faces(key: jax.Array, cases: int, dimension: int) -> jax.Array:
    """Draw points of the unit cube, and put each on a face drawn for it."""
    places, axes, sides = jax.random.split(key, 3)
    points = _uniform(places, cases, dimension)
    chosen = jax.random.randint(axes, (cases, 1), 0, dimension)
    side = jax.random.bernoulli(sides, shape=(cases, 1)).astype(points.dtype)
    return jnp.where(jnp.arange(dimension)[None] == chosen, side, points)


def _at_start(points: jax.Array) -> jax.Array:
    return jnp.pad(points, ((0, 0), (1, 0)))


def product_of_sines(dimension: int) -> tuple[Solution, Solution]:
    """Return u = Πᵢ sin(πxᵢ) and its f = dπ²u, of `poisson`."""

    def solution(points: jax.Array) -> jax.Array:
        return jnp.prod(jnp.sin(math.pi * points), axis=-1)

    return solution, lambda points: dimension * math.pi**2 * solution(points)


def sum_of_cosines() -> tuple[Solution, Solution]:
    """Return u = Σᵢ cos(πxᵢ) and its f = π²u, of `poisson`."""

    def solution(points: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(math.pi * points), axis=-1)

    return solution, lambda points: math.pi**2 * solution(points)


def sum_of_pairs(norm: float) -> tuple[Solution, Solution]:
    """Return u = Σᵢ x₂ᵢ₋₁x₂ᵢ / norm, which is harmonic, and f = 0, of `poisson`."""

    def solution(points: jax.Array) -> jax.Array:
        return jnp.sum(points[..., ::2] * points[..., 1::2], axis=-1) / norm

    return solution, lambda points: jnp.zeros(points.shape[:-1], points.dtype)


def waves(numbers: tuple[int, ...]) -> tuple[Solution, Solution]:
    """Return the mean of sin(wπx₁) sin(wπx₂) over the numbers w, and f, of `poisson`."""

    def mean(points: jax.Array, power: int) -> jax.Array:
        w = np.array(numbers)
        x, y = points[..., :1], points[..., 1:]
        return jnp.mean(
            w**power * jnp.sin(w * math.pi * x) * jnp.sin(w * math.pi * y), axis=-1
        )

    return lambda p: mean(p, 0), lambda p: 2 * math.pi**2 * mean(p, 2)


def squared_norm(dimension: int, norm: float) -> tuple[Solution, Solution]:
    """Return u = |x|² / norm and its f = −2d / norm, of `poisson`."""

    def solution(points: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(points), axis=-1) / norm

    def source(points: jax.Array) -> jax.Array:
        return jnp.full(points.shape[:-1], -2 * dimension / norm, points.dtype)

    return solution, source


def decaying_sines(dimension: int) -> Solution:
    """Return u = exp(−dπ²t/4) Πᵢ sin(πxᵢ), of `heat`; 0 on the boundary."""

    def solution(points: jax.Array) -> jax.Array:
        decay = jnp.exp(-dimension * math.pi**2 / 4 * points[..., 0])
        return decay * jnp.prod(jnp.sin(math.pi * points[..., 1:]), axis=-1)

    return solution


def decaying_sum(points: jax.Array) -> jax.Array:
    """Return u = exp(−t) Σᵢ sin(2xᵢ), of `heat`."""
    return jnp.exp(-points[..., 0]) * jnp.sum(jnp.sin(2 * points[..., 1:]), axis=-1)
