"""The subproblem of one update: A = B + λD + μS, P that stands for it, and f."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _tree
from hfjax._convolutions import for_loops
from hfjax._jacobian import Jacobian, jacobian, with_penalty
from hfjax._types import Batch, Matvec, Params, Tree, ValueFn
from hfjax.cg import Subproblem
from hfjax.curvature import Curvature, ggn
from hfjax.damping import Damping, damped
from hfjax.objective import Objective
from hfjax.preconditioners import PreconditionerRule
from hfjax.structural import hidden_distance, joined


class Point(NamedTuple):
    """Where an update stands.

    Attributes:
      objective: f.
      params: θ.
      batch: the curvature data.
      eval_batch: the evaluation data.
      damping: λ.
      count: updates so far.
      key: for the preconditioner and the damping matrix, new in each update.
      memory: of the preconditioner, or `None`.
    """

    objective: Objective
    params: Params
    batch: Batch
    eval_batch: Batch
    damping: jax.Array
    count: jax.Array
    key: jax.Array
    memory: Tree = None

    def value(self, data: Batch) -> jax.Array:
        """Return f(θ) on some data."""
        return self.objective.value(self.params, data).astype(self.damping.dtype)

    def value_on(self, data: Batch) -> ValueFn:
        """Return δ ↦ f(θ + δ) on some data; +∞ where θ + δ is beyond the floats."""

        def value_fn(step: Tree) -> jax.Array:
            at = _tree.add(self.params, step)
            value = self.objective.value(at, data).astype(self.damping.dtype)
            # A saturated model has a value even there.
            return jnp.where(_overflows(at, self.params), jnp.inf, value)

        return for_loops(value_fn)

    def value_and_grad(self, step: Tree) -> tuple[jax.Array, Params]:
        """Return f and ∇f at θ + δ on the evaluation data."""

        def value_and_grad(step: Tree) -> tuple[jax.Array, Params]:
            at = _tree.add(self.params, step)
            return self.objective.value_and_grad(at, self.eval_batch)

        return for_loops(value_and_grad)(step)


def assemble(
    point: Point,
    b: Tree,
    curvature: Curvature,
    rule: Damping,
    preconditioner: PreconditionerRule | None,
) -> tuple[Subproblem, ValueFn, Tree]:
    """Build A and P at a point; the model is linearised here.

    Args:
      point: where.
      b: −∇f.
      curvature: makes B, and with structural damping B + μS.
      rule: has D and μ.
      preconditioner: makes P, or `None`.

    Returns:
      What a solver is given, δ ↦ ½ δᵀ(A − B)δ, and the preconditioner's new memory.
    """
    objective, params, batch, eval_batch, damping, count, key, memory = point
    mu = None if rule.structural is None else rule.structural.at(damping, count)
    if mu is None:
        curved, matvec = objective, curvature(objective, params, batch)
    else:
        curved = joined(objective, mu)
        matvec = curvature(objective, params, batch, structural=mu)

    penalties: list[tuple[jax.Array, Matvec]] = []
    diagonal: Tree = jnp.zeros((), damping.dtype)
    total = matvec
    if rule.matrix is not None:
        of_matrix = jax.random.fold_in(key, 1)
        matrix = rule.matrix.build(objective, params, batch, matvec, of_matrix)
        total = damped(matvec, damping, matrix.matvec)
        penalties.append((damping, matrix.matvec))
        if matrix.diagonal is not None:
            diagonal = jax.tree.map(
                lambda d: damping.astype(d.dtype) * d, matrix.diagonal
            )
    if mu is not None and rule.ratio.model == "undamped":  # Else nobody asks.
        penalties.append((mu, ggn(hidden_distance(objective), params, batch)))

    precondition = None
    if preconditioner is not None:
        data = batch if preconditioner.data == "batch" else eval_batch
        known = (curved, params, data, diagonal, key)
        if memory is None:
            precondition = preconditioner.build(*known)
        else:
            precondition, memory = preconditioner.build(*known, memory, count)

    def penalty(step: Tree) -> jax.Array:
        terms = [0.5 * a * _tree.dot(step, product(step)) for a, product in penalties]
        return sum(terms, jnp.zeros((), damping.dtype))

    def written_out() -> tuple[Jacobian, jax.Array]:
        decay = jnp.zeros(()) if objective.decay is None else objective.decay
        found = jacobian(objective, params, batch)
        if mu is not None:
            distance = jacobian(hidden_distance(objective), params, batch)
            found = with_penalty(found, mu, distance)
        return found, decay.astype(damping.dtype)

    subproblem = Subproblem(
        matvec=total,
        b=b,
        preconditioner=precondition,
        damping=damping,
        count=count,
        value_fn=point.value_on(eval_batch),
        batch_value_fn=point.value_on(batch),
        value_and_grad_fn=point.value_and_grad,
        jacobian=written_out,
    )
    return subproblem, penalty, memory


def _overflows(after: Tree, before: Tree) -> jax.Array:
    """Return whether a step took finite parameters out of the range of their dtype."""
    return ~_tree.is_finite(after) & _tree.is_finite(before)
