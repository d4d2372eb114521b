"""Kronecker factors of the Gauss-Newton matrix, layer by layer.

Of a layer with inputs xᵢₜ of case i at position t (a 1 appended where there is a bias)
and gᵢₜ, the derivative of random combinations Sᵢvᵢ of the outputs by what comes out of
it,

    Ā = Σᵢₜ wᵢ xᵢₜ xᵢₜᵀ / (positions Σᵢ wᵢ),      Ḡ = Σᵢₜ wᵢ gᵢₜ gᵢₜᵀ / Σᵢ wᵢ,

G's block of the kernel is about Ḡ ⊗ Ā: exactly, if inputs and derivatives are
independent, and positions of each other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _layers, _linalg, _sharding, _tree, diagonals
from hfjax._cases import Cases
from hfjax._linearize import noting_no_reverse
from hfjax._merged_layers import Merged, Part
from hfjax._objective import alone, terms_of
from hfjax._probes import probes
from hfjax._terms import Term
from hfjax._types import Batch, Number, Params, Tree
from hfjax.objective import Objective


class Pair(NamedTuple):
    """Two matrices of a layer, or their inverses; unnamed in a state.

    Attributes:
      inputs: Ā, of as many rows as inputs, and one for a bias.
      units: Ḡ.
    """

    inputs: jax.Array
    units: jax.Array


def read(
    objective: Objective, params: Params, batch: Batch, max_size: int
) -> list[_layers.Model]:
    """Find the layers of the model of each term, without those that are too large."""
    terms = terms_of(objective, batch)
    leaves = list(enumerate(jax.tree.leaves(params)))
    data = [_sharding.alike(term.cases) for term in terms]
    if any(_sharding.lies_elsewhere(params, cases) for cases in data):
        why = "its type, or another's, lies over an axis that the cases do not"
        others = {n: why for n, _ in leaves}
        return [_layers.Model((), (), others, frozenset(), None, None)] * len(terms)
    unfit = {
        n: f"a side is longer than {max_size}"
        for n, leaf in leaves
        if jnp.ndim(leaf) >= 2 and not may_be_kernel(jnp.shape(leaf), max_size)
    } | {n: "it has no entries" for n, leaf in leaves if jnp.size(leaf) == 0}

    def of_term(term: Term, cases: Cases) -> _layers.Model:
        # As `factors` evaluates it: else what marks or gathers is in the program.
        local = term.means.local(_sharding.gathered(params, cases))
        inputs = _sharding.first_case(term.cases.inputs)
        return _layers.read(term.outputs, local, inputs, unfit)

    return [of_term(term, cases) for term, cases in zip(terms, data, strict=True)]


def coarse(objective: Objective, params: Params, batch: Batch) -> str | None:
    """Say where the random combinations of the outputs are drawn only nearly."""
    for term in terms_of(objective, batch):
        inputs, targets = _sharding.first_case(term.cases[:2])
        outputs = jax.eval_shape(term.outputs, params, inputs)
        found = term.loss.coarse(outputs, targets)
        if found is not None:
            return found
    return None


@noting_no_reverse()
def factors(
    term: Term,
    params: Params,
    model: _layers.Model,
    *,
    key: jax.Array,
    num_probes: int,
) -> list[Pair]:
    """Compute Ā and Ḡ of each layer: a pass forward, one back a probe, products.

    Args:
      term: whose G it is, without weight decay.
      params: θ.
      model: as `read` found it.
      key: a typed key.
      num_probes: combinations of the outputs that are averaged.

    Returns:
      A pair for each layer, in float32 or wider.
    """
    cases = _sharding.alike(term.cases)
    local = term.means.local(_sharding.gathered(params, cases))
    drawn = probes(term.means, cases, key)

    def sums(cases: Cases) -> list[Pair]:
        inputs, keys = cases.inputs
        root = jnp.sqrt(cases.weights)

        def forward(added: list[jax.Array]) -> tuple[Tree, list[jax.Array]]:
            def one(added: list[jax.Array], inputs: Tree) -> tuple:
                case = jax.tree.map(lambda x: x[None], inputs)
                outputs, rows = model.evaluate(local, case, added)
                return jax.tree.map(lambda z: z[0], outputs), rows

            return jax.vmap(one)(added, inputs)

        def gram(rows: jax.Array) -> jax.Array:
            # √w on both sides: whatever digits are dropped, of both alike, the
            # matrix stays positive semi-definite.
            rows = rows.astype(_tree.wide(rows.dtype))
            rows *= root.astype(rows.dtype)[:, None, None]
            return _sharding.contracted(rows, rows, ((0, 1), (0, 1)))

        def grams_of_errors(probe: int) -> list[jax.Array]:
            signs = jax.vmap(lambda key, z: drawn.signs(key, probe, z))(keys, outputs)
            (derivatives,) = transpose(factor(signs))
            return [
                gram(jax.vmap(lambda d, n=n: model.errors(n, d))(derivative))
                for n, derivative in enumerate(derivatives)
            ]

        nothing = _sharding.zeros_like(cases.weights)  # Laid out as the cases are.
        added = jax.vmap(lambda w: [z + w.astype(z.dtype) for z in model.zeros()])(
            nothing
        )
        outputs, transpose, rows = jax.vjp(forward, added, has_aux=True)
        factor = term.loss.factor(outputs, cases.targets)
        errors = grams_of_errors(0)
        for probe in range(1, num_probes):
            errors = jax.tree.map(jnp.add, errors, grams_of_errors(probe))

        def with_bias(rows: jax.Array, layer: _layers.Layer) -> jax.Array:
            if layer.bias is None:
                return rows
            return jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)

        return [
            Pair(
                sum(gram(with_bias(rows[n], layer)) for n in layer.uses),  # pyright: ignore[reportArgumentType]
                sum(errors[n] for n in layer.uses),  # pyright: ignore[reportArgumentType]
            )
            for layer in model.layers
        ]

    data = cases._replace(inputs=(cases.inputs, drawn.data))
    means = term.means.mean(sums, _sharding.alike(data))
    return [
        Pair(pair.inputs / layer.positions(model.uses), pair.units / num_probes)
        for layer, pair in zip(model.layers, means, strict=True)
    ]


def inverse(pair: Pair, damping: jax.Array) -> Pair:
    """Invert (Ḡ + √(g/a) √λ I) ⊗ (Ā + √(a/g) √λ I), with a and g mean eigenvalues.

    In units of a and g the two are damped alike, by μ = √(λ / ag): that, and not less
    than the rounding of the matrices, is what their Cholesky factors see. A factor that
    has none all the same counts as the identity.

    Args:
      pair: Ā and Ḡ.
      damping: λ ≥ 0.

    Returns:
      The two inverses.

    References:
      Martens & Grosse (2015), section 6.3, with the ratio of the traces.
    """
    a, g = (jnp.trace(matrix) / len(matrix) for matrix in pair)
    dtype = a.dtype
    # Of a layer that nothing passes through, only λ is known.
    scale = jnp.maximum(a * g, 1e-6 * damping.astype(dtype))
    scale = jnp.minimum(scale, 1e-3 * jnp.finfo(dtype).max)
    nothing = ~(scale > 0)
    scale = jnp.where(nothing, 1, scale)
    rounding = 10 * jnp.finfo(dtype).eps * max(len(matrix) for matrix in pair)
    mu = jnp.maximum(jnp.sqrt(damping.astype(dtype) / scale), rounding)
    inputs, units = (
        _positive_inverse(matrix / jnp.where(size > 0, size, 1), mu)
        for matrix, size in zip(pair, (a, g), strict=True)
    )
    # Where not even λ is known, leave it be.
    return Pair(
        jnp.where(nothing, jnp.eye(len(inputs), dtype=dtype), inputs),
        jnp.where(nothing, jnp.eye(len(units), dtype=dtype), units / scale),
    )


def _positive_inverse(matrix: jax.Array, mu: jax.Array) -> jax.Array:
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    # It reads one triangle only: as good as the mean of both.
    damped = matrix + mu * identity
    root = _linalg.cholesky(damped)
    half = _linalg.solve_lower(root, identity)
    # Positive as a product with its own transpose, whatever is rounded.
    found = jnp.matmul(half.T, half, precision=_tree.EXACT)
    # A root that there is not is NaN, to its last pivot.
    return jnp.where(jnp.isfinite(root[-1, -1]), found, identity / (1 + mu))


def multiply(layer: _layers.Layer, pair: Pair, leaves: list[jax.Array]) -> None:
    """Replace a layer's kernel and bias in `leaves` by Ā · [kernel, bias] · Ḡ."""
    kernel = leaves[layer.kernel]
    dtype = pair.inputs.dtype
    flat = _sharding.replicated(kernel).astype(dtype).reshape(-1, kernel.shape[-1])
    matrix = flat.T if layer.inputs_last else flat
    if layer.bias is not None:
        bias = _sharding.replicated(leaves[layer.bias]).astype(dtype)
        matrix = jnp.concatenate([matrix, bias[None]])
    product = jnp.matmul(pair.inputs, matrix, precision=_tree.EXACT)
    product = jnp.matmul(product, pair.units, precision=_tree.EXACT)
    if layer.bias is not None:
        old = leaves[layer.bias]
        leaves[layer.bias] = _sharding.like(product[-1].astype(old.dtype), old)
        product = product[:-1]
    product = product.T if layer.inputs_last else product
    shaped = product.reshape(kernel.shape).astype(kernel.dtype)
    leaves[layer.kernel] = _sharding.like(shaped, kernel)


class Blocks(NamedTuple):
    """P, or its inverse, block by block.

    Attributes:
      pairs: of each layer.
      diagonals: of each other parameter, by its number.
      beside: of a layer's parameters, the diagonal of those terms of a sum in which they
        are none; of the inverse nothing, as it counts in the pairs.
    """

    pairs: list[Pair]
    diagonals: dict[int, jax.Array]
    beside: dict[int, jax.Array]


def estimate(
    objective: Objective,
    params: Params,
    batch: Batch,
    model: Merged,
    *,
    key: jax.Array,
    num_probes: int,
) -> Blocks:
    """Compute factors of the layers, and the diagonal of G for the rest.

    A weighted sum counts as one objective of all its terms' cases: of the terms that have
    a layer, Ā is the mean, weighted by cₖ, and Ḡ the sum.

    Args:
      objective: whose G it is, weight decay apart.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      model: of the models that `read` found.
      key: a typed key.
      num_probes: as in `factors`.

    Returns:
      The blocks, undamped.
    """
    terms = terms_of(objective, batch)
    keys = _keys(key, len(terms))
    found = [
        _estimate(term, params, part, key=own_key, num_probes=num_probes)
        for term, part, own_key in zip(terms, model.parts, keys, strict=True)
    ]
    weights = [
        None
        if term.weight is None
        else jnp.asarray(term.weight, _tree.scalar_dtype(params))
        for term in terms
    ]
    pairs = [
        _pair(
            layer,
            [
                (c, part_pairs[part.places.index(place)])
                for c, part, (part_pairs, _) in zip(
                    weights, model.parts, found, strict=True
                )
                if place in part.places
            ],
        )
        for place, layer in enumerate(model.layers)
    ]
    leaves = jax.tree.leaves(params)

    def entries(n: int) -> jax.Array:
        own = [(c, of[n]) for c, (_, of) in zip(weights, found, strict=True) if n in of]
        return _total(own) if own else _sharding.zeros_like(_tree.widen(leaves[n]))

    return Blocks(
        pairs,
        {n: entries(n) for n in model.others},
        {n: entries(n) for n in model.beside},
    )


def _pair(layer: _layers.Layer, found: list[tuple[jax.Array | None, Pair]]) -> Pair:
    """Put together the factors that terms have of a layer, each with its cₖ."""
    size = layer.inputs + (layer.bias is not None)

    def with_bias(inputs: jax.Array) -> jax.Array:
        # A term without the bias knows nothing of it: zeros.
        return jnp.pad(inputs, (0, size - len(inputs)))

    whole = _total([(c, jnp.ones(())) for c, _ in found])
    inputs = _total([(c, with_bias(pair.inputs)) for c, pair in found])
    units = _total([(c, pair.units) for c, pair in found])
    if found[0][0] is not None:
        inputs = inputs / jnp.where(whole > 0, whole, 1).astype(inputs.dtype)
    # Those of a product that widens its inputs differ.
    dtype = _tree.widest(inputs.dtype, units.dtype)
    return Pair(inputs.astype(dtype), units.astype(dtype))


def _total(found: list[tuple[jax.Array | None, jax.Array]]) -> jax.Array:
    """Sum arrays, each times its cₖ; `None` is 1."""
    terms = [x if c is None else c.astype(x.dtype) * x for c, x in found]
    return sum(terms[1:], terms[0])


def _keys(key: jax.Array, count: int) -> list[jax.Array]:
    return [key] if count == 1 else [jax.random.fold_in(key, k) for k in range(count)]


def _estimate(
    term: Term,
    params: Params,
    part: Part,
    *,
    key: jax.Array,
    num_probes: int,
) -> tuple[list[Pair], dict[int, jax.Array]]:
    """Compute a term's factors, and its diagonal for the parameters it counts for."""
    cases = _sharding.alike(term.cases)
    leaves, structure = jax.tree.flatten(params)
    whole = jax.tree.leaves(_sharding.gathered(params, cases))
    others: dict[int, jax.Array] = {n: leaves[n] for n in part.diagonals}
    model = part.model
    pairs: list[Pair] = []
    if model.layers:
        pairs = factors(term, params, model, key=key, num_probes=num_probes)
    if others:

        def of_others(others: dict[int, jax.Array], inputs: Tree) -> Tree:
            given = [others.get(n, leaf) for n, leaf in enumerate(whole)]
            return term.model_fn(structure.unflatten(given), inputs)

        bare = term._replace(model_fn=of_others, weight_decay=0.0)
        others = diagonals.ggn_rademacher(
            alone(bare),
            others,
            term.cases,
            key=key,
            num_probes=num_probes,
        )
    return pairs, others


def inverted(blocks: Blocks, model: Merged, damping: Tree, share: Number) -> Blocks:
    """Damp and invert.

    Args:
      blocks: undamped.
      model: whose they are.
      damping: λ, a scalar, or a tree like the parameters of λD's diagonal.
      share: of λ that goes into the factors' damping.

    Returns:
      The blocks of P⁻¹.
    """
    found = jax.tree.leaves(damping)
    scalar = len(found) == 1 and jnp.ndim(found[0]) == 0

    def of(number: int) -> jax.Array:
        return jnp.asarray(found[0] if scalar else found[number])

    def of_layer(layer: _layers.Layer) -> jax.Array:
        """Return λ, and the mean entry of what stands beside the layer's factors."""
        numbers = [n for n in (layer.kernel, layer.bias) if n in blocks.beside]
        entries = [blocks.beside[n] for n in numbers]  # pyright: ignore[reportArgumentType]
        damped = jnp.mean(of(layer.kernel))
        if not entries:
            return damped
        count = layer.units * (layer.inputs + (layer.bias is not None))
        mean = sum(jnp.sum(x / count) for x in entries)
        return damped + jnp.asarray(mean).astype(damped.dtype)

    pairs = [
        inverse(pair, jnp.asarray(share * of_layer(layer)))
        for layer, pair in zip(model.layers, blocks.pairs, strict=True)
    ]

    def reciprocal(number: int, entries: jax.Array) -> jax.Array:
        entries = jnp.minimum(entries, jnp.finfo(entries.dtype).max)
        total = entries + of(number).astype(entries.dtype)
        # Where nothing is known of a parameter's curvature, leave it be.
        return 1 / jnp.where(total > 0, total, 1)

    rest = {n: reciprocal(n, entries) for n, entries in blocks.diagonals.items()}
    return Blocks(pairs, rest, {})


def product(blocks: Blocks, model: Merged, r: Tree) -> Tree:
    """Multiply a tree like the parameters by all blocks."""
    leaves, structure = jax.tree.flatten(r)
    for layer, pair in zip(model.layers, blocks.pairs, strict=True):
        multiply(layer, pair, leaves)
    for n, entries in blocks.diagonals.items():
        leaves[n] = (leaves[n].astype(entries.dtype) * entries).astype(leaves[n].dtype)
    return structure.unflatten(leaves)


def room_for(params: Params, max_size: int) -> tuple:
    """Return zeros for the blocks of parameters whose use is not known yet.

    Args:
      params: θ.
      max_size: of a kernel's sides, above which it has none but a diagonal.

    Returns:
      For each parameter a diagonal, and for a possible kernel two matrices, with a row
      for a bias on either side.
    """

    def room(leaf: jax.Array) -> tuple[jax.Array, ...]:
        dtype = _tree.wide(leaf.dtype)
        diagonal = _sharding.zeros_like(leaf.astype(dtype))
        if not may_be_kernel(leaf.shape, max_size):
            return (diagonal,)
        sides = (math.prod(leaf.shape[:-1]), leaf.shape[-1])
        return (diagonal, *(jnp.zeros((n + 1, n + 1), dtype) for n in sides))

    return tuple(room(leaf) for leaf in jax.tree.leaves(params))


def may_be_kernel(shape: tuple[int, ...], max_size: int) -> bool:
    """Return whether a parameter may have factors, by its shape."""
    return len(shape) >= 2 and max(math.prod(shape[:-1]), shape[-1]) <= max_size


def pack(blocks: Blocks, model: Merged, room: tuple) -> tuple:
    """Put blocks into the room that a state has for them."""
    packed = [list(entries) for entries in room]
    for layer, pair in zip(model.layers, blocks.pairs, strict=True):
        for place, matrix in zip(_places(layer), pair, strict=True):
            slot, size = packed[layer.kernel], len(matrix)
            slot[place] = (
                slot[place].at[:size, :size].set(matrix.astype(slot[place].dtype))
            )
    for n, entries in (blocks.diagonals | blocks.beside).items():
        packed[n][0] = entries
    return tuple(tuple(entries) for entries in packed)


def unpack(packed: tuple, model: Merged) -> Blocks:
    """Take blocks out of a state."""

    def pair(layer: _layers.Layer) -> Pair:
        sizes = (layer.inputs + (layer.bias is not None), layer.units)
        return Pair(
            *(
                packed[layer.kernel][place][:size, :size]
                for place, size in zip(_places(layer), sizes, strict=True)
            )
        )

    return Blocks(
        [pair(layer) for layer in model.layers],
        {n: packed[n][0] for n in model.others},
        {n: packed[n][0] for n in model.beside},
    )


def _places(layer: _layers.Layer) -> tuple[int, int]:
    return (2, 1) if layer.inputs_last else (1, 2)
