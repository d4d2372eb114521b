"""The Jacobian of the outputs as an explicit matrix: G = J̃ᵀJ̃ + weight_decay · I.

The row of J̃ for output k of example i is √(c wᵢ / Σ w) (Sᵢ eₖ)ᵀJᵢ, with SᵢSᵢᵀ = L″ᵢ
and c the weight of the term in a sum. Columns Sᵢeₖ that are 0 for any example have no
row. If ∇Lᵢ is in the range of Sᵢ, the gradient of the data's part of f is J̃ᵀr̃ with
r̃ᵢ = √(c wᵢ / Σ w) Sᵢ⁺∇Lᵢ. Then, for any loss, minimising the quadratic model is the
least-squares problem min ‖J̃δ + r̃‖².
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import linalg, programs
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import has_tangent, noting_no_reverse
from hfjax.losses.loss import are_disjoint, columns
from hfjax.objectives.cases import Cases
from hfjax.objectives.means import Means
from hfjax.objectives.plain import Objective, terms_of
from hfjax.objectives.terms import Term

Map: TypeAlias = Callable[[Tree], Tree]


class Jacobian(NamedTuple):
    """J̃ and r̃ for the examples of all devices, in float32 or wider.

    Attributes:
      rows: J̃, a tree like the parameters with a leading axis of rows.
      residuals: r̃, shape `[rows]`.
      residuals_at: δ ↦ r̃(θ + δ), but with the Sᵢ of θ, shape `[rows]`, for a forward
        pass. It is r̃ + J̃δ for squared errors and a model that is linear in θ.
    """

    rows: Tree
    residuals: jax.Array
    residuals_at: Callable[[Tree], jax.Array]

    @property
    def dtype(self) -> jnp.dtype:
        """Return the widest dtype of the rows, and float32 at least."""
        return trees.scalar_dtype(self.rows)

    def product(self, v: Tree) -> jax.Array:
        """Return J̃ v, shape `[rows]`."""
        return trees.gram(self.rows, jax.tree.map(lambda x: x[None], v))[:, 0]

    def transpose(self, u: jax.Array) -> Tree:
        """Return J̃ᵀu, like the parameters."""
        return trees.combination(u, self.rows)

    def squares(self) -> Tree:
        """Return the diagonal of J̃ᵀJ̃, like the parameters."""
        return jax.tree.map(lambda rows: jnp.sum(rows * rows, axis=0), self.rows)

    def matrix(self) -> jax.Array:
        """Return J̃ as one matrix, its columns in the order of `ravel_pytree`."""
        return jax.vmap(lambda row: ravelled(row)[0])(self.rows)

    def of_parameters(self) -> jax.Array:
        """Return J̃ᵀJ̃, in the order of `matrix`."""
        leaves = jax.tree.leaves(self.rows)
        if any(map(sharding.may_be_sharded, leaves)):
            rows = self.matrix()
            return sharding.contracted(rows, rows, ((0,), (0,)), trees.EXACT)
        return linalg.squared_columns(self.rows, self.dtype)

    def of_samples(self, weigh: Map | None = None) -> jax.Array:
        """Return J̃J̃ᵀ, or J̃W⁻¹J̃ᵀ if rows are to be weighed by W⁻¹."""
        if weigh is not None:
            return trees.gram(weigh(self.rows), self.rows)
        if any(map(sharding.may_be_sharded, jax.tree.leaves(self.rows))):
            return trees.gram(self.rows, self.rows)
        return linalg.square(self.matrix())

    def after(self, into: Map, transposed: Map) -> "Jacobian":
        """Return J̃A for a linear map A = `into`; Aᵀ = `transposed`."""
        return Jacobian(
            jax.vmap(transposed)(self.rows),
            self.residuals,
            lambda v: self.residuals_at(into(v)),
        )


class Size(NamedTuple):
    """The size of J̃ and the cost of a forward pass, as Python integers.

    Attributes:
      rows: those for all examples on this device; mostly one for each output.
      columns: the number of parameters.
      forward: the multiplications of a forward pass over these examples.
    """

    rows: int
    columns: int
    forward: int


def size(objective: Objective, params: Params, batch: Batch) -> Size:
    """Count rows, columns and multiplications, by tracing the model on one example."""
    rows = forward = 0
    for term in terms_of(objective, batch):
        count = term.cases.weights.shape[0]
        inputs, targets = sharding.first_case(term.cases[:2])
        local = term.means.local(sharding.gathered(params, term.cases))
        # The examples are alike, so one is enough.
        program, shapes = jax.make_jaxpr(term.outputs, return_shape=True)(local, inputs)
        rows += count * len(columns(term.loss, shapes, targets))
        forward += count * programs.multiplications(program)
    return Size(rows, optax.tree.size(params), forward)


def jacobian(objective: Objective, params: Params, batch: Batch) -> Jacobian:
    """Compute J̃ and r̃.

    A row takes a backward pass over its example, and a column a forward pass over all
    examples. `"auto"` takes columns if there are fewer parameters than rows of an
    example, and the model has forward derivatives.

    J̃ has rows · parameters entries. Microbatches bound what the passes hold, but not
    J̃. Weight decay is left out.
    """
    parts = [_of_term(params, term) for term in terms_of(objective, batch)]
    rows, residuals = jax.tree.map(_joined, *(part[:2] for part in parts))

    def residuals_at(step: Tree) -> jax.Array:
        return _joined(*(part.residuals_at(step) for part in parts))

    return Jacobian(rows, residuals, for_loops(residuals_at))


def _joined(*arrays: jax.Array) -> jax.Array:
    """Concatenate arrays in the widest of their dtypes."""
    dtype = trees.widest(*(x.dtype for x in arrays))
    return jnp.concatenate([x.astype(dtype) for x in arrays])


def ravelled(tree: Tree) -> tuple[jax.Array, Callable[[jax.Array], Tree]]:
    """Return a tree as one vector, in the widest dtype, and the inverse of this."""
    with jax.numpy_dtype_promotion("standard"):
        return ravel_pytree(tree)


def with_penalty(of_f: Jacobian, strength: jax.Array, of_penalty: Jacobian) -> Jacobian:
    """Append the rows of a quadratic penalty ½ μ ‖J̃ₚδ‖², with μ = `strength`."""

    def scaled(x: jax.Array) -> jax.Array:
        return jnp.sqrt(strength).astype(x.dtype) * x

    penalty = of_penalty._replace(rows=jax.tree.map(scaled, of_penalty.rows))
    rows = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), of_f.rows, penalty.rows
    )
    # Structural damping is such a penalty. It is not part of f, so its residuals at θ + δ are
    # those of the linear model, J̃ₚδ. (The loss that includes the distance would give 0, as
    # it takes the hidden states at θ + δ for the reference, and so cancel the damping.)
    none = sharding.zeros_like(penalty.residuals).astype(of_f.residuals.dtype)

    def residuals_at(step: Tree) -> jax.Array:
        own = of_f.residuals_at(step)
        return jnp.concatenate([own, penalty.product(step).astype(own.dtype)])

    return Jacobian(rows, jnp.concatenate([of_f.residuals, none]), residuals_at)


def _of_term(params: Params, term: Term) -> Jacobian:
    cases, means = sharding.alike(term.cases), term.means
    rows, residuals, inverses = rows_of(params, term, cases)
    total = means.total(cases.weights)

    def laid_out(x: jax.Array) -> jax.Array:
        x = sharding.gathered(weighted(term, cases, total, x), cases)
        return means.gathered(x.reshape(-1, *x.shape[2:]))

    def residuals_at(step: Tree) -> jax.Array:
        there = trees.add(params, step)
        return laid_out(residuals_of(there, term, cases, inverses))

    rows, residuals = jax.tree.map(laid_out, (rows, residuals))
    rows = with_empty(rows, trees.widen(params), len(residuals))
    return Jacobian(rows, residuals, residuals_at)


def with_empty(rows: list[jax.Array], like: Tree, count: int) -> Tree:
    """Return rows as a tree, in which `rows_of` has left out the leaves without entries."""
    found = iter(rows)
    return jax.tree.map(
        lambda x: next(found) if x.size else jnp.zeros((count, *x.shape), x.dtype), like
    )


def rows_of(
    params: Params, term: Term, cases: Cases
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Return rows and residuals of examples, `[cases, rows, …]` without weights, and the Sᵢ⁺.

    The rows are those of the leaves of the parameters that are not empty.
    """
    local = term.means.local(sharding.gathered(params, cases))
    differentiate = _by_columns if _goes_forward(term, local) else _by_rows

    def of_case(inputs: Tree, targets: Tree) -> tuple[Tree, jax.Array, jax.Array]:
        inputs, targets = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))

        def run(params: Params) -> Tree:
            return term.outputs(params, inputs)

        outputs, times = differentiate(run, local, term.means)
        factor, inverse = factor_of(term, outputs, targets)
        # Leave out parameters without entries: they cannot be gathered, or mapped over.
        rows = [leaf for leaf in jax.tree.leaves(times(factor)) if leaf.size]
        return rows, _solved(term, inverse, outputs, targets), inverse

    return _of_cases(term, of_case, cases.inputs, cases.targets)


def residuals_of(
    params: Params, term: Term, cases: Cases, inverses: jax.Array
) -> jax.Array:
    """Return residuals of examples, `[cases, rows]` without weights, with Sᵢ⁺ as given."""
    there = term.means.local(sharding.gathered(params, cases))

    def of_case(inputs: Tree, targets: Tree, inverse: jax.Array) -> jax.Array:
        inputs, targets = jax.tree.map(lambda leaf: leaf[None], (inputs, targets))
        return _solved(term, inverse, term.outputs(there, inputs), targets)

    known = sharding.alike((cases.inputs, cases.targets, inverses))
    return _of_cases(term, of_case, *known)


def _of_cases(term: Term, compute: Callable[..., Tree], *trees: Tree) -> Tree:
    size = term.means.microbatch_size
    if size is None:
        return jax.vmap(compute)(*trees)
    compute = for_loops(compute)
    return jax.lax.map(lambda case: compute(*case), trees, batch_size=size)


def _goes_forward(term: Term, params: Params) -> bool:
    """Return whether to compute J by columns."""
    if term.mode != "auto":
        return term.mode == "forward"
    if optax.tree.size(params) >= len(term.columns(params)):
        return False
    inputs = sharding.first_case(term.cases.inputs)
    return has_tangent(lambda params: term.outputs(params, inputs), params)


_Times: TypeAlias = Callable[[jax.Array], Tree]
"""S ↦ SᵀJ, with the rows of J as trees; S is a matrix, or the vector of its diagonal."""


@noting_no_reverse()
def _by_rows(
    run: Callable[[Params], Tree], params: Params, means: Means
) -> tuple[Tree, _Times]:
    """Return the outputs of an example, and SᵀJ by a backward pass for each of its rows."""
    outputs, transpose = jax.vjp(run, params)
    _, unflatten = ravelled(outputs)

    def times(factor: jax.Array) -> Tree:
        columns = jnp.diag(factor) if factor.ndim == 1 else factor.T
        # An S that is the same for all examples is not marked as varying over devices.
        units = means.local(jax.vmap(unflatten)(columns))
        with noting_no_reverse():
            return jax.vmap(lambda v: transpose(trees.cast_like(v, outputs))[0])(units)

    return outputs, times


def _by_columns(
    run: Callable[[Params], Tree], params: Params, means: Means
) -> tuple[Tree, _Times]:
    """Return the outputs of an example, and SᵀJ by a forward pass for each parameter."""
    flat, unflatten = ravelled(params)
    units = jax.vmap(unflatten)(jnp.eye(flat.size, dtype=flat.dtype))
    units = means.local(trees.cast_like(units, params))

    def tangent(v: Params) -> jax.Array:
        return ravelled(jax.jvp(run, (params,), (v,))[1])[0]

    outputs, columns = run(params), jax.vmap(tangent, out_axes=1)(units)

    def times(factor: jax.Array) -> Tree:
        if factor.ndim == 1:
            rows = factor.astype(columns.dtype)[:, None] * columns
        else:
            rows = jnp.matmul(factor.T, columns, precision=trees.EXACT)
        return jax.vmap(unflatten)(rows.astype(flat.dtype))

    return outputs, times


def factor_of(term: Term, outputs: Tree, targets: Tree) -> tuple[jax.Array, jax.Array]:
    """Return S of an example and S⁺: matrices, or vectors if they are diagonal."""
    flat, unflatten = ravelled(outputs)
    factor = term.loss.factor(outputs, targets)

    def column(unit: jax.Array) -> jax.Array:
        return ravelled(factor(unflatten(unit)))[0]

    known = columns(term.loss, outputs, targets)
    disjoint = are_disjoint(term.loss, outputs, targets, known)
    if disjoint and len(known) == flat.size:
        diagonal = column(jnp.ones_like(flat))
        wide = diagonal.astype(trees.wide(diagonal.dtype))
        return diagonal, jnp.where(wide == 0, 0, 1 / jnp.where(wide == 0, 1, wide))
    units = jax.nn.one_hot(jnp.asarray(known, int), flat.size, dtype=flat.dtype)
    matrix = jax.vmap(column, out_axes=1)(units)
    if disjoint:
        return matrix, linalg.pinv_of_disjoint(matrix)
    return matrix, _pseudoinverse(matrix, flat.dtype)


def _solved(term: Term, inverse: jax.Array, outputs: Tree, targets: Tree) -> jax.Array:
    """Return S⁺∇L for an example: the shortest r with the least ‖S r − ∇L‖."""
    slope = jax.grad(lambda z: jnp.sum(term.loss.value(z, targets)))(outputs)
    slope = ravelled(slope)[0].astype(inverse.dtype)
    if inverse.ndim == 1:
        return inverse * slope
    return jnp.matmul(inverse, slope, precision=trees.EXACT)


def weighted(term: Term, cases: Cases, total: jax.Array, x: jax.Array) -> jax.Array:
    """Scale values of examples, `[cases, …]`, by √(c w / Σ w)."""
    x = x.astype(trees.wide(x.dtype))
    # Compute in the dtype of the rows, as weights may have a narrower one.
    numbers = (cases.weights, total, 1 if term.weight is None else term.weight)
    w, all_of_them, c = (jnp.asarray(number, x.dtype) for number in numbers)
    return x * jnp.sqrt(c * w / all_of_them).reshape(-1, *[1] * (x.ndim - 1))


def _pseudoinverse(factor: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return S⁺ of a factor that was computed in a dtype."""
    # The cutoff is the rounding of the dtype in which S was computed, not of the wider one.
    # Otherwise singular values that should be 0 would be inverted.
    factor = factor.astype(trees.wide(factor.dtype))
    eps = float(jnp.finfo(dtype).eps)
    return linalg.pinv(factor, jnp.asarray(10 * len(factor) * eps, factor.dtype))
