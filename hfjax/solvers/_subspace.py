"""Solve for other λ in the subspace of one run of conjugate gradients.

The kept iterates of a run on A = B + λI span a subspace on which A is known without
further products. Let d_j be the step from one kept iterate to the next, oldest first, and
M_j the value of M at the j-th. Every step ends at a minimum along itself, so

    d_iᵀA d_j = 0 for i ≠ j,    d_jᵀA d_j = 2 (M_{j−1} − M_j) = c_j.

The first kept iterate x₀ may contain a warm start. It satisfies x₀ᵀA x₀ = 2 (M₀ + bᵀx₀)
and x₀ᵀA d_j = bᵀd_j − c_j. So for any other λ′, the minimum of M over the subspace solves
a system with as many unknowns as there are kept iterates:

    (S + (λ′ − λ) N) y = Vᵀb,    S = VᵀA V,  N = VᵀV,  V = [x₀ d₁ d₂ …].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.types import Tree
from hfjax._tracing import linalg
from hfjax.solvers.iterates import Iterates, by_age


class Subspace(NamedTuple):
    """The subspace of the kept iterates, and A on it."""

    vectors: Tree  # V / size, each leaf with a leading axis; 0 for empty slots
    size: jax.Array  # a power of two near max |V|, which may overflow if squared
    curvature: jax.Array  # S = VᵀA V
    gram: jax.Array  # N / size²
    rhs: jax.Array  # Vᵀb
    damping: jax.Array  # λ of the run, in A = B + λI
    first: jax.Array  # 1 for the oldest iterate, 0 for the steps

    def penalty(self, damping: jax.Array) -> jax.Array:
        """Return Vᵀ(λI) V."""
        return _penalty(damping, self.size, self.gram)

    def solve(self, damping: jax.Array) -> tuple[Tree, jax.Array, jax.Array]:
        """Return the step for λ′ ≥ 0, and M there: with the run's λ, and without any."""
        matrix = self.curvature + self.penalty(damping - self.damping)
        # The steps differ by orders of magnitude, so scale the diagonal to 1. Empty slots
        # get a row of the identity, and thus the coefficient 0.
        diagonal = jnp.diagonal(matrix)
        there = diagonal > 0
        unit = jnp.where(there, jax.lax.rsqrt(jnp.where(there, diagonal, 1)), 0)
        scaled = unit[:, None] * matrix * unit[None]
        scaled += jnp.diag(jnp.where(there, 0, 1).astype(scaled.dtype))
        y = unit * linalg.solve(scaled, unit * self.rhs)
        # Without any positive curvature, take the first iterate, which goes downhill.
        y = jnp.where(jnp.any(there), y, self.first)
        model = 0.5 * y @ (self.curvature @ y) - self.rhs @ y
        undamped = model - 0.5 * y @ (self.penalty(self.damping) @ y)
        step = trees.combination(self.size * y, self.vectors)
        return step, model, undamped


def subspace(
    kept: Iterates, model_values: jax.Array, b: Tree, damping: jax.Array
) -> Subspace:
    """Return the subspace of a run on A = B + λI, with one vector per slot of `kept`."""
    there = kept.iterations >= 0
    models = model_values[jnp.maximum(kept.iterations, 0)]
    size = trees.magnitude(kept.iterates).astype(models.dtype)
    slots, numbers = by_age(kept.iterations), jnp.arange(len(there), dtype=jnp.int32)
    vectors = _steps(kept.iterates, there, slots, 1 / size)
    rhs = size * trees.coordinates(vectors, b).astype(models.dtype)
    gram = trees.gram(vectors, vectors).astype(models.dtype)
    damping = damping.astype(models.dtype)
    penalty = _penalty(damping, size, gram)
    is_first = numbers == slots[0]
    follows = slots[None, 1:] == numbers[:, None]
    before = jnp.sum(jnp.where(follows, slots[None, :-1], 0), axis=1, dtype=jnp.int32)
    falls = jnp.where(is_first, 0, 2 * (models[before] - models))
    # Drop steps whose gain is lost in the rounding of M, since a wrong c_j would spoil the
    # solution in the other directions. It is also wrong if it violates c_j ≥ λ d_jᵀd_j,
    # which A ≥ λI implies; the factor ½ allows for rounding.
    noise = 16 * jnp.finfo(models.dtype).eps * jnp.max(jnp.abs(models))
    known = (falls > noise) & (falls >= 0.5 * jnp.diagonal(penalty))
    known = there & (known | is_first)
    falls, rhs = jnp.where(known, falls, 0), jnp.where(known, rhs, 0)
    gram = jnp.where(known[:, None] & known[None], gram, 0)
    first = is_first.astype(models.dtype)
    with_first = jnp.where(is_first, 0, rhs - falls)
    own = jnp.where(is_first, 2 * (models + rhs), falls)
    row = jnp.where(is_first[:, None], with_first[None], 0)
    curvature = jnp.diag(own) + row + row.T
    return Subspace(vectors, size, curvature, gram, rhs, damping, first)


def _steps(
    iterates: Tree, there: jax.Array, slots: jax.Array, scale: jax.Array
) -> Tree:
    """Return the first iterate, and the steps from each to the next, times `scale`."""
    # From the newest on, each step overwrites the iterate that it ends at: no later round
    # of the loop reads that again, and the buffer is not needed twice.

    def step(number: jax.Array, iterates: Tree) -> Tree:
        age = len(there) - 1 - number
        slot, earlier = slots[age], slots[jnp.maximum(age - 1, 0)]

        def leaf(after: jax.Array, before: jax.Array) -> jax.Array:
            change = jnp.where(age > 0, after - before, after)
            return jnp.where(there[slot], change, 0) * scale.astype(change.dtype)

        ends = (trees.row(iterates, n) for n in (slot, earlier))
        return trees.with_row(iterates, slot, jax.tree.map(leaf, *ends))

    return jax.lax.fori_loop(0, len(there), step, iterates)


def _penalty(damping: jax.Array, size: jax.Array, gram: jax.Array) -> jax.Array:
    # In this order, because `size`² may overflow.
    return (damping * size) * (size * gram)
