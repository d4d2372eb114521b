"""What conjugate gradients may do otherwise: stay in a region, compute residuals anew.

Each hook stands for one option of the loop in `hfjax.solvers.pcg`, and is chosen when the program
is built. How far to go along p: `Unbounded`, or within a `Region`. How the residual is
found: by its `Recurrence`, or by a `Replacement` every so many iterations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Matvec, Tree

Lengths = tuple[jax.Array, jax.Array, jax.Array]
"""xᵀPx, xᵀPp and pᵀPp."""

Memory = Any
"""What `Recurrence` or `Replacement` reads of the last iteration."""

_SHORTEST = 1e-30
"""Radius, in units of b and of P⁻¹b, below which nothing but b matters."""


class Line(NamedTuple):
    """What is known of M along p before x moves.

    Attributes:
      first: whether this is the first iteration.
      x: where it starts.
      p: the direction.
      ry: rᵀP⁻¹r.
      lengths: xᵀPx, xᵀPp and pᵀPp, x in the region's units.
      alpha: to the minimum of M, where pᵀAp is positive; else 1.
      positive: whether it is, beyond rounding.
      finite: whether pᵀAp and rᵀP⁻¹r are.
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

    def scaled(
        self, size: jax.Array, p_size: jax.Array
    ) -> tuple[jax.Array, "Unbounded"]:
        """Return the unit of x: that of b."""
        del p_size
        return size, self

    def length(self, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return α, whether x moves, and whether it leaves the region: never."""
        moves = line.finite & (line.positive | (line.first & (line.ry > 0)))
        return line.alpha, moves, jnp.zeros((), bool)

    def relative(self, alpha: jax.Array) -> jax.Array:
        """Return α in units of the region: there is none."""
        return alpha


class Region(NamedTuple):
    """A trust region, {x : xᵀQ x ≤ radius²}: Steihaug and Toint's conjugate gradients.

    Attributes:
      radius: r > 0.
      norm: v ↦ Q v; `None` is the preconditioner's own P.
    """

    radius: jax.Array
    norm: Matvec | None

    def scaled(self, size: jax.Array, p_size: jax.Array) -> tuple[jax.Array, "Region"]:
        """Return the unit of x, and the region in it.

        Args:
          size: of b.
          p_size: of P⁻¹b, in units of b.
        """
        stretch = jnp.sqrt(p_size) if self.norm is None else 1
        given = jnp.asarray(self.radius, size.dtype) * stretch / size
        radius = jnp.clip(given, _SHORTEST, 1 / _SHORTEST)
        # Beside one as short as that there is no curvature: the step is b, cut short.
        short = size * (given / _SHORTEST)
        unit = jnp.where(given < _SHORTEST, short, size)
        return unit, self._replace(radius=radius)

    def length(self, line: Line) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return α, cut short at the boundary, whether x moves, and whether it leaves.

        α is τ > 0 with ‖x + τp‖ = r where the minimum lies beyond, or where M falls for
        ever: down a direction of negative curvature, too, the boundary is the best point.
        """
        xx, xp, pp = line.lengths
        if self.norm is not None:
            x = trees.scale(1 / self.radius, line.x)
            norm_p = self.norm(line.p)
            pp, xp = trees.dot(line.p, norm_p), trees.dot(x, norm_p)
            xx = trees.dot(x, self.norm(x))
        # In units of the radius and of ‖p‖, whose squares may leave float32.
        length = jnp.sqrt(jnp.where(pp > 0, pp, 1))
        cosine = xp / length
        room = jnp.maximum(1 - xx, 0)
        root = jnp.sqrt(cosine**2 + room)
        # Of the two forms of the root, the one that subtracts nothing.
        tau = jnp.where(cosine > 0, room / (cosine + root), root - cosine)
        tau = self.radius * (tau / length)
        leaves = (~line.positive | (line.alpha >= tau)) & (line.ry > 0)
        moves = line.finite & (line.ry > 0)
        return jnp.where(leaves, tau, line.alpha), moves, leaves

    def relative(self, alpha: jax.Array) -> jax.Array:
        """Return α in units of the radius, whose square may be no float."""
        return alpha / self.radius


class Residual(NamedTuple):
    """r and M after a step.

    Attributes:
      r: A x − b.
      model: M(x).
      fresh: whether they were computed anew.
    """

    r: Tree
    model: jax.Array
    fresh: jax.Array


class Recurrence(NamedTuple):
    """The residual of each iteration follows from that of the last.

    Attributes:
      product: v ↦ A v, for the first one.
    """

    product: Matvec

    def start(self, like: Tree, one: jax.Array) -> Memory:
        """Return the memory of a run that begins: there is none."""
        del like, one
        return ()

    def memory(self, product: Tree, curvature: jax.Array, fresh: jax.Array) -> Memory:
        """Return what the next iteration reads."""
        del product, curvature, fresh
        return ()

    def slope(self, r: Tree, p: Tree, ry: jax.Array) -> jax.Array:
        """Return −rᵀp, which is rᵀP⁻¹r: r is orthogonal to the last p."""
        del r, p
        return ry

    def after(
        self, i: jax.Array, moves: jax.Array, x: Tree, residual: Residual
    ) -> Residual:
        """Return r and M as they are."""
        del i, moves, x
        return residual

    def beta(
        self, ry: jax.Array, before: jax.Array, y: Tree, memory: Memory
    ) -> jax.Array:
        """Return β = rᵀP⁻¹r / (rᵀP⁻¹r of the last)."""
        del y, memory
        return ry / jnp.where(before > 0, before, 1)


class Replacement(NamedTuple):
    """The residual is computed anew every so many iterations, and M with it.

    Attributes:
      interval: iterations from one to the next.
      product: v ↦ A v, by which.
      b: the right-hand side.
    """

    interval: int
    product: Matvec
    b: Tree

    def start(self, like: Tree, one: jax.Array) -> Memory:
        """Return the memory of a run that begins."""
        return sharding.zeros_like(like), one, jnp.zeros((), bool)

    def memory(self, product: Tree, curvature: jax.Array, fresh: jax.Array) -> Memory:
        """Return what the next iteration reads: A p, pᵀA p, whether r is fresh."""
        return product, curvature, fresh

    def slope(self, r: Tree, p: Tree, ry: jax.Array) -> jax.Array:
        """Return −rᵀp: without it, what replacing brings in grows without bound."""
        del ry
        return -trees.dot(r, p)

    def after(
        self, i: jax.Array, moves: jax.Array, x: Tree, residual: Residual
    ) -> Residual:
        """Return r and M by a product where that is due."""
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
        """Return β, of a fresh residual (P⁻¹r)ᵀA p / pᵀA p.

        That is the same number where r is the recurrence's. Beside a far smaller rᵀP⁻¹r
        of before, the quotient would make the next p the old one, and again.
        """
        product, curvature, fresh = memory
        quotient = ry / jnp.where(before > 0, before, 1)
        return jnp.where(fresh, trees.dot(y, product) / curvature, quotient)


def by_product(matvec: Matvec, b: Tree, x: Tree) -> tuple[Tree, jax.Array]:
    """Return A x − b and M(x) by a product."""
    product = matvec(x)
    r = jax.tree.map(jnp.subtract, product, b)
    return r, 0.5 * trees.dot(x, product) - trees.dot(b, x)
