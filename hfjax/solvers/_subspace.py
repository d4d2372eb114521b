"""One run of conjugate gradients, solved again for other λ.

The iterates of a run on A = B + λI span a subspace. What A is on it needs no product:
with d_j the steps from one kept iterate to the next, and M at those iterates,

    d_iᵀA d_j = 0 for i ≠ j,    d_jᵀA d_j = 2 (M_{j−1} − M_j) = c_j,

as each step ends at a minimum along it. The first kept iterate x₀ itself, which a warm
start may have in it, has x₀ᵀA x₀ = 2 (M₀ + bᵀx₀) and x₀ᵀA d_j = bᵀd_j − c_j. So the
minimum of M over the subspace for any other λ′ is a system of as many unknowns as there
are kept iterates,

    (S + (λ′ − λ) N) y = Vᵀb,    S = VᵀA V,  N = VᵀV,  V = [x₀ d₁ d₂ …].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.types import Tree
from hfjax._tracing import linalg
from hfjax.solvers.iterates import Iterates


class Subspace(NamedTuple):
    """The kept iterates' subspace, and A on it.

    Attributes:
      vectors: V / `size`, each leaf with a leading axis of vectors; those that are none
        are 0.
      size: near the largest entry of V, whose square may be no float.
      curvature: S = VᵀA V.
      gram: N = VᵀV, in units of `size`².
      rhs: Vᵀb.
      damping: λ, in A.
    """

    vectors: Tree
    size: jax.Array
    curvature: jax.Array
    gram: jax.Array
    rhs: jax.Array
    damping: jax.Array

    def penalty(self, damping: jax.Array) -> jax.Array:
        """Return VᵀλI V of some λ."""
        return _penalty(damping, self.size, self.gram)

    def solve(self, damping: jax.Array) -> tuple[Tree, jax.Array, jax.Array]:
        """Minimise M for λ′ over the subspace.

        Args:
          damping: λ′ ≥ 0.

        Returns:
          The step; M there, of the run's λ; and M without any λ.
        """
        matrix = self.curvature + self.penalty(damping - self.damping)
        # In units that make its diagonal 1: steps differ by orders of magnitude.
        diagonal = jnp.diagonal(matrix)
        there = diagonal > 0
        unit = jnp.where(there, jax.lax.rsqrt(jnp.where(there, diagonal, 1)), 0)
        scaled = unit[:, None] * matrix * unit[None]
        scaled += jnp.diag(jnp.where(there, 0, 1).astype(scaled.dtype))
        y = unit * linalg.solve(scaled, unit * self.rhs)
        # Of no positive curvature at all: the first iterate is a step downhill.
        y = jnp.where(jnp.any(there), y, jnp.zeros_like(y).at[0].set(1))
        model = 0.5 * y @ (self.curvature @ y) - self.rhs @ y
        undamped = model - 0.5 * y @ (self.penalty(self.damping) @ y)
        step = trees.combination(self.size * y, self.vectors)
        return step, model, undamped


def subspace(
    kept: Iterates, model_values: jax.Array, b: Tree, damping: jax.Array
) -> Subspace:
    """Find what A is on the kept iterates of a run.

    Args:
      kept: of the run.
      model_values: M at every iterate of it.
      b: its right-hand side.
      damping: its λ, of A = B + λI.

    Returns:
      The subspace; it holds as many vectors as `kept` has slots.
    """
    there = kept.iterations >= 0
    models = model_values[jnp.maximum(kept.iterations, 0)]
    size = trees.magnitude(kept.iterates).astype(models.dtype)
    vectors = _steps(kept.iterates, there, 1 / size)
    rhs = size * trees.coordinates(vectors, b).astype(models.dtype)
    gram = trees.gram(vectors, vectors).astype(models.dtype)
    damping = damping.astype(models.dtype)
    penalty = _penalty(damping, size, gram)
    falls = jnp.append(0.0, 2 * (models[:-1] - models[1:])).astype(models.dtype)
    # c_j ≥ λ d_jᵀd_j; of a step whose gain is rounding of M nothing else is known, and
    # what is taken for its c_j would spoil the others'.
    noise = 16 * jnp.finfo(models.dtype).eps * jnp.max(jnp.abs(models))
    known = (falls > noise) & (falls >= 0.5 * jnp.diagonal(penalty))
    known = there & known.at[0].set(True)
    falls, rhs = jnp.where(known, falls, 0), jnp.where(known, rhs, 0)
    gram = jnp.where(known[:, None] & known[None], gram, 0)
    first = (rhs - falls).at[0].set(0)
    own = jnp.zeros_like(models).at[0].set(2 * (models[0] + rhs[0]))
    curvature = jnp.diag(falls + own).at[0].add(first).at[:, 0].add(first)
    return Subspace(vectors, size, curvature, gram, rhs, damping)


def _steps(iterates: Tree, there: jax.Array, scale: jax.Array) -> Tree:
    """Return the first iterate, and the steps from each to the next, scaled.

    They take the iterates' place, from the last on: a loop writes where it has read,
    and so the iterates' memory is not needed twice.
    """

    def step(number: jax.Array, iterates: Tree) -> Tree:
        slot = len(there) - 1 - number

        def leaf(buffer: jax.Array) -> jax.Array:
            after, before = (
                jax.lax.dynamic_index_in_dim(buffer, n, keepdims=False)
                for n in (slot, jnp.maximum(slot - 1, 0))
            )
            change = jnp.where(slot > 0, after - before, after)
            change = jnp.where(there[slot], change, 0) * scale.astype(change.dtype)
            return jax.lax.dynamic_update_index_in_dim(buffer, change, slot, 0)

        return jax.tree.map(leaf, iterates)

    return jax.lax.fori_loop(0, len(there), step, iterates)


def _penalty(damping: jax.Array, size: jax.Array, gram: jax.Array) -> jax.Array:
    return (damping * size) * (size * gram)
