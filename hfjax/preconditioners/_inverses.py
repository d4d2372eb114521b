"""Damped Kronecker factors and diagonals, inverted in groups.

Matrices of similar size are inverted together. So a compiled program grows with the
number of sizes, not of layers.
"""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import trees
from hfjax._core.types import Number
from hfjax._tracing import linalg
from hfjax._tracing.dealing import dealt
from hfjax._tracing.layers import Layer
from hfjax.preconditioners._blocks import Blocks, Pair
from hfjax.preconditioners._merged_layers import Merged

LARGE = 2**20
"""Matrices with more entries are never stacked, which would copy them."""
_NEARLY = 0.9
"""A matrix is padded to the length of another if it has at least this share of it."""
_TINY = 64
"""Matrices up to this length are all padded and inverted together."""
_PADDING = 1 / 8
"""Groups are merged as long as padding adds no more than this to the work of all. Each
group is a dozen kernels, and on a TPU, which unrolls factorisations, megabytes of program:
that costs more than computing the padding."""


def inverted(
    blocks: Blocks,
    model: Merged,
    dampings: Sequence[jax.Array],
    share: Number,
    axis_name: Any = None,
) -> Blocks:
    """Damp the blocks of P, and return the blocks of P⁻¹.

    `dampings` is the diagonal of λD for each parameter, or λ itself. `share` is the
    fraction of λ that damps the factors. `axis_name` is that of the objective.
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

    pairs = inverse(
        blocks.pairs, [of_layer(layer) for layer in model.layers], axis_name
    )
    damped = trees.damped(blocks.diagonals, {n: dampings[n] for n in blocks.diagonals})
    rest = jax.tree.map(lambda d: 1 / d, trees.ones_for_zeros(damped))
    return Blocks(pairs, rest, {})


def inverse(
    pairs: Sequence[Pair], dampings: Sequence[jax.Array], axis_name: Any = None
) -> list[Pair]:
    """Invert (Ḡ + √(g/a) √λ I) ⊗ (Ā + √(a/g) √λ I) for each layer, with its λ ≥ 0.

    a and g are the mean eigenvalues of Ā and Ḡ. Relative to them, both matrices have
    the damping μ = √(λ / ag), but at least their rounding error. A matrix whose
    Cholesky factorisation fails nevertheless is replaced by its mean eigenvalue times
    I. The matrices are dealt out over devices, see `dealt`.

    References:
      Martens & Grosse (2015), section 6.3, with the trace norm.
    """
    found: dict[int, Pair] = {}
    for members in alike([pair.inputs.dtype for pair in pairs]):
        own = [pairs[n] for n in members], [dampings[n] for n in members]
        results = _inverse(*own, axis_name)
        found.update(zip(members, results, strict=True))
    return [found[n] for n in range(len(pairs))]


def _inverse(
    pairs: Sequence[Pair], dampings: Sequence[jax.Array], axis_name: Any
) -> list[Pair]:
    """Invert pairs of one dtype."""
    matrices = [matrix for pair in pairs for matrix in pair]
    dtype = pairs[0].units.dtype
    # Scalars are computed for all matrices at once, which keeps the program small. The
    # layer's number `owner` and its damping are repeated for the blocks of a layer.
    counts = [len(x) if x.ndim == 3 else 1 for _, x in pairs]
    owner = np.repeat(np.arange(len(pairs)), counts)
    lengths = np.array([[x.shape[-1] for x in pair] for pair in pairs])[owner]
    diagonals = [n for n, matrix in enumerate(matrices) if matrix.ndim == 1]
    # A diagonal is not rounded by its sums.
    exact = np.array([[x.ndim == 1 for x in pair] for pair in pairs])[owner]
    square = [n for n, matrix in enumerate(matrices) if matrix.ndim > 1]
    groups = _similar([matrices[n].shape[-1] for n in square])
    groups = [[square[k] for k in group] for group in groups]
    stacks = [stacked([matrices[n] for n in group]) for group in groups]
    # In this order, groups and then diagonals list the matrices; each block has two.
    listed = [*itertools.chain(*groups), *diagonals]
    order = np.concatenate([2 * np.nonzero(owner == n // 2)[0] + n % 2 for n in listed])
    traces = [_traces(stack) for stack in stacks]
    traces = jnp.concatenate([*traces, *(matrices[n].sum()[None] for n in diagonals)])
    sizes = traces[np.argsort(order)].reshape(-1, 2) / lengths.astype(dtype)
    damping = jnp.stack([dampings[n] for n in owner.tolist()]).astype(dtype)
    numbers = _damped(sizes, np.where(exact, 1, lengths), damping)
    ordered = numbers.reshape(4, -1)[:, order]
    ends = np.cumsum([len(stack) for stack in stacks], dtype=int)
    *of_stacks, rest = jnp.split(ordered, ends, axis=1)
    calls = [(stack, *own) for stack, own in zip(stacks, of_stacks, strict=True)]
    found, results = {}, dealt(_positive_inverse, calls, axis_name)
    for group, inverses in zip(groups, results, strict=True):
        own_parts = parts(inverses, [counts[n // 2] for n in group])
        for n, part in zip(group, own_parts, strict=True):
            length = matrices[n].shape[-1]
            found[n] = part[:, :length, :length].reshape(matrices[n].shape)
    for n, (shrink, mu, grow, _) in zip(diagonals, rest.T, strict=True):
        found[n] = grow / (shrink * matrices[n] + mu)
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


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Group matrices, by number, that are padded to the longest of their group."""
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        first = lengths[groups[-1][0]] if groups else 0
        near = first**2 <= LARGE and lengths[n] >= _NEARLY * first
        if groups and (near or first <= _TINY):
            groups[-1].append(n)
        else:
            groups.append([n])
    # The work is n³ each. Of what is left of it, the shortest group goes first.
    left = _PADDING * sum(float(length) ** 3 for length in lengths)
    while len(groups) > 1:
        first = lengths[groups[-2][0]]
        left -= sum(float(first) ** 3 - float(lengths[n]) ** 3 for n in groups[-1])
        if left < 0 or first**2 > LARGE:
            break
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    """Stack matrices and stacks of them, padded with zeros to the length of the first."""
    # The padding becomes I/μ in the inverse, separate from the rest, and is cut off again.
    stacks = [x if x.ndim == 3 else x[None] for x in arrays]
    if len(stacks) == 1:
        return stacks[0]
    size = arrays[0].shape[-1]
    missing = [(0, size - x.shape[-1]) for x in arrays]
    padded = zip(stacks, missing, strict=True)
    return jnp.concatenate([jnp.pad(x, [(0, 0), end, end]) for x, end in padded])


def parts(stack: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """Divide a stack into parts with so many matrices."""
    ends = np.cumsum(counts).tolist()
    pairs = itertools.pairwise([0, *ends])
    return [stack[start:end] for start, end in pairs] if len(counts) > 1 else [stack]


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Group the positions of equal keys."""
    groups: dict[Hashable, list[int]] = {}
    for n, key in enumerate(keys):
        groups.setdefault(key, []).append(n)
    return list(groups.values())
