"""The product with P⁻¹ from Kronecker factors, and what a state remembers of them.

Layers of equal shape are multiplied together, so a compiled program grows with the number
of shapes, not of layers.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax._tracing.layers import Layer
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import subsample
from hfjax.preconditioners import _remembered
from hfjax.preconditioners._blocks import Blocks, Pair, pack, unpack, zeros_for
from hfjax.preconditioners._factors import estimate, read
from hfjax.preconditioners._inverses import alike, inverted, parts, stacked
from hfjax.preconditioners._merged_layers import Merged, merged

_LARGE = 2**16
"""Layers with a factor of more entries are not multiplied together: stacking copies them."""


class Rule(NamedTuple):
    """The options of `preconditioners.kronecker`."""

    damping_share: Number
    decay: Number
    interval: int
    max_size: int
    cases: int | None

    @property
    def averages(self) -> bool:
        """Whether factors are averaged over builds."""
        # A traced decay could be any number, so only a plain 0 needs no average.
        return not (options.is_plain_number(self.decay) and self.decay == 0)

    def init(self, params: Params) -> dict[str, tuple]:
        """Return space for what is kept from one update to the next, by kind."""
        kinds = ["kronecker_factors"] if self.averages else []
        kinds += ["kronecker_inverses"] if self.interval > 1 else []
        # Each kind has arrays of its own: no buffer may be donated twice.
        return {kind: zeros_for(params, self.max_size) for kind in kinds}

    def build(
        self,
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
        memory: dict[str, tuple],
        count: jax.Array | int,
    ) -> tuple[Preconditioner, dict[str, tuple]]:
        """Build r ↦ P⁻¹r and the new memory; `damping` includes the weight decay."""
        if self.cases is not None:
            batch = subsample(objective, batch, self.cases)
        model = merged(
            read(objective, params, batch, self.max_size, stored=bool(memory))
        )

        def fresh(memory: dict[str, tuple]) -> tuple[Blocks, dict[str, tuple]]:
            blocks = estimate(objective, params, batch, model, key=key)
            if "kronecker_factors" in memory:
                old = memory["kronecker_factors"]
                new = pack(blocks, model, old)
                builds = count // self.interval
                new = _remembered.averaged(old, new, self.decay, builds)
                memory = memory | {"kronecker_factors": new}
                blocks = unpack(new, model)
            dampings = jax.tree.leaves(jax.tree.broadcast(damping, params))
            blocks = inverted(
                blocks, model, dampings, self.damping_share, objective.axis_name
            )
            if "kronecker_inverses" in memory:
                packed = pack(blocks, model, memory["kronecker_inverses"])
                memory = memory | {"kronecker_inverses": packed}
            return blocks, memory

        # Without space for inverses, every call builds.
        if "kronecker_inverses" not in memory:
            blocks, memory = fresh(memory)
            return product(blocks, model), memory

        def build(memory: dict[str, tuple]) -> dict[str, tuple]:
            return fresh(memory)[1]

        memory = _remembered.every(self.interval, count, build, memory)
        return product(unpack(memory["kronecker_inverses"], model), model), memory


def product(blocks: Blocks, model: Merged) -> Preconditioner:
    """Return r ↦ P⁻¹r, given the blocks of P⁻¹."""
    groups = []
    for members in alike([_batch_of(n, pair) for n, pair in enumerate(blocks.pairs)]):
        pairs = [blocks.pairs[n] for n in members]
        alone = len(pairs) == 1
        pair = pairs[0] if alone else Pair(*map(stacked, zip(*pairs, strict=True)))
        groups.append((members, pair))

    def apply(r: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(r)
        for members, (inputs, units) in groups:
            own = [model.layers[n] for n in members]
            matrices = [_matrix(layer, leaves, inputs.dtype) for layer in own]
            joined = matrices[0]
            if len(own) > 1:
                stacks = [x.reshape(-1, *x.shape[-2:]) for x in matrices]
                joined = jnp.concatenate(stacks)
            # (Ḡ ⊗ Ā)⁻¹ r is Ā⁻¹ R Ḡ⁻¹, with r laid out as R, `[inputs, units]`.
            if inputs.ndim == 1:
                left = inputs[:, None] * joined
            else:
                left = jnp.matmul(inputs, joined, precision=trees.EXACT)
            found = jnp.matmul(left, units, precision=trees.EXACT)
            own_parts = parts(found, [layer.blocks for layer in own])
            for layer, matrix, part in zip(own, matrices, own_parts, strict=True):
                _put(layer, part.reshape(matrix.shape), leaves)
        for n, entries in blocks.diagonals.items():
            scaled = leaves[n].astype(entries.dtype) * entries
            leaves[n] = scaled.astype(leaves[n].dtype)
        return structure.unflatten(leaves)

    return apply


def _batch_of(n: int, pair: Pair) -> Hashable:
    """Return a key that is equal for layers to be multiplied together."""
    is_alone = max(pair.inputs.size, pair.units.size) > _LARGE or pair.inputs.ndim == 1
    alone = n if is_alone else None
    return (pair.inputs.shape[-1], pair.units.shape[-1], pair.inputs.dtype, alone)


def _matrix(layer: Layer, leaves: list[jax.Array], dtype: Any) -> jax.Array:
    """Return a layer's kernel and bias as `[inputs, units]`, or one such for each block."""
    kernel = sharding.replicated(leaves[layer.kernel]).astype(dtype)
    matrix = layer.sides.matrices(kernel)
    if layer.bias is None:
        return matrix
    bias = sharding.replicated(leaves[layer.bias]).astype(dtype)
    row = bias.reshape(*matrix.shape[:-2], 1, matrix.shape[-1])
    return jnp.concatenate([matrix, row], axis=-2)


def _put(layer: Layer, matrix: jax.Array, leaves: list[jax.Array]) -> None:
    """Write a matrix back to a layer's kernel and bias."""
    if layer.bias is not None:
        old = leaves[layer.bias]
        row = matrix[..., -1, :].reshape(old.shape).astype(old.dtype)
        leaves[layer.bias] = sharding.like(row, old)
        matrix = matrix[..., :-1, :]
    old = leaves[layer.kernel]
    shaped = layer.sides.kernel(matrix, old.shape).astype(old.dtype)
    leaves[layer.kernel] = sharding.like(shaped, old)
