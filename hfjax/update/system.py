"""The system of one update: A = B + λD + μS, P that stands for it, and f.

Here, and nowhere else, the parameters' leaves are packed: users' functions (the model,
curvature, damping matrix, preconditioner) see trees like the parameters, solvers and all
that follows see a few arrays (`hfjax._core.packing`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import as_product
from hfjax._core.packing import Packing, packing
from hfjax._core.types import (
    Approximate,
    Batch,
    Matvec,
    Params,
    Preconditioner,
    Tree,
    ValueFn,
    exact_of,
)
from hfjax._tracing.convolutions import for_loops
from hfjax.curvature import Curvature, ggn, jacobian
from hfjax.curvature.jacobian import Jacobian
from hfjax.curvature.structural import hidden_distance, with_structural_loss
from hfjax.globalization.backtracking import Before
from hfjax.globalization.damping_matrices import identity
from hfjax.globalization.rule import Damping
from hfjax.objectives.objective import Objective
from hfjax.objectives.terms import decay_of
from hfjax.preconditioners import PreconditionerRule
from hfjax.solvers.descent import System


class Point(NamedTuple):
    """Where an update stands.

    Attributes:
      objective: f, as it is at `count`.
      params: θ.
      gradient: ∇f.
      batch: the curvature data.
      eval_batch: the evaluation data.
      scalar: λ, or the radius.
      count: updates so far.
      key: for the preconditioner and the damping matrix, new in each update.
      memory: of the preconditioner, or `None`.
    """

    objective: Objective
    params: Params
    gradient: Params
    batch: Batch
    eval_batch: Batch
    scalar: jax.Array
    count: jax.Array
    key: jax.Array
    memory: Tree = None

    def value(self, data: Batch) -> jax.Array:
        """Return f(θ) on some data."""
        return self.objective.value(self.params, data).astype(self.scalar.dtype)


class Assembled(NamedTuple):
    """A system, and what an update needs besides.

    Attributes:
      point: where it stands.
      system: what the solver is given.
      packing: of the parameters.
      penalty: x ↦ ½ xᵀ(A − B)x: what damping adds to M.
      memory: `() -> memory` of the preconditioner, for the next update.
    """

    point: Point
    system: System
    packing: Packing
    penalty: ValueFn
    memory: Callable[[], Tree]

    def value_on(self, data: Batch) -> ValueFn:
        """Return x ↦ f(θ + x) on some data; +∞ where θ + x is beyond the floats."""
        return _value_on(self.point, self.packing, data)

    def before(self) -> Before:
        """Return f(θ) on the evaluation data, and how much of its change is rounding."""
        value = self.point.value(self.point.eval_batch)
        return Before(value, self.noise(value), self.point.scalar)

    def noise(self, value: jax.Array) -> jax.Array:
        """Return how much of f(θ + x) − f(θ) may be rounding: of f, and of θ + x.

        The entries of θ + x are rounded independently, each by ε θᵢ / 2 at most: f moves
        by ε ‖∇f ∘ θ‖ in 3.5 standard deviations. Where f is the square of a difference,
        this is far more than the rounding of f itself.

        Args:
          value: f(θ).
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
        # Beyond the floats it counts for nothing: f is there, too.
        of_params = jnp.where(jnp.isfinite(of_params), of_params, 0)
        return rounding_noise(value) + of_params


def assemble(
    point: Point,
    curvature: Curvature,
    rule: Damping,
    preconditioner: PreconditionerRule | None,
) -> Assembled:
    """Build A and P at a point; the model is linearised here, once.

    Args:
      point: where.
      curvature: makes B, and with structural damping B + μS.
      rule: has D and μ.
      preconditioner: makes P, or `None`.

    Returns:
      The system and what goes with it.
    """
    objective, params, gradient, batch, eval_batch, scalar, count, key, _ = point
    gradient = trees.cast_like(gradient, trees.widen(params))
    packed = packing(gradient)
    b = jax.tree.map(jnp.negative, packed.pack(gradient))

    def of_vectors(name: str, product: Matvec, matrix: str = "A @ v") -> Matvec:
        return _of_packed(packed, as_product(name, product, matrix=matrix))

    mu = None if rule.structural is None else rule.structural.at(scalar, count)
    if mu is None:
        curved, matvec = objective, curvature(objective, params, batch)
    else:
        curved = with_structural_loss(objective, mu)
        matvec = curvature(objective, params, batch, structural=mu)
    product = total = of_vectors("matvec", matvec)

    penalties: list[tuple[jax.Array, Matvec]] = []
    diagonal: Tree = jnp.zeros((), scalar.dtype)
    if rule.matrix is not None:
        of_matrix = jax.random.fold_in(key, 1)
        matrix = rule.matrix.build(objective, params, batch, matvec, of_matrix)
        times_d = matrix.matvec
        if matrix.matvec is matvec:
            times_d = product
        elif rule.matrix is not identity():
            times_d = of_vectors("matrix", matrix.matvec, "D @ v")
        total = damped(product, scalar, times_d)
        penalties.append((scalar, times_d))
        if matrix.diagonal is not None:
            diagonal = jax.tree.map(
                lambda d: scalar.astype(d.dtype) * d, matrix.diagonal
            )
    if mu is not None and rule.ratio.model == "undamped":  # Else nobody asks.
        distance = ggn(hidden_distance(objective), params, batch)
        penalties.append((mu, of_vectors("matvec", distance)))

    def penalty(x: Tree) -> jax.Array:
        terms = [0.5 * a * trees.dot(x, times(x)) for a, times in penalties]
        return sum(terms, jnp.zeros((), scalar.dtype))

    precondition, memory = _lazily(point, preconditioner, curved, diagonal, packed)

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
        batch_value=_value_on(point, packed, batch),
        value_and_grad=for_loops(value_and_grad),
        preconditioner=precondition,
        jacobian=lambda: _written_out(point, mu, packed),
        jacobian_size=lambda: jacobian.size(objective, params, batch),
        tikhonov=rule.matrix is identity(),
    )
    return Assembled(point, system, packed, penalty, memory)


def _value_on(point: Point, packed: Packing, data: Batch) -> ValueFn:
    # Parameters of few digits are added to leaf by leaf, in their own dtypes.
    wide = _are_wide(point.params)
    theta = packed.pack(point.params) if wide else point.params

    def value(x: Tree) -> jax.Array:
        at = trees.add(theta, x if wide else packed.unpack(x))
        params = packed.unpack(at) if wide else at
        found = point.objective.value(params, data).astype(point.scalar.dtype)
        # A saturated model has a value even there.
        beyond = ~trees.is_finite(at) & trees.is_finite(theta)
        return jnp.where(beyond, jnp.inf, found)

    return for_loops(value)


def _are_wide(params: Params) -> bool:
    """Return whether parameters have the dtypes that vectors are computed with."""
    leaves = jax.tree.leaves(params)
    return all(leaf.dtype == trees.wide(leaf.dtype) for leaf in leaves)


def _of_packed(packed: Packing, product: Matvec) -> Matvec:
    """Return a product on packed vectors, of the same kind."""
    if isinstance(product, Approximate):
        return Approximate(*(_of_packed(packed, each) for each in product))

    def of_vector(v: Tree) -> Tree:
        tree = packed.unpack(v)
        return packed.pack(trees.cast_like(product(tree), tree))

    return of_vector


def _lazily(
    point: Point,
    rule: PreconditionerRule | None,
    curved: Objective,
    diagonal: Tree,
    packed: Packing,
) -> tuple[Callable[[], Preconditioner | None], Callable[[], Tree]]:
    """Return what makes P when it is first asked for, and what it remembers then."""
    if rule is None:
        return lambda: None, lambda: point.memory
    made: list[tuple[Preconditioner, Tree]] = []

    def make() -> Preconditioner:
        if not made:
            data = point.batch if rule.data == "batch" else point.eval_batch
            given = (curved, point.params, data, diagonal, point.key)
            if point.memory is None:
                found, memory = rule.build(*given), None
            else:
                found, memory = rule.build(*given, point.memory, point.count)
            inverse = as_product("preconditioner", found, matrix="P⁻¹ v")
            made.append((_of_packed(packed, inverse), memory))
        return made[0][0]

    return make, lambda: made[0][1] if made else point.memory


def _written_out(
    point: Point, mu: jax.Array | None, packed: Packing
) -> tuple[Jacobian, jax.Array]:
    """Write out J̃ of f and of the structural penalty, its rows packed."""
    objective, params, batch = point.objective, point.params, point.batch
    decay = decay_of(objective.weight_decay)
    decay = jnp.zeros(()) if decay is None else decay
    found = jacobian.jacobian(objective, params, batch)
    if mu is not None:
        distance = jacobian.jacobian(hidden_distance(objective), params, batch)
        found = jacobian.with_penalty(found, mu, distance)
    of_rows = Jacobian(
        rows=jax.vmap(packed.pack)(found.rows),
        residuals=found.residuals,
        residuals_at=lambda x: found.residuals_at(packed.unpack(x)),
    )
    return of_rows, decay.astype(point.scalar.dtype)


def damped(matvec: Matvec, damping: jax.Array, matrix: Matvec | None = None) -> Matvec:
    """Return v ↦ B v + λ D v (report, sections 8.1 and 8.3).

    Args:
      matvec: v ↦ B v.
      damping: λ, a scalar.
      matrix: v ↦ D v; `None` is the identity.

    Returns:
      The damped product, `Approximate` where v ↦ B v is.
    """

    def product(v: Tree) -> Tree:
        d_v = v if matrix is None else matrix(v)
        return trees.axpy(jnp.asarray(damping), d_v, matvec(v))

    if not isinstance(matvec, Approximate):
        return product
    exact = damped(matvec.exact, damping, None if matrix is None else exact_of(matrix))
    return Approximate(product, exact)


def rounding_noise(value: jax.Array) -> jax.Array:
    """Return how much of f(θ) may be rounding: 10 ε |f|, or the least normal float.

    Args:
      value: f(θ).

    Returns:
      A scalar above 0; the 10 is a heuristic.
    """
    limits = jnp.finfo(value.dtype)
    return jnp.maximum(10 * limits.eps * jnp.abs(value), limits.tiny)


def key_of(seed: int, count: jax.Array) -> jax.Array:
    """Return the key of an update, which draws all its random numbers.

    The two numbers are the key itself: to fold one into the other would be one more
    program to compile, and no more random.

    Args:
      seed: of the optimizer.
      count: updates so far.

    Returns:
      A typed key.
    """
    data = [jnp.uint32(seed % 2**32), count.astype(jnp.uint32)]
    return jax.random.wrap_key_data(jnp.stack(data), impl="threefry2x32")
