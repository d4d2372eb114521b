"""Correct a step for the nonlinearity of the residuals, with the same Cholesky factor.

The damped step δ = −(J̃ᵀJ̃ + μI)⁻¹(J̃ᵀr̃ + …) takes the residuals to be r̃ + J̃δ at its
end. The error of this linear model,

    m(δ) = r̃(θ + δ) − r̃ − J̃δ,

is found by one forward pass. The correction c is a fixed point of

    c ← −(J̃ᵀJ̃ + μI)⁻¹J̃ᵀ m(δ + c).

Without weight decay and momentum, it satisfies J̃ᵀr̃(θ + δ + c) + λ(δ + c) = 0. So δ + c
is the damped minimum of f itself and not that of its linear model, except that J̃ is
still the Jacobian at θ. The first c is half the geodesic acceleration, up to third
derivatives. An iteration costs a forward pass, two products with J̃ and two triangular
solves, which is little beside the computation of J̃J̃ᵀ.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Tree
from hfjax.curvature.jacobian import Jacobian

_ENOUGH = 0.1
"""The iteration ends when m changes by less than this fraction of the residuals left."""


class _State(NamedTuple):
    correction: Tree  # c
    missed: jax.Array  # m(δ + c)
    change: jax.Array  # ‖Δm‖ in the last iteration
    tries: jax.Array
    going: jax.Array


def corrected(
    jacobian: Jacobian, inverse: Callable[[jax.Array], Tree], step: Tree, most: int
) -> Tree:
    """Iterate c as long as m changes less each time; c is 0 if the first iteration fails.

    `inverse` is u ↦ (J̃ᵀJ̃ + μI)⁻¹J̃ᵀu, and `most` bounds the number of iterations.
    """
    # f is not evaluated here. Whether it is lower at δ + c is for the search for λ and the
    # line search to find out.

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
    # The first iteration has c = 0 and only finds m(δ), hence `<=`.
    return jax.lax.while_loop(
        lambda state: state.going & (state.tries <= most), iterate, start
    ).correction
