"""Kronecker factors of the Gauss-Newton matrix, layer by layer.

Of a layer with inputs xᵢₜ of case i at position t (a 1 appended where there is a bias)
and gᵢₜ, the derivative of random combinations Sᵢvᵢ of the outputs by what comes out of
it,

    Ā = Σᵢₜ wᵢ xᵢₜ xᵢₜᵀ / (positions Σᵢ wᵢ),      Ḡ = Σᵢₜ wᵢ gᵢₜ gᵢₜᵀ / Σᵢ wᵢ,

G's block of the kernel is about Ḡ ⊗ Ā: exactly, if inputs and derivatives are
independent, and positions of each other.
"""

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.curvature import diagonals
from hfjax.curvature.probes import probes
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import alone, terms_of
from hfjax.objectives.terms import Term
from hfjax.preconditioners import _layers
from hfjax.preconditioners._blocks import Blocks, Pair, may_be_kernel
from hfjax.preconditioners._layer_pass import layer_pass
from hfjax.preconditioners._merged_layers import Merged, Part


def read(
    objective: Objective, params: Params, batch: Batch, max_size: int
) -> list[_layers.Model]:
    """Find the layers of the model of each term, without those that are too large."""
    terms = terms_of(objective, batch)
    leaves = list(enumerate(jax.tree.leaves(params)))
    data = [sharding.alike(term.cases) for term in terms]
    if any(sharding.lies_elsewhere(params, cases) for cases in data):
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
        local = term.means.local(sharding.gathered(params, cases))
        inputs = sharding.first_case(term.cases.inputs)
        return _layers.read(term.outputs, local, inputs, unfit)

    return [of_term(term, cases) for term, cases in zip(terms, data, strict=True)]


def coarse(objective: Objective, params: Params, batch: Batch) -> str | None:
    """Say where the random combinations of the outputs are drawn only nearly."""
    for term in terms_of(objective, batch):
        inputs, targets = sharding.first_case(term.cases[:2])
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
) -> list[Pair]:
    """Compute Ā and Ḡ of each layer: a pass forward, one back, products.

    Args:
      term: whose G it is, without weight decay.
      params: θ.
      model: as `read` found it.
      key: a typed key.

    Returns:
      A pair for each layer, in float32 or wider.
    """
    cases = sharding.alike(term.cases)
    local = term.means.local(sharding.gathered(params, cases))
    drawn = probes(term.means, cases, key)

    def sums(cases: Cases) -> list[Pair]:
        inputs, keys = cases.inputs
        root = jnp.sqrt(cases.weights)
        own = Cases(inputs, cases.targets, cases.weights)
        seen = layer_pass(model, term.outputs, local, own)

        def gram(rows: jax.Array) -> jax.Array:
            # √w on both sides: whatever digits are dropped, of both alike, the
            # matrix stays positive semi-definite.
            rows = rows.astype(trees.wide(rows.dtype))
            rows *= root.astype(rows.dtype)[:, None, None]
            return sharding.contracted(rows, rows, ((0, 1), (0, 1)))

        outputs, transpose, rows = jax.vjp(seen.forward, seen.added, has_aux=True)
        factor = term.loss.factor(outputs, cases.targets)
        signs = jax.vmap(lambda key, z: drawn.signs(key, 0, z))(keys, outputs)
        (derivatives,) = transpose(factor(signs))
        errors = [
            gram(seen.errors(n, derivative)) for n, derivative in enumerate(derivatives)
        ]

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
    means = term.means.mean(sums, sharding.alike(data))
    return [
        Pair(pair.inputs / layer.positions(model.uses), pair.units)
        for layer, pair in zip(model.layers, means, strict=True)
    ]


def estimate(
    objective: Objective,
    params: Params,
    batch: Batch,
    model: Merged,
    *,
    key: jax.Array,
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

    Returns:
      The blocks, undamped.
    """
    terms = terms_of(objective, batch)
    keys = _keys(key, len(terms))
    found = [
        _estimate(term, params, part, key=own_key)
        for term, part, own_key in zip(terms, model.parts, keys, strict=True)
    ]
    weights = [
        None
        if term.weight is None
        else jnp.asarray(term.weight, trees.scalar_dtype(params))
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
        return _total(own) if own else sharding.zeros_like(trees.widen(leaves[n]))

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
    dtype = trees.widest(inputs.dtype, units.dtype)
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
) -> tuple[list[Pair], dict[int, jax.Array]]:
    """Compute a term's factors, and its diagonal for the parameters it counts for."""
    cases = sharding.alike(term.cases)
    leaves, structure = jax.tree.flatten(params)
    whole = jax.tree.leaves(sharding.gathered(params, cases))
    others: dict[int, jax.Array] = {n: leaves[n] for n in part.diagonals}
    model = part.model
    pairs: list[Pair] = []
    if model.layers:
        pairs = factors(term, params, model, key=key)
    if others:

        def of_others(others: dict[int, jax.Array], inputs: Tree) -> Tree:
            given = [others.get(n, leaf) for n, leaf in enumerate(whole)]
            return term.model_fn(structure.unflatten(given), inputs)

        bare = term._replace(model_fn=of_others, weight_decay=0.0)
        others = diagonals.ggn_rademacher(alone(bare), others, term.cases, key=key)
    return pairs, others
