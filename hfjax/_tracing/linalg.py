"""Decompositions of many matrices that never wait for each other.

On a CPU, jaxlib shares out a batch of matrices over the threads that XLA runs on, and
the thread that does so waits for the others. If as many batches are decomposed at once
as there are threads (two, on a machine of two cores), each waits for ever. A batch of
one is decomposed where it is, and waits for nobody.

So these functions take one matrix, and `jax.vmap` of them takes one after another on a
CPU, whoever calls it: a preconditioner of several layers under a user's `vmap` over an
ensemble, too. Elsewhere a batch stays a batch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax.sharding import NamedSharding, PartitionSpec


def _one_by_one(decompose: Callable[..., Any]) -> Callable[..., Any]:
    """Make `jax.vmap` of a decomposition go through its batch in turn on a CPU."""
    once = jax.custom_batching.custom_vmap(decompose)

    def of_a_batch(size: int, batched: list[bool], *operands: jax.Array) -> Any:
        del size

        def in_turn(*operands: jax.Array) -> Any:
            def one(matrices: list[jax.Array]) -> Any:
                rest = iter(matrices)
                return once(
                    *(
                        next(rest) if has_batch else x
                        for x, has_batch in zip(operands, batched, strict=True)
                    )
                )

            pairs = zip(operands, batched, strict=True)
            return jax.lax.map(one, [x for x, has_batch in pairs if has_batch])

        results = jax.lax.platform_dependent(
            *operands,
            cpu=_on_each_device(in_turn, batched),
            default=jax.vmap(decompose, [0 if each else None for each in batched]),
        )
        return results, jax.tree.map(lambda _: True, results)

    once.def_vmap(of_a_batch)

    # A function with a rule for batches alone cannot be linearised.
    @jax.custom_jvp
    def differentiable(*operands: jax.Array) -> Any:
        return once(*operands)

    @differentiable.defjvp
    def tangent(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        return jax.jvp(decompose, primals, tangents)

    return functools.wraps(decompose)(differentiable)


def _on_each_device(
    in_turn: Callable[..., Any], batched: list[bool]
) -> Callable[..., Any]:
    """Let each device go through its own matrices, where their type says who has which.

    A loop refuses an axis that is sharded by type.
    """

    def mapped(*operands: jax.Array) -> Any:
        typed = [
            sharding
            for x, has_batch in zip(operands, batched, strict=True)
            if has_batch and (sharding := jax.typeof(x).sharding).spec[0] is not None
        ]
        if not typed:
            return in_turn(*operands)
        mesh, along = typed[0].mesh, PartitionSpec(typed[0].spec[0])
        specs = tuple(along if each else PartitionSpec() for each in batched)
        laid_out = [
            jax.sharding.reshard(x, NamedSharding(mesh, spec))
            for x, spec in zip(operands, specs, strict=True)
        ]
        run = jax.shard_map(in_turn, mesh=mesh, in_specs=specs, out_specs=along)
        return run(*laid_out)

    return mapped


@_one_by_one
def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@_one_by_one
def cholesky(matrix: jax.Array) -> jax.Array:
    """Return the lower Cholesky factor, of the lower triangle; NaN if there is none."""
    return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)


@_one_by_one
def inverse_root(matrix: jax.Array) -> jax.Array:
    """Return L⁻¹ of a positive definite L Lᵀ, by its lower triangle; NaN if it is none."""
    factor = jax.lax.linalg.cholesky(matrix, symmetrize_input=False)
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    return jax.lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)


@_one_by_one
def cho_solve(factor: jax.Array, right: jax.Array) -> jax.Array:
    """Return (L Lᵀ)⁻¹b of a lower triangle L."""
    return jax.scipy.linalg.cho_solve((factor, True), right)


@_one_by_one
def solve(matrix: jax.Array, right: jax.Array) -> jax.Array:
    """Return A⁻¹b of a square matrix."""
    # By Q R: as stable as L U with its pivots, whose permutation alone is a program of
    # ten kernels to compile. It takes twice the flops.
    q, r = jnp.linalg.qr(matrix)
    columns = (q.T @ right).reshape(len(r), -1)
    found = jax.lax.linalg.triangular_solve(r, columns, left_side=True, lower=False)
    return found.reshape(right.shape)


@_one_by_one
def pinv(matrix: jax.Array, rtol: jax.Array) -> jax.Array:
    """Return the pseudoinverse; singular values below `rtol` of the largest count as 0."""
    return jnp.linalg.pinv(matrix, rtol=rtol)
