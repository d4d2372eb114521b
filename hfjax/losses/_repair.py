"""Square roots of each example's loss Hessian, and its positive semi-definite repair.

    S Sᵀ = L″ + R,        L″ + R ⪰ 0,        R ⪰ 0, and R = 0 if L″ ⪰ 0 already

L″ is zero between outputs that the loss does not couple (`_coupling`), so everything is
done block by block. K is the number of outputs of the largest block:

| L″ | S | R |
|---|---|---|
| diagonal: K = 1 | root of the diagonal; one product with L″ | exact |
| diagonal and one outer product per block (`_outer`) | closed form, if there is no R | as below |
| blocks of K ≤ `MOST_FOR_EIGENVALUES` | by eigenvectors; K products | exact |
| blocks of K ≤ `_MOST_FOR_ROOT` | by eigenvectors; K products | Gershgorin's bound |
| larger blocks | approximated by `_STEPS` Lanczos steps | Gershgorin's bound |

Everything depends only on the outputs and is computed once, except the Lanczos steps: each
S v takes `_STEPS` products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import sharding, trees
from hfjax._core.types import Tree
from hfjax._tracing import linalg
from hfjax.losses import _coupling, _outer

MOST_FOR_EIGENVALUES = 64
"""Largest block that is decomposed for a repair: 16 KB in float32."""

_MOST_FOR_ROOT = 96
"""Largest block whose root is exact; each takes about 1 ms on one core."""

_STEPS = 12
"""Lanczos steps for S v, each of which holds one more vector like the outputs."""

_Curvature = Callable[[Tree, Tree], Callable[[Tree], Tree]]


class _Blocks(NamedTuple):
    """How the outputs of one example fall into blocks; v ↦ L″v is its `program`."""

    program: Any
    numbers: np.ndarray  # Block of each output, shape [outputs].
    members: np.ndarray  # Outputs of each block, [blocks, K]; −1 fills up smaller ones.

    @property
    def largest(self) -> int:
        """K."""
        return self.members.shape[1]

    def take(self, flat: jax.Array) -> jax.Array:
        """Sort `[cases, outputs]` into `[cases, blocks, K]`, with zeros at −1."""
        # Most losses have their blocks in order already: then nothing is gathered.
        if self._in_order:
            return flat.reshape(-1, *self.members.shape)
        found = jnp.take(flat, self.members.ravel(), axis=1, mode="clip")
        found = jnp.where(self.members.ravel() < 0, 0, found)
        return found.reshape(-1, *self.members.shape)

    def put(self, sorted_: jax.Array) -> jax.Array:
        """Undo `take`."""
        flat = sorted_.reshape(len(sorted_), -1)
        if self._in_order:
            return flat
        # −1 sorts behind all outputs, and is then cut off.
        members = np.where(self.members < 0, flat.shape[1], self.members)
        places = np.argsort(members.ravel())[: len(self.numbers)]
        return jnp.take(flat, places, axis=1)

    @property
    def _in_order(self) -> bool:
        places = self.members.ravel()
        return np.array_equal(places, np.arange(len(places)))


def root(
    curvature: _Curvature, outputs: Tree, targets: Tree, positive: str | None
) -> Callable[[Tree], Tree]:
    """Build v ↦ S v with S Sᵀ = L″ + R; without a repair, R is that of "clip".

    `curvature` is `(outputs, targets) -> (v -> L″ v)`; `positive` is "clip", "shift" or
    `None`.
    """
    blocks = _read(curvature, sharding.first_case((outputs, targets)))
    product = _flat(curvature(outputs, targets), outputs)
    # One product with a vector of ones gives a diagonal L″ completely.
    if blocks.largest <= 1:
        entries = _repaired(product(_ones(outputs)), positive or "clip")
        return _unflat(lambda v: jnp.sqrt(entries) * v)
    # The closed form does not know the eigenvalues, so it cannot follow a repair.
    if positive is None:
        try:
            return _root_of_outer(blocks, outputs, targets)
        except _outer.Unreadable:
            pass
    # The repaired product must be the one of `missing`, so it takes the same bound.
    if positive is not None and blocks.largest > MOST_FOR_EIGENVALUES:
        lacking = _gershgorin(product, blocks, outputs)
        product = _plus(product, lacking)
    if blocks.largest <= _MOST_FOR_ROOT:
        values, vectors = _eigen(product, blocks, outputs)
        roots = jnp.sqrt(_repaired(values, positive or "clip"))
        return _unflat(lambda v: blocks.put(_in_basis(blocks.take(v), roots, vectors)))
    return _unflat(lambda v: _root_by_lanczos(product, v))


def missing(
    curvature: _Curvature,
    product: Callable[[Tree], Tree],
    outputs: Tree,
    targets: Tree,
    positive: str,
) -> Callable[[Tree], Tree]:
    """Build v ↦ R v, which makes L″ + R of each example positive semi-definite.

    `product` is v ↦ L″ v; the other arguments are those of `root`.
    """
    blocks = _read(curvature, sharding.first_case((outputs, targets)))
    flat = _flat(product, outputs)
    if blocks.largest <= 1:
        entries = flat(_ones(outputs))
        lacking = _repaired(entries, positive) - entries
        return _unflat(lambda v: lacking * v)
    if blocks.largest > MOST_FOR_EIGENVALUES:
        lacking = _gershgorin(flat, blocks, outputs)
        return _unflat(lambda v: lacking * v)
    values, vectors = _eigen(flat, blocks, outputs)
    lacking = _repaired(values, positive) - values
    return _unflat(lambda v: blocks.put(_in_basis(blocks.take(v), lacking, vectors)))


def coarse(
    curvature: _Curvature, outputs: Tree, targets: Tree, positive: str | None
) -> str | None:
    """Return a clause that says why S Sᵀ only approximates L″ + R; `None` if it is exact.

    `outputs` and `targets` are those of one example, with a leading axis; or their shapes.
    """
    blocks = _read(curvature, (outputs, targets))
    if blocks.largest <= _MOST_FOR_ROOT:
        return None
    if positive is None and _is_outer(blocks, (outputs, targets)):
        return None
    return (
        f"the loss couples {blocks.largest} outputs of a case, more than the "
        f"{_MOST_FOR_ROOT} whose L″ is decomposed: its root is taken by {_STEPS} steps "
        "of Lanczos"
    )


def _read(curvature: _Curvature, one: tuple[Tree, Tree]) -> _Blocks:
    """Find the blocks of one example, given its outputs and targets or their shapes."""
    program = _coupling.trace(curvature, *one)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(one[0])]
    numbers = _coupling.blocks(program, shapes)
    sizes = np.bincount(numbers, minlength=1)
    members = np.full((len(sizes), max(1, sizes.max(initial=0))), -1)
    # `place` is the position of each output within its block.
    order = np.argsort(numbers, kind="stable")
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members[numbers[order], place] = order
    return _Blocks(program, numbers, members)


def _is_outer(blocks: _Blocks, one: tuple[Tree, Tree]) -> bool:
    # Whether L″ has this form is decided while tracing, so shapes suffice.
    try:
        jax.eval_shape(
            lambda *args: _outer.read(blocks.program, args, blocks.numbers),
            *jax.tree.leaves(one),
        )
    except _outer.Unreadable:
        return False
    return True


def _root_of_outer(
    blocks: _Blocks, outputs: Tree, targets: Tree
) -> Callable[[Tree], Tree]:
    """Build v ↦ S v for L″ that is a diagonal and an outer product in each block."""

    def of_case(outputs: Tree, targets: Tree) -> _outer.Outer:
        leaves = [leaf[None] for leaf in jax.tree.leaves((outputs, targets))]
        return _outer.read(blocks.program, leaves, blocks.numbers)

    # The program is that of a batch of one example, so each example gets an axis again.
    parts = jax.vmap(of_case)(outputs, targets)
    parts = (blocks.take(x.astype(trees.wide(x.dtype))) for x in parts)
    root = _outer.root(_outer.Outer(*parts))
    return _unflat(lambda v: blocks.put(root(blocks.take(v))))


def _root_by_lanczos(product: Callable, v: jax.Array) -> jax.Array:
    """Approximate √L″ v of each example in the Krylov space of v, L″v, L″²v, ….

    With an orthonormal basis Q that starts with v/‖v‖, and T = QᵀL″Q, the result is
    ‖v‖ Q √T e₁, where negative eigenvalues of T count as 0.
    """
    steps = min(_STEPS, v.shape[1])
    length = jnp.linalg.norm(v, axis=1, keepdims=True)
    first = v / jnp.where(length > 0, length, 1)

    def step(carry: tuple, n: jax.Array) -> tuple:
        basis, q = carry
        basis = jax.lax.dynamic_update_index_in_dim(basis, q, n, 0)
        image = product(q)
        # Gram-Schmidt twice: a single pass loses orthogonality when `rest` is small.
        rest = image
        for _ in range(2):
            within = jnp.sum(basis * rest[None], axis=2, keepdims=True)
            rest = rest - jnp.sum(within * basis, axis=0)
        size = jnp.linalg.norm(rest, axis=1, keepdims=True)
        # Below this the space is exhausted; the zero vectors that follow do not
        # contribute.
        known = size > 1e-5 * jnp.linalg.norm(image, axis=1, keepdims=True)
        q = jnp.where(known, rest / jnp.where(known, size, 1), 0)
        return (basis, q), jnp.sum(basis * image[None], axis=2)

    start = jnp.stack([sharding.zeros_like(v)] * steps)
    (basis, _), columns = jax.lax.scan(step, (start, first), jnp.arange(steps))
    # Column n was computed with the basis up to qₙ, so the lower triangle is missing.
    matrices = jnp.triu(columns.transpose(2, 1, 0))
    matrices = matrices + jnp.triu(matrices, 1).mT
    values, vectors = jax.vmap(linalg.eigh)(matrices)
    weights = vectors[:, 0, :] * jnp.sqrt(jnp.maximum(values, 0))
    coordinates = jnp.sum(vectors * weights[:, None, :], axis=2)
    return length * jnp.sum(coordinates.T[:, :, None] * basis, axis=0)


def _eigen(
    product: Callable, blocks: _Blocks, outputs: Tree
) -> tuple[jax.Array, jax.Array]:
    """Decompose all blocks: `[cases, blocks, K]` and `[cases, blocks, K, K]`."""
    # Blocks do not interact, so product k yields the k-th column of every block at once.
    # Padding of smaller blocks adds rows and columns of zeros, with the eigenvalue 0.
    ones = _ones(outputs)
    probes = _probes(blocks, ones.dtype)
    columns = jax.vmap(lambda probe: blocks.take(product(ones * probe[None])))(probes)
    return jax.vmap(jax.vmap(linalg.eigh))(jnp.moveaxis(columns, 0, -1))


def _probes(blocks: _Blocks, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return vectors `[K, outputs]`; the k-th is 1 at every block's k-th output."""
    probes = np.zeros((blocks.largest, len(blocks.numbers) + 1), np.float32)
    probes[np.arange(blocks.largest)[None], blocks.members] = 1
    # Drop the column that −1 has written to.
    return jnp.asarray(probes[:, :-1], dtype)


def _repaired(values: jax.Array, positive: str) -> jax.Array:
    """Raise eigenvalues, `[cases, …]`: to at least 0, or all by what the lowest lacks."""
    if positive == "clip":
        return jnp.maximum(values, 0)
    axes = tuple(range(1, values.ndim))
    return values - jnp.min(values, axis=axes, keepdims=True, initial=0)


def _gershgorin(product: Callable, blocks: _Blocks, outputs: Tree) -> jax.Array:
    """Return max(0, Σ_{j≠i}|Lᵢⱼ| − Lᵢᵢ) for each output, `[cases, outputs]`."""
    # The probes run one after another, so no more than three rows are held at a time.
    zero = sharding.zeros_like(_ones(outputs))

    def step(carry: tuple, probe: jax.Array) -> tuple:
        sums, diagonal = carry
        chosen = zero + probe[None]
        column = product(chosen)
        return (sums + jnp.abs(column), diagonal + chosen * column), None

    probes = _probes(blocks, zero.dtype)
    (sums, diagonal), _ = jax.lax.scan(step, (zero, zero), probes)
    # `sums` is over the absolute values of a column, its diagonal entry included.
    return jnp.maximum(sums - jnp.abs(diagonal) - diagonal, 0)


def _plus(product: Callable, entries: jax.Array) -> Callable:
    return lambda v: product(v) + entries * v


def _in_basis(x: jax.Array, values: jax.Array, vectors: jax.Array) -> jax.Array:
    """Return V diag(values) Vᵀx, with x and values of shape `[cases, blocks, K]`."""
    within = jnp.sum(vectors * x[..., None], axis=-2)
    return jnp.sum(vectors * (values * within)[..., None, :], axis=-1)


def _flat(product: Callable[[Tree], Tree], outputs: Tree) -> Callable:
    """Turn a product of trees into one of rows `[cases, outputs]`, float32 or wider."""
    return lambda v: _rows(product(trees.cast_like(_like(v, outputs), outputs)))


def _unflat(product: Callable[[jax.Array], jax.Array]) -> Callable[[Tree], Tree]:
    """Turn a product of rows into one of trees; results have the dtypes of `v`."""
    return lambda v: trees.cast_like(_like(product(_rows(v)), v), v)


def _rows(tree: Tree) -> jax.Array:
    """Concatenate the outputs of each example to one row: `[cases, outputs]`."""
    leaves = jax.tree.leaves(trees.widen(tree))
    dtype = trees.widest(*(leaf.dtype for leaf in leaves))
    rows = [leaf.astype(dtype).reshape(len(leaf), -1) for leaf in leaves]
    return jnp.concatenate(rows, axis=1)


def _like(rows: jax.Array, tree: Tree) -> Tree:
    """Undo `_rows`."""
    leaves, structure = jax.tree.flatten(tree)
    sizes = [int(np.prod(leaf.shape[1:])) for leaf in leaves]
    parts = jnp.split(rows, np.cumsum(sizes)[:-1], axis=1)
    pairs = zip(parts, leaves, strict=True)
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in pairs])


def _ones(outputs: Tree) -> jax.Array:
    return sharding.zeros_like(_rows(outputs)) + 1
