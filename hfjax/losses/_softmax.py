"""L″ and S of a softmax cross-entropy, and of the true class against all others.

With the probabilities p, for targets whose sum is τ,

    L″ = τ (diag(p) − p pᵀ),        S = √τ (diag(√p) − p √pᵀ).

For a label let pₜ be the probability of the true class, q those of the other classes if it
is none of them (0 for the true class), and a = eₜ − q. L is a function of one number, the
margin m = zₜ − log Σₖ exp zₖ over the others: L = log(1 + e⁻ᵐ). Its slope in z is a, so

    L″ = pₜ (1 − pₜ) a aᵀ + (1 − pₜ) (diag(q) − q qᵀ),

where the second part comes from the curvature of m. The first is the Gauss-Newton matrix
of L as a function of m, and has a factor of one column, √(pₜ (1 − pₜ)) a.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

LinearMap: TypeAlias = Callable[[jax.Array], jax.Array]


def curvature(
    mass: Callable[[jax.Array], jax.Array | float],
) -> tuple[Callable[..., LinearMap], Callable[..., LinearMap]]:
    """Return `(z, t) -> (v -> L″ v)` and S; `mass` maps the targets to their sum τ."""

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        p, weight = jax.nn.softmax(z), mass(t)
        winner = jnp.argmax(z, axis=-1, keepdims=True)

        def product(v: jax.Array) -> jax.Array:
            # The product is p (v − pᵀv). L″ ignores a shift of v, so we subtract its entry
            # at the winning class: then nothing cancels when that class has p ≈ 1.
            v = v - jnp.take_along_axis(v, winner, axis=-1)
            return weight * p * (v - jnp.sum(p * v, axis=-1, keepdims=True))

        return product

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        p, weight = jax.nn.softmax(z), jnp.sqrt(mass(t))
        root = jnp.sqrt(p)

        def product(v: jax.Array) -> jax.Array:
            # S Sᵀ = τ (diag(p) − 2 p pᵀ + p (Σ p) pᵀ) = τ (diag(p) − p pᵀ), as Σ p = 1.
            return weight * (root * v - p * jnp.sum(root * v, axis=-1, keepdims=True))

        return product

    return hessian, factor


def of_true_class(z: jax.Array, t: jax.Array) -> LinearMap:
    """Return v ↦ pₜ (1 − pₜ) a aᵀv, for labels `t`."""
    column, is_true = _column(z, t)

    def product(v: jax.Array) -> jax.Array:
        # a ignores a shift of v, so we subtract its entry at the true class, as above.
        v = v - jnp.sum(jnp.where(is_true, v, 0), axis=-1, keepdims=True)
        return column * jnp.sum(column * v, axis=-1, keepdims=True)

    return product


def factor_of_true_class(z: jax.Array, t: jax.Array) -> LinearMap:
    """Return v ↦ √(pₜ (1 − pₜ)) a v₀: the other columns of S are 0."""
    column, _ = _column(z, t)
    return lambda v: column * jax.lax.slice_in_dim(v, 0, 1, axis=-1)


def _column(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return √(pₜ (1 − pₜ)) a, and where the true class is, both like `z`."""
    p = jax.nn.softmax(z)
    classes = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
    is_true = classes == t.astype(jnp.int32)[..., None]
    others = jnp.where(is_true, 0, p)
    own = jnp.sum(jnp.where(is_true, p, 0), axis=-1, keepdims=True)
    # 1 − pₜ as a sum, which keeps its digits where pₜ ≈ 1.
    rest = jnp.sum(others, axis=-1, keepdims=True)
    q = others / jnp.where(rest > 0, rest, 1)
    return jnp.sqrt(own) * jnp.sqrt(rest) * jnp.where(is_true, 1, -q), is_true
