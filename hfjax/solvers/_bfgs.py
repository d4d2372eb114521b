"""BFGS in a few variables, for functions that may be infinite far from the start."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Descent(NamedTuple):
    """A run of BFGS: the point, f and ∇f there, the inverse Hessian, whether to go on."""

    i: jax.Array
    x: jax.Array
    value: jax.Array
    gradient: jax.Array
    inverse: jax.Array
    going: jax.Array


def minimise(
    value: Callable[[jax.Array], jax.Array], start: jax.Array, max_iterations: int
) -> jax.Array:
    """Minimise by BFGS with an Armijo line search; f at the result is not above f(start).

    Args:
      value: x ↦ f, differentiable in reverse mode; may be infinite.
      start: shape `[n]`, in coordinates where the curvature is close to I.
      max_iterations: each costs a gradient, and one f for every step length tried.

    References:
      Nocedal & Wright (2006), algorithms 3.1 and 6.1.
    """
    # `jax.scipy.optimize` gives up where f is far from quadratic, and returns the point at
    # which its line search failed, whatever f is there.
    eye = jnp.eye(start.size, dtype=start.dtype)
    # Some devices multiply float32 with fewer digits by default.
    times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def iterate(state: _Descent) -> _Descent:
        i, x, now, gradient, inverse, _ = state
        p = -times(inverse, gradient)
        slope = times(gradient, p)

        def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            alpha, after = carry
            # Written so that NaN shortens the step, as too high an f does.
            return ~(after <= now + 1e-4 * alpha * slope) & (alpha > 1e-9)

        def shorter(carry: tuple[jax.Array, jax.Array]) -> tuple:
            alpha = 0.5 * carry[0]
            return alpha, value(x + alpha * p)

        one = jnp.ones((), x.dtype)
        alpha, after = jax.lax.while_loop(unfinished, shorter, (one, value(x + p)))
        moved = (after < now) & jnp.isfinite(after)
        x_new = jnp.where(moved, x + alpha * p, x)
        gradient_new = jax.grad(value)(x_new)
        s, y = x_new - x, gradient_new - gradient
        sy = times(s, y)
        # Only with sᵀy > 0 does the update keep the inverse Hessian positive definite.
        curved = moved & (sy > 1e-10 * jnp.sqrt(times(s, s) * times(y, y)))
        rho = 1 / jnp.where(curved, sy, 1)
        w = eye - rho * jnp.outer(s, y)
        updated = times(times(w, inverse), w.T) + rho * jnp.outer(s, s)
        finite = jnp.all(jnp.isfinite(gradient_new))
        going = moved & finite & (jnp.max(jnp.abs(gradient_new)) > 1e-6)
        value_new = jnp.where(moved, after, now)
        inverse = jnp.where(curved, updated, inverse)
        return _Descent(i + 1, x_new, value_new, gradient_new, inverse, going)

    first, gradient = jax.value_and_grad(value)(start)
    going = jnp.isfinite(first) & jnp.all(jnp.isfinite(gradient))
    state = _Descent(jnp.zeros((), jnp.int32), start, first, gradient, eye, going)
    end = jax.lax.while_loop(
        lambda state: state.going & (state.i < max_iterations), iterate, state
    )
    return end.x
