"""The inverse of P: damped Kronecker factors, inverted and multiplied in groups.

Matrices of similar size are inverted together, and layers of equal shape multiplied
together. So a compiled program grows with the number of sizes, not of layers.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import options, sharding, trees
from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax._tracing import linalg
from hfjax._tracing.layers import Layer
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import subsample
from hfjax.preconditioners import _remembered
from hfjax.preconditioners._blocks import Blocks, Pair, pack, unpack, zeros_for
from hfjax.preconditioners._factors import estimate, read
from hfjax.preconditioners._merged_layers import Merged, merged

_LARGE = 2**16
"""Matrices with more entries are never stacked, which would copy them."""
_NEARLY = 0.9
"""A matrix is padded to the length of another if it has at least this share of it."""
_TINY = 64
"""Matrices up to this length are all padded and inverted together. One more kernel
would cost more to compile and to launch than it costs to compute the padding."""


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
            blocks = inverted(blocks, model, dampings, self.damping_share)
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


def inverted(
    blocks: Blocks, model: Merged, dampings: Sequence[jax.Array], share: Number
) -> Blocks:
    """Damp the blocks of P, and return the blocks of P⁻¹.

    `dampings` is the diagonal of λD for each parameter, or λ itself. `share` is the
    fraction of λ that damps the factors.
    """

    def of_layer(layer: Layer) -> jax.Array:
        # Kronecker factors can only be damped by one number for the whole layer: the mean
        # of λD over the kernel, plus the mean of the diagonals that other terms have.
        level, own = jnp.mean(dampings[layer.kernel]), (layer.kernel, layer.bias)
        beside = [x for n, x in blocks.beside.items() if n in own]
        entries = layer.blocks * layer.rows * layer.units
        means = [jnp.sum(x / entries) for x in beside]
        if means:
            level += sum(means[1:], means[0]).astype(level.dtype)
        return jnp.asarray(share * level)

    pairs = inverse(blocks.pairs, [of_layer(layer) for layer in model.layers])
    damped = trees.damped(blocks.diagonals, {n: dampings[n] for n in blocks.diagonals})
    rest = jax.tree.map(lambda d: 1 / d, trees.ones_for_zeros(damped))
    return Blocks(pairs, rest, {})


def inverse(pairs: Sequence[Pair], dampings: Sequence[jax.Array]) -> list[Pair]:
    """Invert (Ḡ + √(g/a) √λ I) ⊗ (Ā + √(a/g) √λ I) for each layer, with its λ ≥ 0.

    a and g are the mean eigenvalues of Ā and Ḡ. Relative to them, both matrices have
    the damping μ = √(λ / ag), but at least their rounding error. A matrix whose
    Cholesky factorisation fails nevertheless is replaced by its mean eigenvalue times
    I.

    References:
      Martens & Grosse (2015), section 6.3, with the trace norm.
    """
    found: dict[int, Pair] = {}
    for members in _alike([pair.inputs.dtype for pair in pairs]):
        results = _inverse([pairs[n] for n in members], [dampings[n] for n in members])
        found.update(zip(members, results, strict=True))
    return [found[n] for n in range(len(pairs))]


def _inverse(pairs: Sequence[Pair], dampings: Sequence[jax.Array]) -> list[Pair]:
    """Invert pairs of one dtype."""
    matrices, dtype = (
        [matrix for pair in pairs for matrix in pair],
        pairs[0].units.dtype,
    )
    # Scalars are computed for all matrices at once, which keeps the program small. The
    # layer's number `owner` and its damping are repeated for the blocks of a layer.
    counts = [len(x) if x.ndim == 3 else 1 for x, _ in pairs]
    owner = np.repeat(np.arange(len(pairs)), counts)
    lengths = np.array([[x.shape[-1] for x in pair] for pair in pairs])[owner]
    groups = _nearly_equal([matrix.shape[-1] for matrix in matrices])
    stacks = [_stack([matrices[n] for n in group]) for group in groups]
    # In this order, the groups list the matrices, of which each block has two.
    order = np.concatenate(
        [2 * np.nonzero(owner == n // 2)[0] + n % 2 for group in groups for n in group]
    )
    traces = jnp.concatenate([_traces(stack) for stack in stacks])
    sizes = traces[np.argsort(order)].reshape(-1, 2) / lengths.astype(dtype)
    damping = jnp.stack([dampings[n] for n in owner.tolist()]).astype(dtype)
    ordered = _damped(sizes, lengths, damping).reshape(4, -1)[:, order]
    found, at = {}, 0
    for group, stack in zip(groups, stacks, strict=True):
        own = ordered[:, at : at + len(stack)]
        at += len(stack)
        if len(stack) == 1:
            inverses = _positive_inverse(stack[0], *own[:, 0])[None]
        else:
            inverses = jax.vmap(_positive_inverse)(stack, *own)
        parts = _parts(inverses, [counts[n // 2] for n in group])
        for n, part in zip(group, parts, strict=True):
            length = matrices[n].shape[-1]
            found[n] = part[:, :length, :length].reshape(matrices[n].shape)
    return [Pair(found[2 * n], found[2 * n + 1]) for n in range(len(pairs))]


def _damped(sizes: jax.Array, lengths: np.ndarray, damping: jax.Array) -> jax.Array:
    """Return `shrink`, `mu`, `grow` and `instead` of `_positive_inverse`.

    `sizes` are the mean eigenvalues of Ā and Ḡ for each block, and `lengths` their lengths;
    both are `[blocks, 2]`, and each result has this shape.
    """
    dtype = sizes.dtype
    # With scale = ag and μ² = λ / ag, P = ag (Ḡ/g + μI) ⊗ (Ā/a + μI). If nothing passes
    # through a layer, ag = 0 and only λ is known: then P ≈ λI, with a scale of 1e-6 λ.
    scale = jnp.maximum(sizes[:, 0] * sizes[:, 1], 1e-6 * damping)
    scale = jnp.minimum(scale, 1e-3 * jnp.finfo(dtype).max)
    nothing = ~(scale > 0)
    scale = jnp.where(nothing, 1, scale)
    # The rounding of an n × n matrix can make eigenvalues negative by about n ε.
    rounding = 10 * jnp.finfo(dtype).eps * lengths.max(axis=1)
    mu = jnp.maximum(jnp.sqrt(damping / scale), rounding.astype(dtype))
    # If λ = 0 as well, nothing is known: P = I, whatever the matrices are.
    numbers = [
        jnp.where(nothing[:, None], 0, 1 / jnp.where(sizes > 0, sizes, 1)),
        jnp.stack([jnp.where(nothing, 1, mu)] * 2, axis=1),
        jnp.stack([jnp.ones_like(scale), 1 / scale], axis=1),
        jnp.stack([jnp.where(nothing, 1, 1 / (1 + mu))] * 2, axis=1),
    ]
    return jnp.stack(numbers)


def _positive_inverse(
    matrix: jax.Array,
    shrink: jax.Array,
    mu: jax.Array,
    grow: jax.Array,
    instead: jax.Array,
) -> jax.Array:
    """Return `grow` (`shrink` M + μ I)⁻¹, or `grow` `instead` I if Cholesky fails."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    # This reads only the lower triangle, which is as good as the mean of both.
    half = linalg.inverse_root(shrink * matrix + mu * identity)
    # A product with its own transpose is positive semi-definite however it is rounded.
    found = jnp.matmul(half.T, half, precision=trees.EXACT)
    # If the factorisation fails, its last pivot is NaN.
    rooted = jnp.isfinite(half[-1, -1])
    return grow * jnp.where(rooted, found, instead * identity)


def _traces(stack: jax.Array) -> jax.Array:
    """Return the traces of one matrix or of a stack."""
    # A slice with strides reads the diagonal alone.
    size = stack.shape[-1]
    return jnp.sum(stack.reshape(-1, size * size)[:, :: size + 1], axis=1)


def _nearly_equal(lengths: Sequence[int]) -> list[list[int]]:
    """Group matrices, by number, that are padded to the longest of their group."""
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        first = lengths[groups[-1][0]] if groups else 0
        near = first**2 <= _LARGE and lengths[n] >= _NEARLY * first
        if groups and (near or first <= _TINY):
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def _stack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Stack matrices and stacks of them, padded with zeros to the length of the first."""
    # The padding becomes I/μ in the inverse, separate from the rest, and is cut off again.
    stacks = [x if x.ndim == 3 else x[None] for x in arrays]
    if len(stacks) == 1:
        return stacks[0]
    size = arrays[0].shape[-1]
    missing = [(0, size - x.shape[-1]) for x in arrays]
    padded = zip(stacks, missing, strict=True)
    return jnp.concatenate([jnp.pad(x, [(0, 0), end, end]) for x, end in padded])


def _parts(stack: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """Divide a stack into parts with so many matrices."""
    ends = np.cumsum(counts).tolist()
    pairs = itertools.pairwise([0, *ends])
    return [stack[start:end] for start, end in pairs] if len(counts) > 1 else [stack]


def product(blocks: Blocks, model: Merged) -> Preconditioner:
    """Return r ↦ P⁻¹r, given the blocks of P⁻¹."""
    # Stacking copies matrices, so only small ones are multiplied together.
    groups = []
    for members in _alike([_batch_of(n, pair) for n, pair in enumerate(blocks.pairs)]):
        pairs = [blocks.pairs[n] for n in members]
        alone = len(pairs) == 1
        pair = pairs[0] if alone else Pair(*map(_stack, zip(*pairs, strict=True)))
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
            left = jnp.matmul(inputs, joined, precision=trees.EXACT)
            found = jnp.matmul(left, units, precision=trees.EXACT)
            parts = _parts(found, [layer.blocks for layer in own])
            for layer, matrix, part in zip(own, matrices, parts, strict=True):
                _put(layer, part.reshape(matrix.shape), leaves)
        for n, entries in blocks.diagonals.items():
            scaled = leaves[n].astype(entries.dtype) * entries
            leaves[n] = scaled.astype(leaves[n].dtype)
        return structure.unflatten(leaves)

    return apply


def _batch_of(n: int, pair: Pair) -> Hashable:
    """Return a key that is equal for layers to be multiplied together."""
    alone = n if max(pair.inputs.size, pair.units.size) > _LARGE else None
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


def _alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Group the positions of equal keys."""
    groups: dict[Hashable, list[int]] = {}
    for n, key in enumerate(keys):
        groups.setdefault(key, []).append(n)
    return list(groups.values())
