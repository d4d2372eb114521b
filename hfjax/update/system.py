"""The system that one update solves: A = B + λD + μS, its preconditioner P, and f.

Only this module packs the leaves of the parameters (`hfjax._core.packing`). User-supplied
functions (model, curvature, damping matrix, preconditioner) see trees like the parameters;
the solver and everything after it see a few arrays.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import as_product
from hfjax._core.packing import Packing, packing
from hfjax._core.types import (
    Batch,
    Params,
    Preconditioner,
    Tree,
    ValueFn,
)
from hfjax._tracing.convolutions import for_loops
from hfjax.curvature import Curvature, jacobian
from hfjax.curvature.jacobian import Jacobian
from hfjax.curvature.streamed_jacobian import StreamedJacobian, bounded_jacobian
from hfjax.curvature.structural import hidden_distance, with_structural_loss
from hfjax.globalization.backtracking import Before
from hfjax.globalization.damping_matrices import identity
from hfjax.globalization.rule import Damping
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import with_decays
from hfjax.preconditioners import PreconditionerRule
from hfjax.solvers.descent import System
from hfjax.update._damped import damping_of, of_packed, root_of
from hfjax.update._drawn import Drawn
from hfjax.update.point import Point, rounding_noise
from hfjax.update.sampling import Sampling
from hfjax.update.state import Sample


class Assembled(NamedTuple):
    """A system, and what else an update needs.

    Attributes:
      point: what the update starts from.
      drawn: the examples that its curvature is computed from.
      system: what the solver is given.
      packing: how the parameters are packed.
      penalty: x ↦ ½ xᵀ(A − B)x, which damping adds to M.
      memory: `() -> memory` of the preconditioner for the next update.
    """

    point: Point
    drawn: Drawn
    system: System
    packing: Packing
    penalty: ValueFn
    memory: Callable[[], Tree]

    def value_on(self, data: Batch) -> ValueFn:
        """Return x ↦ f(θ + x) on `data`, which is +∞ where θ + x overflows."""
        return _value_on(self.point, self.packing, data)

    def before(self) -> Before:
        """Return what is known before a step is chosen: f(θ), on all evaluation data."""
        value = self.point.value(self.point.eval_batch)
        has_own = self.point.eval_batch is not self.point.batch
        partial = has_own | self.drawn.is_part()
        return Before(value, self.noise(value), self.point.scalar, partial)

    def next_sample(
        self, rule: Sampling | None, step: Tree, curved: jax.Array
    ) -> Sample | None:
        """Return the sample of the next update, from δ and δᵀBδ."""
        tree = trees.cast_like(
            self.packing.unpack(step), trees.widen(self.point.params)
        )
        return self.drawn.after(rule, self.point.params, tree, curved)

    def noise(self, value: jax.Array) -> jax.Array:
        """Return how much of f(θ + x) − f(θ) may be rounding; `value` is f(θ).

        Both f and θ + x are rounded. Each entry of θ + x is off by at most ε θᵢ / 2,
        independently, which moves f by ε ‖∇f ∘ θ‖ or less with 3.5 standard deviations.
        If f is the square of a small difference, that is far more than the rounding of f.
        """

        def rounded(x: jax.Array) -> jax.Array:
            wide = x.astype(trees.wide(x.dtype))
            return float(jnp.finfo(x.dtype).eps) * wide

        b, b_size = trees.normalised(self.system.b)
        params, pack = self.point.params, self.packing.pack
        if _are_wide(params):
            errors = jax.tree.map(rounded, pack(params))
        else:
            errors = pack(jax.tree.map(rounded, params))
        errors, size = trees.normalised(errors)
        moved = jax.tree.map(lambda b, x: b * x.astype(b.dtype), b, errors)
        of_params = jnp.sqrt(trees.dot(moved, moved)) * (b_size * size)
        # If this overflows, so does f, and the noise no longer matters.
        of_params = jnp.where(jnp.isfinite(of_params), of_params, 0)
        return rounding_noise(value) + of_params


def assemble(
    point: Point,
    curvature: Curvature,
    rule: Damping,
    preconditioner: PreconditionerRule | None,
    drawn: Drawn | None = None,
) -> Assembled:
    """Build A and P; the model is linearised here, once.

    Args:
      point: what the update starts from.
      curvature: builds B, or with structural damping B + μS.
      rule: provides D and μ.
      preconditioner: builds P; `None` for none.
      drawn: the examples to compute the curvature from; `None` for all of the batch.

    Returns:
      The system, and what else the update needs.
    """
    objective, params, gradient, _, eval_batch, scalar, count, *_ = point
    drawn = drawn or Drawn(objective, point.batch)
    sampled, batch, *_ = drawn
    gradient = trees.cast_like(gradient, trees.widen(params))
    packed = packing(gradient)
    b = jax.tree.map(jnp.negative, packed.pack(gradient))

    mu = None if rule.structural is None else rule.structural.at(scalar, count)
    if mu is None:
        curved, matvec = sampled, curvature(sampled, params, batch)
    else:
        curved = with_structural_loss(sampled, mu)
        matvec = curvature(sampled, params, batch, structural=mu)
    total, diagonal, penalties = damping_of(point, drawn, rule, mu, matvec, packed)
    precondition, memory = _lazily(
        point, batch, preconditioner, curved, diagonal, packed
    )

    def penalty(x: Tree) -> jax.Array:
        terms = [0.5 * a * trees.dot(x, times(x)) for a, times in penalties]
        return sum(terms, jnp.zeros((), scalar.dtype))

    def value_and_grad(x: Tree) -> tuple[jax.Array, Tree]:
        at = trees.add(params, packed.unpack(x))
        value, there = objective.value_and_grad(at, eval_batch)
        return value, packed.pack(trees.cast_like(there, gradient))

    system = System(
        matvec=total,
        b=b,
        scalar=scalar,
        count=count,
        value=_value_on(point, packed, eval_batch),
        batch_value=_value_on(point, packed, point.batch),
        value_and_grad=for_loops(value_and_grad),
        preconditioner=precondition,
        jacobian=lambda stored: _written_out(point, mu, packed, stored),
        jacobian_size=lambda: jacobian.size(objective, params, batch),
        tikhonov=rule.matrix is identity(),
        root=root_of(rule, packed),
    )
    return Assembled(point, drawn, system, packed, penalty, memory)


def _value_on(point: Point, packed: Packing, data: Batch) -> ValueFn:
    # Parameters in float16 or bfloat16 are updated leaf by leaf, in their own dtypes.
    wide = _are_wide(point.params)
    theta = packed.pack(point.params) if wide else point.params

    def value(x: Tree) -> jax.Array:
        at = trees.add(theta, x if wide else packed.unpack(x))
        params = packed.unpack(at) if wide else at
        found = point.objective.value(params, data).astype(point.scalar.dtype)
        # A saturating model returns a finite value even where θ + x overflows.
        beyond = ~trees.is_finite(at) & trees.is_finite(theta)
        return jnp.where(beyond, jnp.inf, found)

    return for_loops(value)


def _are_wide(params: Params) -> bool:
    """Return whether all leaves have the dtype that vectors are computed in."""
    leaves = jax.tree.leaves(params)
    return all(leaf.dtype == trees.wide(leaf.dtype) for leaf in leaves)


def _lazily(
    point: Point,
    batch: Batch,
    rule: PreconditionerRule | None,
    curved: Objective,
    diagonal: Tree,
    packed: Packing,
) -> tuple[Callable[[], Preconditioner | None], Callable[[], Tree]]:
    """Return a function that builds P when first called, and one for its memory."""
    if rule is None:
        return lambda: None, lambda: point.memory
    made: list[tuple[Preconditioner, Tree]] = []

    def make() -> Preconditioner:
        if not made:
            data = batch if rule.data == "batch" else point.eval_batch
            given = (curved, point.params, data, diagonal, point.key)
            if point.memory is None:
                found, memory = rule.build(*given), None
            else:
                found, memory = rule.build(*given, point.memory, point.count)
            inverse = as_product("preconditioner", found, matrix="P⁻¹ v")
            made.append((of_packed(packed, inverse), memory))
        return made[0][0]

    return make, lambda: made[0][1] if made else point.memory


def _written_out(
    point: Point, mu: jax.Array | None, packed: Packing, stored: int | None
) -> tuple[Jacobian | StreamedJacobian, Tree | None]:
    """Compute J̃ of f and of the structural penalty, packed, and the weight decay."""
    objective, params, batch = point.objective, point.params, point.batch
    if mu is None:
        found = bounded_jacobian(objective, params, batch, stored)
    else:
        of_f, of_distance = (
            jacobian.jacobian(f, params, batch)
            for f in (objective, hidden_distance(objective))
        )
        found = jacobian.with_penalty(of_f, mu, of_distance)
    found = found.after(packed.unpack, packed.pack)
    none = jnp.zeros((), point.scalar.dtype)
    decay = with_decays(terms_of(objective, batch), none, params)
    if decay is none:  # All of it is known to be 0.
        return found, None
    if not jax.tree_util.all_leaves([decay]):
        decay = packed.pack(decay)
    return found, decay
