"""Matrix decompositions whose batches cannot deadlock on a CPU.

On a CPU, jaxlib distributes a batch of matrices over XLA's thread pool, and the calling
thread waits for the others. If as many batches are decomposed at once as there are
threads (two, on a machine with two cores), every thread waits, and none is left to do
the work. A single matrix is decomposed on the calling thread.

So these functions take one matrix, and under `jax.vmap` they go through the batch in a
loop on a CPU; this holds for a user's `vmap` over an ensemble, too. On other platforms a
batch is decomposed as a batch.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax.sharding import NamedSharding, PartitionSpec

from hfjax._core import sharding, sums, trees
from hfjax._core.types import Tree

_BLOCKS, _SMALL = 4, 400
"""Blocks on a side of a symmetric matrix, if it is not small."""
_CHUNK = 1024
"""So many rows are transposed at once, within the processor's cache."""
_RAISE, _TRIES = 10.0, 20
"""μ is raised by this factor, at most this often, until a Cholesky factor is finite."""


def _one_by_one(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """Make `jax.vmap` of a decomposition loop over its batch on a CPU."""

    def of_a_batch(size: int, batched: list[bool], *operands: jax.Array) -> Any:
        del size

        def in_turn(*operands: jax.Array) -> Any:
            def one(rows: list[jax.Array | None]) -> Any:
                pairs = zip(rows, operands, strict=True)
                return once(*(x if row is None else row for row, x in pairs))

            pairs = zip(operands, batched, strict=True)
            return jax.lax.map(one, [x if each else None for x, each in pairs])

        results = jax.lax.platform_dependent(
            *operands,
            cpu=_on_each_device(in_turn, batched),
            default=jax.vmap(decompose, [0 if each else None for each in batched]),
        )
        return results, jax.tree.map(lambda _: True, results)

    once = batched_by(of_a_batch, decompose)
    return functools.wraps(decompose)(once)


def batched_by(
    rule: Callable[..., tuple[Any, Any]],
    function: Callable[..., Any],
    derivatives: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Return `function` with a rule for `jax.vmap`, see `jax.custom_batching`.

    `custom_vmap` cannot be linearised: derivatives are those of `derivatives`, which
    computes the same, or of the function itself.
    """
    once = jax.custom_batching.custom_vmap(function)
    once.def_vmap(rule)

    @jax.custom_jvp
    def differentiable(*operands: Any) -> Any:
        return once(*operands)

    @differentiable.defjvp
    def tangent(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(derivatives or function, primals, tangents)

    return differentiable


def _on_each_device(
    in_turn: Callable[..., Any], batched: list[bool]
) -> Callable[..., Any]:
    """Let each device loop over its own matrices if the batch axis is sharded."""

    def mapped(*operands: jax.Array) -> Any:
        # `lax.map` refuses an axis that is sharded in the array's type (explicit mesh
        # axes).
        pairs = zip(operands, batched, strict=True)
        shardings = [jax.typeof(x).sharding for x, has_batch in pairs if has_batch]
        typed = [sharding for sharding in shardings if sharding.spec[0] is not None]
        if not typed:
            return in_turn(*operands)
        mesh, along = typed[0].mesh, PartitionSpec(typed[0].spec[0])
        specs = tuple(along if each else PartitionSpec() for each in batched)
        layouts = [NamedSharding(mesh, spec) for spec in specs]
        run = jax.shard_map(in_turn, mesh=mesh, in_specs=specs, out_specs=along)
        return run(*map(jax.sharding.reshard, operands, layouts))

    return mapped


def square(matrix: jax.Array) -> jax.Array:
    """Return A Aᵀ of a matrix that is not sharded by its type."""
    # A product of rows runs faster than one of columns on a CPU. With four blocks on a
    # side, those above the diagonal, which are known, are three eighths of the work.
    rows, precision = len(matrix), jax.lax.Precision.HIGHEST
    if rows < _SMALL:
        return jnp.matmul(matrix, matrix.T, precision=precision)
    ends = [rows * n // _BLOCKS for n in range(_BLOCKS + 1)]
    lower = []
    for start, end in itertools.pairwise(ends):
        block = jnp.matmul(matrix[start:end], matrix[:end].T, precision=precision)
        lower.append(jnp.pad(block, ((0, 0), (0, rows - end))))
    found = jnp.concatenate(lower)
    return jnp.tril(found) + jnp.tril(found, -1).T


def squared_columns(rows: Tree, dtype: jnp.dtype) -> jax.Array:
    """Return AᵀA, where the leaves hold the columns of A and lead with its rows."""
    leaves = [x.reshape(len(x), math.prod(x.shape[1:])) for x in jax.tree.leaves(rows)]
    total, columns = len(leaves[0]), sum(x.shape[1] for x in leaves)

    def of_some(start: jax.Array | int, count: int) -> jax.Array:
        some = [jax.lax.dynamic_slice_in_dim(x, start, count) for x in leaves]
        columns = jnp.concatenate([x.T.astype(dtype) for x in some])
        # XLA transposes by reading in another order, and the product takes half as long
        # again on a CPU. As a vector, the transpose has to be written out.
        vector = jax.lax.optimization_barrier(columns.reshape(-1))
        return square(vector.reshape(columns.shape))

    if total < 2 * _CHUNK:
        return of_some(0, total)
    count, left = divmod(total, _CHUNK)
    zeros = jnp.zeros((columns, columns), dtype)
    zeros = sharding.vary(zeros, tuple(sharding.varying(leaves[0])))
    found = sums.summed(lambda k: of_some(k * _CHUNK, _CHUNK), count, zeros)
    return found + of_some(count * _CHUNK, left) if left else found


@_one_by_one
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues, in ascending order, and eigenvectors of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_one_by_one
def qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return Q, with orthonormal columns, and the triangle R."""
    q, r = jnp.linalg.qr(matrix)
    return q, r


@_one_by_one
def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return U, S and Vᵀ of the shorter side's length, and S in descending order."""
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    return left, values, right


@_one_by_one
def svd_and_side(both: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return S, V and Uᵀr, where [A, r] is the matrix and A = U S Vᵀ."""
    # The triangle of a QR of [A, r] holds Qᵀr as well, so Q is not needed.
    triangle = jnp.linalg.qr(both, mode="r")
    left, values, right = jnp.linalg.svd(triangle[:, :-1], full_matrices=False)
    along = jnp.matmul(left.T, triangle[:, -1], precision="highest")
    return values, right.T, along


@_one_by_one
def cholesky(matrix: jax.Array) -> jax.Array:
    """Return the lower Cholesky factor, or NaN; only the lower triangle is read."""
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@_one_by_one
def inverse_root(matrix: jax.Array) -> jax.Array:
    """Return L⁻¹ of a positive definite matrix L Lᵀ, or NaN; reads the lower triangle."""
    # The product L⁻ᵀL⁻¹ is positive semi-definite however L⁻¹ is rounded.
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


@_one_by_one
def cho_solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """Return (L Lᵀ)⁻¹b for a lower triangular `factor` L."""
    return jax.scipy.linalg.cho_solve((factor, True), right)


@_one_by_one
def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Return A⁻¹b for a square matrix A."""
    # QR is as stable as LU with pivoting and takes twice the flops, but LU's permutation
    # alone compiles to about ten kernels.
    q, r = jnp.linalg.qr(matrix)
    columns = (q.T @ right).reshape(len(r), -1)
    found = jax.lax.linalg.triangular_solve(r, columns, left_side=True, lower=False)
    return found.reshape(right.shape)


@_one_by_one
def pinv(matrix: jax.Array, rtol: jax.Array) -> jax.Array:
    """Return the pseudoinverse; singular values below `rtol` · the largest count as 0."""
    return jnp.linalg.pinv(matrix, rtol=rtol)


def pinv_of_disjoint(matrix: jax.Array) -> jax.Array:
    """Return A⁺ if no two columns of A have an entry in the same row."""
    matrix = matrix.astype(trees.wide(matrix.dtype))
    # Scaled to a largest entry of 1, as squares of small entries would underflow.
    size = jnp.max(jnp.abs(matrix), axis=0, keepdims=True)
    size = jnp.where(size > 0, size, 1)
    scaled = matrix / size
    square = jnp.sum(jnp.square(scaled), axis=0, keepdims=True)
    return (scaled / (size * jnp.where(square > 0, square, 1))).T


def damped_cholesky(matrix: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the Cholesky factor of matrix + μI and μ, raised until there is one."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)

    def failed(tried: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        factor, _, tries = tried
        # If the factorisation fails, its last pivot is NaN.
        return ~jnp.isfinite(factor[-1, -1]) & (tries < _TRIES)

    def again(tried: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
        _, mu, tries = tried
        mu = _RAISE * mu
        return cholesky(matrix + mu * identity), mu, tries + 1

    mu = jnp.maximum(mu.astype(matrix.dtype), least_damping(matrix))
    start = (jnp.full_like(matrix, jnp.nan), mu / _RAISE, jnp.zeros((), jnp.int32))
    factor, mu, _ = jax.lax.while_loop(failed, again, start)
    return factor, mu


def least_damping(matrix: jax.Array) -> jax.Array:
    """Return the least μ for `damped_cholesky`: the rounding of the matrix."""
    limits = jnp.finfo(matrix.dtype)
    rounding = limits.eps * jnp.trace(matrix)
    # Without any curvature and damping, μ would be 0, and raising it would not help.
    return jnp.where(rounding > 0, rounding, limits.tiny)
