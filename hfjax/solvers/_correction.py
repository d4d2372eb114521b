"""What a step misses as the residuals bend along it, put right by the same factor.

The damped step δ = −(J̃ᵀJ̃ + μI)⁻¹(J̃ᵀr̃ + …) takes the residuals to become r̃ + J̃δ. What
is missed,

    m(δ) = r̃(θ + δ) − r̃ − J̃δ,

is known for a pass forward. So δ + c is iterated to a fixed point,

    c ← −(J̃ᵀJ̃ + μI)⁻¹J̃ᵀ m(δ + c),

at which, without weight decay and momentum, J̃ᵀr̃(θ + δ + c) + λ(δ + c) = 0: not the linear
model's damped minimum, but f's own, up to what J̃ has changed by on the way. The first c
is, but for third derivatives, half the geodesic acceleration. Each iteration costs a pass
forward, two products with J̃ and two triangular solves, where an update costs all of J̃J̃ᵀ.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Tree
from hfjax.curvature.jacobian import Jacobian

_ENOUGH = 0.1
"""Of the residuals that are left: less than this in what is missed is none (heuristic)."""


class _State(NamedTuple):
    correction: Tree  # c.
    missed: jax.Array  # m(δ + c).
    change: jax.Array  # Of m, by the last iteration.
    tries: jax.Array
    going: jax.Array


def corrected(
    jacobian: Jacobian, inverse: Callable[[jax.Array], Tree], step: Tree, most: int
) -> Tree:
    """Iterate c, for as long as m changes less each time, and by something.

    f is not looked at: whether it is lower at δ + c is for the search for λ to see.

    Args:
      jacobian: J̃, r̃, and r̃ elsewhere.
      inverse: u ↦ (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu.
      step: δ.
      most: iterations.

    Returns:
      c; 0 if the first iteration leads nowhere.
    """

    def iterate(state: _State) -> _State:
        correction = jax.tree.map(jnp.negative, inverse(state.missed))
        whole = trees.add(step, correction)
        left = jacobian.residuals_at(whole)
        linear = jacobian.product(whole).astype(left.dtype)
        missed = left - jacobian.residuals - linear
        missed = missed.astype(state.missed.dtype)
        change = jnp.linalg.norm(missed - state.missed)
        closer = change < state.change
        return _State(
            correction=trees.select(closer, correction, state.correction),
            missed=jnp.where(closer, missed, state.missed),
            change=change,
            tries=state.tries + 1,
            going=closer & (change > _ENOUGH * jnp.linalg.norm(left)),
        )

    nothing = sharding.zeros_like(jacobian.residuals)
    start = _State(
        correction=sharding.zeros_like(step),
        missed=nothing,
        change=jnp.full((), jnp.inf, nothing.dtype),
        tries=jnp.zeros((), jnp.int32),
        going=jnp.ones((), bool),
    )
    # The first iteration has nothing to put right yet: it looks at δ.
    return jax.lax.while_loop(
        lambda state: state.going & (state.tries <= most), iterate, start
    ).correction
