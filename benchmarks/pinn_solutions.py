"""Solutions of differential equations in closed form, of Poisson's with the source f.

Each takes points `[cases, coordinates]`, time first where there is time, or one point.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Solution = Callable[[jax.Array], jax.Array]
"""`points -> u`, of `[cases, coordinates]` `[cases]`; of one point a scalar."""


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
