"""J̃ that is never stored: what `hfjax.sample_space` asks of it, from chunks of the examples.

J̃ᵀJ̃ is summed over the chunks, and J̃J̃ᵀ is made of blocks, each of two of them. Products with
J̃ run the model again, chunk by chunk. So the memory is that of a chunk, and of the matrix.
Rows are computed once for J̃ᵀJ̃, and for J̃J̃ᵀ once for each pair of chunks, which is little
beside the products of the rows if a chunk has some hundreds of them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core import sharding, sums, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import linalg
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import Linearized, linearized
from hfjax.curvature.jacobian import (
    Jacobian,
    Map,
    factor_of,
    jacobian,
    ravelled,
    residuals_of,
    rows_of,
    weighted,
    with_empty,
)
from hfjax.objectives.cases import Cases
from hfjax.objectives.means import Means
from hfjax.objectives.plain import Objective, terms_of
from hfjax.objectives.terms import Term


class Part(NamedTuple):
    """The rows of a term, in chunks of equal size; k is the number of a chunk.

    Attributes:
      count: the number of chunks.
      size: the rows of a chunk, those of all devices.
      means: how to sum over devices.
      rows: k ↦ rows of this device, a tree like the parameters with a leading axis.
      product: k, v ↦ the rows of all devices times v, shape `[size]`.
      transpose: k, u ↦ the transpose of that.
      like: zeros like J̃ᵀu.
    """

    count: int
    size: int
    means: Means
    rows: Callable[[jax.Array], Tree]
    product: Callable[[jax.Array, Tree], jax.Array]
    transpose: Callable[[jax.Array, jax.Array], Tree]
    like: Tree

    def all_rows(self, k: jax.Array) -> Tree:
        """Return the rows of all devices in a chunk."""
        return jax.tree.map(self.means.gathered, self.rows(k))

    def summed(self, of_rows: Callable[[Tree], Tree], zeros: Tree) -> Tree:
        """Sum over chunks and devices what is additive in the rows."""
        found = sums.summed(
            lambda k: of_rows(self.rows(k)), self.count, self.means.local(zeros)
        )
        return self.means.over_devices(found)


class StreamedJacobian(NamedTuple):
    """As `hfjax.curvature.jacobian.Jacobian`, without rows.

    Attributes:
      parts: one for each term of the objective.
      residuals: r̃, in the order of the chunks; the last may be filled up with zeros.
      residuals_at: δ ↦ r̃(θ + δ).
      dtype: that of the rows, and float32 at least.
    """

    parts: Sequence[Part]
    residuals: jax.Array
    residuals_at: Callable[[Tree], jax.Array]
    dtype: jnp.dtype

    def product(self, v: Tree) -> jax.Array:
        """Return J̃ v, shape `[rows]`."""

        def of_part(part: Part) -> jax.Array:
            chunks = jnp.arange(part.count)
            return jax.lax.map(lambda k: part.product(k, v), chunks).reshape(-1)

        return jnp.concatenate([of_part(part) for part in self.parts])

    def transpose(self, u: jax.Array) -> Tree:
        """Return J̃ᵀu, like the parameters."""
        totals, start = [], 0
        for part in self.parts:
            own = u[start : start + part.count * part.size]
            own = own.reshape(part.count, part.size)
            transpose = functools.partial(_of_chunk, part.transpose, own)
            totals.append(sums.summed(transpose, part.count, part.like))
            start += part.count * part.size
        return functools.reduce(trees.add, totals)

    def squares(self) -> Tree:
        """Return the diagonal of J̃ᵀJ̃, like the parameters."""

        def of_rows(rows: Tree) -> Tree:
            return jax.tree.map(lambda x: jnp.sum(x * x, axis=0), rows)

        found = [part.summed(of_rows, part.like) for part in self.parts]
        return functools.reduce(trees.add, found)

    def of_parameters(self) -> jax.Array:
        """Return J̃ᵀJ̃, in the order of `ravel_pytree`."""
        columns = optax.tree.size(self.parts[0].like)
        zeros = jnp.zeros((columns, columns), self.dtype)

        def of_rows(rows: Tree) -> jax.Array:
            return linalg.squared_columns(rows, self.dtype)

        found = [part.summed(of_rows, zeros) for part in self.parts]
        return functools.reduce(jnp.add, found)

    def of_samples(self, weigh: Map | None = None) -> jax.Array:
        """Return J̃J̃ᵀ, or J̃W⁻¹J̃ᵀ if rows are to be weighed by W⁻¹."""
        count = len(self.residuals)
        matrix, start = jnp.zeros((count, count), self.dtype), 0
        for n, part in enumerate(self.parts):
            above = 0
            for other in self.parts[: n + 1]:
                matrix = _blocks(matrix, (part, start), (other, above), weigh)
                above += other.count * other.size
            start += part.count * part.size
        return matrix

    def after(self, into: Map, transposed: Map) -> "StreamedJacobian":
        """Return J̃A for a linear map A = `into`; Aᵀ = `transposed`."""

        def of_part(part: Part) -> Part:
            return part._replace(
                rows=lambda k: jax.vmap(transposed)(part.rows(k)),
                product=lambda k, v: part.product(k, into(v)),
                transpose=lambda k, u: transposed(part.transpose(k, u)),
                like=transposed(part.like),
            )

        return self._replace(
            parts=[of_part(part) for part in self.parts],
            residuals_at=lambda v: self.residuals_at(into(v)),
        )


def bounded_jacobian(
    objective: Objective, params: Params, batch: Batch, most: int | None
) -> Jacobian | StreamedJacobian:
    """Return J̃, stored if it has at most `most` numbers; `None` is no limit.

    A chunk has at most half of them, and at most as many examples as a microbatch. Examples
    and parameters that are sharded by type, and a single example, are not split; then J̃ is
    stored whatever its size.
    """
    if most is None:
        return jacobian(objective, params, batch)
    terms = terms_of(objective, batch)
    rows = [len(term.columns(params)) * len(term.cases.weights) for term in terms]
    columns = optax.tree.size(params)
    leaves = jax.tree.leaves((params, [term.cases for term in terms]))
    if sum(rows) * columns <= most or any(map(sharding.may_be_sharded, leaves)):
        return jacobian(objective, params, batch)
    found = []
    for term, count in zip(terms, rows, strict=True):
        per_case = count // len(term.cases.weights) * columns
        found.append(_of_term(params, term, max(1, most // (2 * per_case))))
    if all(part.count == 1 for part, *_ in found):
        return jacobian(objective, params, batch)
    dtype = trees.scalar_dtype(params)

    def residuals_at(step: Tree) -> jax.Array:
        there = trees.add(params, step)
        return jnp.concatenate([at(there).astype(dtype) for *_, at in found])

    residuals = jnp.concatenate([residuals.astype(dtype) for _, residuals, _ in found])
    parts = [part for part, *_ in found]
    return StreamedJacobian(parts, residuals, for_loops(residuals_at), dtype)


def _of_term(
    params: Params, term: Term, most: int
) -> tuple[Part, jax.Array, Callable[[Params], jax.Array]]:
    """Return the rows of a term, its residuals, and parameters ↦ its residuals there."""
    means = term.means.at_most(most)
    split, total = means.parts(term.cases), means.total(term.cases.weights)
    like = sharding.zeros_like(trees.widen(params))
    term = term._replace(means=means._replace(microbatch_size=None))

    def take(k: jax.Array) -> Cases:
        return split.cases if split.count == 1 else split.take(k)

    def scaled(cases: Cases, x: jax.Array) -> jax.Array:
        x = weighted(term, cases, total, x)
        return x.reshape(-1, *x.shape[2:])

    def rows(k: jax.Array) -> Tree:
        cases = take(k)
        found, residuals, _ = rows_of(params, term, cases)
        return with_empty([scaled(cases, x) for x in found], like, residuals.size)

    def product(k: jax.Array, v: Tree) -> jax.Array:
        cases = take(k)
        try:
            found = _linear(params, term, cases).tangent(trees.cast_like(v, params))
            found = scaled(cases, found)
        except Exception:  # There is no J v: whatever a backward rule may raise.
            v = jax.tree.map(lambda x: x[None], v)
            found = trees.gram(rows(k), v)[:, 0]
        return means.gathered(found)

    def transpose(k: jax.Array, u: jax.Array) -> Tree:
        cases = take(k)
        own = means.share(u).reshape(len(cases.weights), -1)
        own = weighted(term, cases, total, own)
        found = _linear(params, term, cases).transpose(own)
        return means.over_devices(trees.cast_like(found, like))

    def first(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        cases = take(k)
        _, residuals, inverses = rows_of(params, term, cases)
        return means.gathered(scaled(cases, residuals)), inverses

    residuals, inverses = jax.lax.map(for_loops(first), jnp.arange(split.count))

    def at(there: Params) -> jax.Array:
        def of_chunk(k: jax.Array) -> jax.Array:
            cases = take(k)
            found = residuals_of(there, term, cases, trees.row(inverses, k))
            return means.gathered(scaled(cases, found))

        return jax.lax.map(of_chunk, jnp.arange(split.count)).reshape(-1)

    part = Part(
        count=split.count,
        size=residuals.shape[1],
        means=means,
        rows=for_loops(rows),
        product=for_loops(product),
        transpose=for_loops(transpose),
        like=like,
    )
    return part, residuals.reshape(-1), at


def _linear(params: Params, term: Term, cases: Cases) -> Linearized:
    """Linearise Sᵢᵀ(outputs) of examples, `[cases, rows]`."""
    local = term.means.local(params)
    outputs, tangent, transpose = linearized(
        lambda params: term.outputs(params, cases.inputs), local
    )
    first = sharding.first_case(outputs)

    def factor(outputs: Tree, targets: Tree) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[None], (outputs, targets))
        return factor_of(term, *one)[0]

    factors = jax.vmap(factor)(outputs, cases.targets)

    def along(v: Tree) -> jax.Array:
        found = jax.vmap(lambda z: ravelled(z)[0])(tangent(term.means.local(v)))
        return jax.vmap(functools.partial(_times, "ij,i->j"))(factors, found)

    def back(u: jax.Array) -> Tree:
        found = jax.vmap(functools.partial(_times, "ij,j->i"))(factors, u)
        unflatten = ravelled(jax.tree.map(lambda leaf: leaf[0], first))[1]
        return transpose(trees.cast_like(jax.vmap(unflatten)(found), outputs))

    return Linearized(outputs, along, back)


def _times(sum_over: str, factor: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply by S or its transpose; S may be the vector of its diagonal."""
    x = x.astype(factor.dtype)
    if factor.ndim == 1:
        return factor * x
    return jnp.einsum(sum_over, factor, x, precision=trees.EXACT)


def _of_chunk(
    transpose: Callable[[jax.Array, jax.Array], Tree], u: jax.Array, k: jax.Array
) -> Tree:
    return transpose(k, trees.row(u, k))


def _blocks(
    matrix: jax.Array,
    left: tuple[Part, int],
    right: tuple[Part, int],
    weigh: Map | None,
) -> jax.Array:
    """Write the products of the rows of two parts into J̃J̃ᵀ, from the rows where they start."""
    (part, start), (other, above) = left, right

    def of_pair(k: jax.Array, rows: Tree, m: jax.Array, matrix: jax.Array) -> jax.Array:
        block = trees.gram(rows, other.all_rows(m)).astype(matrix.dtype)
        at = (start + k * part.size, above + m * other.size)
        matrix = jax.lax.dynamic_update_slice(matrix, block, at)
        return jax.lax.dynamic_update_slice(matrix, block.T, at[::-1])

    def of_row(k: jax.Array, matrix: jax.Array) -> jax.Array:
        rows = part.all_rows(k)
        rows = rows if weigh is None else weigh(rows)
        # Of a part and itself, the blocks above the diagonal are known.
        last = k + 1 if part is other else other.count
        pair = functools.partial(of_pair, k, rows)
        return jax.lax.fori_loop(0, last, pair, matrix)

    return jax.lax.fori_loop(0, part.count, of_row, matrix)
