"""Options of conjugate gradients: stay in a trust region, or recompute residuals.

Each hook stands for one option of the loop in `hfjax.solvers.pcg`. How far to go along p
is decided by `Unbounded` or a `Region`; where the residual comes from, by `Residuals`.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Matvec, Tree

Lengths = tuple[jax.Array, jax.Array, jax.Array]
"""xᵀPx, xᵀPp and pᵀPp."""

Memory = Any
"""What `Residuals` needs of the last iteration."""

_SHORTEST = 1e-30
"""Radius, in units of b and of P⁻¹b, below which curvature does not matter."""


class Line(NamedTuple):
    """What is known about M along p before x moves.

    Attributes:
      first: whether this is the first iteration.
      x: the current iterate.
      p: the direction.
      ry: rᵀP⁻¹r.
      lengths: xᵀPx, xᵀPp and pᵀPp, with x in units of the radius.
      alpha: the step length to the minimum of M if `positive`, else 1.
      positive: whether pᵀAp > 0 beyond rounding.
      finite: whether pᵀAp and rᵀP⁻¹r are finite.
    """

    first: jax.Array
    x: Tree
    p: Tree
    ry: jax.Array
    lengths: Lengths
    alpha: jax.Array
    positive: jax.Array
    finite: jax.Array


class Unbounded(NamedTuple):
    """Go to the minimum of M along p."""

    def scaled(self, size: jax.Array, _: jax.Array) -> tuple[jax.Array, Self]:
        """Return the unit of x, which is that of b."""
        return size, self

    def length(self, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return α, whether x moves, and whether it leaves the region: never."""
        # Without positive curvature, only the first iteration takes a step, of α = 1.
        moves = line.finite & (line.positive | (line.first & (line.ry > 0)))
        return line.alpha, moves, jnp.zeros((), bool)

    def relative(self, alpha: jax.Array) -> jax.Array:
        """Return α in units of the region: there is none."""
        return alpha


class Region(NamedTuple):
    """A trust region, {x : xᵀQ x ≤ radius²}, for Steihaug and Toint's conjugate gradients.

    `norm` is v ↦ Q v, or `None` for Q = P, the preconditioner.
    """

    radius: jax.Array
    norm: Matvec | None

    def scaled(self, size: jax.Array, p_size: jax.Array) -> tuple[jax.Array, Self]:
        """Return the unit of x, and the region in this unit.

        `size` is the unit of b, and `p_size` the size of P⁻¹b in that unit.
        """
        # The loop divides P⁻¹ by p_size, so lengths in the norm of P grow by its root.
        stretch = jnp.sqrt(p_size) if self.norm is None else 1
        given = jnp.asarray(self.radius, size.dtype) * stretch / size
        radius = jnp.clip(given, _SHORTEST, 1 / _SHORTEST)
        # Within so short a radius M is linear: the step is P⁻¹b, cut short. Its radius in
        # the loop is then `_SHORTEST`, and the unit of x is smaller.
        short = size * (given / _SHORTEST)
        unit = jnp.where(given < _SHORTEST, short, size)
        return unit, self._replace(radius=radius)

    def length(self, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return α, at most to the boundary, whether x moves, and whether it leaves."""
        # At the boundary α is τ > 0 with ‖x + τp‖ = r. It is the best point if the minimum
        # along p lies beyond it, or if there is none, because the curvature is negative.
        xx, xp, pp = line.lengths
        if self.norm is not None:
            x = trees.scale(1 / self.radius, line.x)
            norm_p = self.norm(line.p)
            pp, xp = trees.dot(line.p, norm_p), trees.dot(x, norm_p)
            xx = trees.dot(x, self.norm(x))
        # In units of the radius and of ‖p‖, whose squares may overflow or underflow.
        length = jnp.sqrt(jnp.where(pp > 0, pp, 1))
        cosine = xp / length
        slack = jnp.maximum(1 - xx, 0)
        root = jnp.sqrt(cosine**2 + slack)
        # Both forms are the positive root; this takes the one that does not cancel.
        tau = jnp.where(cosine > 0, slack / (cosine + root), root - cosine)
        tau = self.radius * (tau / length)
        leaves = (~line.positive | (line.alpha >= tau)) & (line.ry > 0)
        moves = line.finite & (line.ry > 0)
        return jnp.where(leaves, tau, line.alpha), moves, leaves

    def relative(self, alpha: jax.Array) -> jax.Array:
        """Return α in units of the radius, whose square may overflow."""
        return alpha / self.radius


class Residual(NamedTuple):
    """r = A x − b and M(x) after a step, and whether a product has computed them anew."""

    r: Tree
    model: jax.Array
    fresh: jax.Array


class Residuals(NamedTuple):
    """How r = A x − b and M(x) are found in each iteration: by a recurrence.

    With an `interval`, a product computes both anew every so many iterations.
    """

    product: Matvec  # v ↦ A v, exactly if r is replaced
    b: Tree
    interval: int | None

    def start(self, one: jax.Array) -> Memory:
        """Return the memory at the start of a run."""
        if self.interval is None:
            return ()
        return sharding.zeros_like(self.b), one, jnp.zeros((), bool)

    def memory(self, product: Tree, curvature: jax.Array, fresh: jax.Array) -> Memory:
        """Return what the next iteration reads: A p, pᵀA p, whether r is fresh."""
        return () if self.interval is None else (product, curvature, fresh)

    def slope(self, r: Tree, p: Tree, ry: jax.Array) -> jax.Array:
        """Return −rᵀp, which is rᵀP⁻¹r if r is orthogonal to the last p."""
        # A fresh r is not. With rᵀP⁻¹r, the difference would grow without bound.
        return ry if self.interval is None else -trees.dot(r, p)

    def after(
        self, i: jax.Array, moves: jax.Array, x: Tree, residual: Residual
    ) -> Residual:
        """Return r and M, by a product if a replacement is due."""
        if self.interval is None:
            return residual
        due = moves & (i % self.interval == 0)
        r, model = jax.lax.cond(
            due,
            lambda: by_product(self.product, self.b, x),
            lambda: (residual.r, residual.model),
        )
        return Residual(r, model, due)

    def beta(
        self, ry: jax.Array, before: jax.Array, y: Tree, memory: Memory
    ) -> jax.Array:
        """Return β = rᵀP⁻¹r / (rᵀP⁻¹r of the last iteration).

        After a replacement it is (P⁻¹r)ᵀA p / pᵀA p.
        """
        quotient = ry / jnp.where(before > 0, before, 1)
        if self.interval is None:
            return quotient
        # For a residual of the recurrence, both are the same number. But a fresh r may be
        # far larger than the last one of the recurrence. The quotient would then be so
        # large that p hardly changes, in this iteration and the following.
        product, curvature, fresh = memory
        return jnp.where(fresh, trees.dot(y, product) / curvature, quotient)


def by_product(matvec: Matvec, b: Tree, x: Tree) -> tuple[Tree, jax.Array]:
    """Return A x − b and M(x), by one product."""
    product = matvec(x)
    r = jax.tree.map(jnp.subtract, product, b)
    return r, 0.5 * trees.dot(x, product) - trees.dot(b, x)
