"""Kronecker factors of the Gauss-Newton matrix, layer by layer.

Let xᵢₜ be the inputs of a layer for example i at position t (with a 1 appended if there
is a bias). Let gᵢₜ be the random combination Sᵢvᵢ of the outputs, propagated back to
the output of the layer. With

    Ā = Σᵢₜ wᵢ xᵢₜ xᵢₜᵀ / (positions Σᵢ wᵢ),      Ḡ = Σᵢₜ wᵢ gᵢₜ gᵢₜᵀ / Σᵢ wᵢ,

the block of G that belongs to the kernel is about Ḡ ⊗ Ā. A kernel that is one for each
expert, or for each layer of a stack, has such a pair for each. In expectation this is exact
if inputs and derivatives are independent, and positions are independent of each other.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing import layers
from hfjax._tracing.linearize import noting_no_reverse
from hfjax.curvature import diagonals
from hfjax.curvature.probes import keys_of, probes
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import alone, terms_of
from hfjax.objectives.terms import Term
from hfjax.preconditioners._blocks import (
    Blocks,
    Pair,
    capacity,
    nearest_product,
    needed,
)
from hfjax.preconditioners._layer_pass import layer_pass
from hfjax.preconditioners._merged_layers import Merged, Part

_Factors: TypeAlias = tuple[Pair, jax.Array | None]
"""Sums for Ā and Ḡ, and of the weights of positions that errors have reached."""


def read(
    objective: Objective,
    params: Params,
    batch: Batch,
    max_size: int,
    *,
    stored: bool = False,
) -> list[layers.Model]:
    """Find the layers in the model of each term, except those that are too large.

    `stored` says whether their matrices must fit into the space of a state.
    """
    terms = terms_of(objective, batch)
    leaves = list(enumerate(jax.tree.leaves(params)))
    data = [sharding.alike(term.cases) for term in terms]
    if any(sharding.lies_elsewhere(params, cases) for cases in data):
        why = "its type, or another's, lies over an axis that the cases do not"
        others = {n: why for n, _ in leaves}
        return [layers.Model((), (), others, {}, frozenset(), None, None)] * len(terms)
    unfit = {n: "it has no entries" for n, leaf in leaves if jnp.size(leaf) == 0}

    def fits(layer: layers.Layer) -> str | None:
        if max(0 if layer.is_lookup else layer.inputs, layer.units) > max_size:
            return f"a side is longer than {max_size}"
        shape = jnp.shape(leaves[layer.kernel][1])
        if stored and needed(layer) > capacity(shape, max_size):
            return "the state has no space for its factors"
        return None

    def of_term(term: Term, cases: Cases) -> layers.Model:
        # Prepare the parameters as `factors` does. Otherwise the program would contain the
        # operations that gather them, or mark them as varying over devices.
        local = term.means.local(sharding.gathered(params, cases))
        inputs = sharding.first_case(term.cases.inputs)
        return layers.read(term.outputs, local, inputs, unfit, fits)

    return [of_term(term, cases) for term, cases in zip(terms, data, strict=True)]


def coarse(objective: Objective, params: Params, batch: Batch) -> str | None:
    """Say why a term's factor S of L″ is only approximate; `None` if all are exact."""
    for term in terms_of(objective, batch):
        inputs, targets = sharding.first_case(term.cases[:2])
        outputs = jax.eval_shape(term.outputs, params, inputs)
        found = term.loss.coarse(outputs, targets)
        if found is not None:
            return found
    return None


@noting_no_reverse()
def factors(
    term: Term, params: Params, model: layers.Model, *, key: jax.Array
) -> tuple[list[Pair], dict[int, jax.Array]]:
    """Compute Ā and Ḡ of each layer that `read` found in a term, in float32 or wider.

    And diag(G) of scales and shifts, from the squared gradients Σₜ xᵢₜ gᵢₜ and Σₜ gᵢₜ of
    each example. This costs a forward pass, a backward pass and the products. Weight decay
    is left out.

    Where positions of the outputs have weights, gᵢₜ contains them through Sᵢ, so that Ḡ is
    exact in expectation. The positions of a layer need not be those of the outputs, so
    in Ā each has the weight of its example. But it leaves out those at which gᵢₜ or xᵢₜ is
    0: they have no part in the block, and padding leads to such positions alone unless the
    model passes it on to others. So do the branches of a `cond` that are not taken, and
    experts that are not chosen.

    If the whole batch is one example, i counts the examples of the batch, and gᵢₜ is the
    error that comes back from all of its outputs. A scale that is multiplied before it meets
    them, as in batch normalisation, is left out.
    """
    cases = sharding.alike(term.cases)
    local = term.means.local(sharding.gathered(params, cases))
    drawn = probes(term.means, cases, key)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]

    def sums(cases: Cases) -> tuple[list[list[_Factors]], dict[int, jax.Array]]:
        inputs, keys = cases.inputs
        own = Cases(inputs, cases.targets, cases.weights)
        seen = layer_pass(model, term, local, own)

        # g is the derivative by zeros that are added to the outputs of the layers.
        outputs, transpose, taken = jax.vjp(seen.forward, seen.added, has_aux=True)
        factor = term.loss.factor(outputs, cases.targets)
        signs = jax.vmap(lambda key, z: drawn.signs(key, 0, z))(keys, outputs)
        (derivatives,) = transpose(factor(signs))

        def of_use(n: int, layer: layers.Layer, reached_only: bool) -> _Factors:
            both = seen.rows(n, taken, derivatives)
            is_flipped = n in layer.flipped
            return _of_use(layer, *both, seen.weights[n], reached_only, is_flipped)

        def of_layer(layer: layers.Layer) -> list[_Factors]:
            """Return the sums over its uses, and over flipped ones if there are any."""
            uses = [model.uses[n] for ns in layer.ways for n in ns]
            reached_only = term.by_position or any(use.is_partial for use in uses)
            each = [[of_use(n, layer, reached_only) for n in ns] for ns in layer.ways]
            return [jax.tree.map(_sum, *found) for found in each]

        def gradients(n: int) -> jax.Array:
            inputs, errors = seen.rows(n, taken, derivatives)
            errors = errors.astype(trees.wide(errors.dtype))
            is_scale = model.uses[n].how == "mul"
            return jnp.sum(errors * inputs if is_scale else errors, axis=1)

        def of_scaling(uses: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
            total, (_, weights) = _sum(*map(gradients, uses)), seen.weights[uses[0]]
            weights = weights.astype(total.dtype)
            squares = sharding.contracted(weights, total**2, ((0,), (0,)))
            return squares.reshape(shape)

        # Else the square of a single sum over a whole batch would be one random draw.
        apart = {
            n: of_scaling(uses, shapes[n])
            for n, uses in model.scalings.items()
            if all(seen.apart[k] for k in uses)
        }
        return [of_layer(layer) for layer in model.layers], apart

    # Each example's key is part of its inputs, so that microbatches keep them together.
    data = cases._replace(inputs=(cases.inputs, drawn.data))
    means, scalings = term.means.mean(sums, sharding.alike(data))
    both = zip(model.layers, means, strict=True)
    return [_over_ways(layer, model, found) for layer, found in both], scalings


def _over_ways(layer: layers.Layer, model: layers.Model, found: list[_Factors]) -> Pair:
    """Return the factors of a layer from the means of its uses, and of flipped ones."""
    often = [layer.positions(model.uses, numbers) for numbers in layer.ways]
    its = zip(found, often, strict=True)
    pair, *flipped = [_averaged(pair, n, reached) for (pair, reached), n in its]
    for other in flipped:
        pair = nearest_product(pair, Pair(other.units, other.inputs))
    return pair


def _of_use(
    layer: layers.Layer,
    x: jax.Array,
    errors: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    reached_only: bool,
    is_flipped: bool,
) -> _Factors:
    """Sum over the examples and positions of a use of a layer."""
    of_inputs, of_errors = weights
    # Of a flipped use, the units are those that a lookup has for inputs.
    lookup = layer.is_lookup and not is_flipped
    of_units = _diagonal_gram if layer.is_lookup and is_flipped else _gram
    reached = None
    if layer.bias is not None:
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
    if reached_only:
        some = jnp.any(errors != 0, axis=-1, keepdims=True)
        if not lookup:
            some &= jnp.any(x != 0, axis=-1, keepdims=True)
            errors = jnp.where(some, errors, 0)
        x = jnp.where(some, x, -1 if lookup else 0)
        along = of_inputs.reshape(-1, *[1] * (some.ndim - 1))
        # One number, or one for each block.
        reached = jnp.sum(jnp.where(some, along, 0), axis=(0, -2, -1))
    if lookup:
        dtype = trees.widest(of_inputs.dtype, errors.dtype)
        inputs = _counts(x, layer.inputs, of_inputs.astype(dtype))
    else:
        inputs = _gram(x, of_inputs)
    return Pair(inputs, of_units(errors, of_errors)), reached


def _gram(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Return Σᵢₜ wᵢ xᵢₜ xᵢₜᵀ, or a stack of them, in float32 or wider."""
    # With √w on both sides the operands are equal. If a device drops digits, it drops them
    # from both alike, and the matrix stays positive semi-definite.
    rows = rows.astype(trees.wide(rows.dtype))
    rows *= jnp.sqrt(weights).astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
    summed = (0, rows.ndim - 2)
    blocks = (1,) if rows.ndim == 4 else ()
    return sharding.contracted(rows, rows, (summed, summed), batch=blocks)


def _diagonal_gram(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the diagonal of `_gram`."""
    rows = rows.astype(trees.wide(rows.dtype))
    squares = jnp.sum(rows**2, axis=1)
    return sharding.contracted(weights.astype(rows.dtype), squares, ((0,), (0,)))


def _counts(indices: jax.Array, length: int, weights: jax.Array) -> jax.Array:
    """Sum the weights of the examples by index; -1 is out of range."""
    # Gathering the indices of a sharded batch moves one number for a lookup.
    weights, indices = map(sharding.replicated, (weights, indices))
    weights = weights.astype(trees.wide(weights.dtype))
    each = jnp.broadcast_to(weights[:, None, None], indices.shape)
    places = jnp.where(indices < 0, length, indices)
    # Under `shard_map` the zeros must vary over devices, as the examples do.
    zeros = jnp.zeros(length, each.dtype) + 0 * jnp.sum(weights)
    return zeros.at[places].add(each, mode="drop")


def _averaged(pair: Pair, positions: int, reached: jax.Array | None) -> Pair:
    """Divide Ā by the positions of an example, or by those reached, one for each block."""
    # If positions are independent and alike, the block is Σₜ E[gₜgₜᵀ] ⊗ E[xₜxₜᵀ]: Ḡ is a
    # sum over positions, Ā a mean.
    if reached is None:
        return pair._replace(inputs=pair.inputs / positions)
    divisor = jnp.where(reached > 0, reached, 1).astype(pair.inputs.dtype)
    divisor = jnp.expand_dims(divisor, tuple(range(reached.ndim, pair.inputs.ndim)))
    return pair._replace(inputs=pair.inputs / divisor)


def estimate(
    objective: Objective, params: Params, batch: Batch, model: Merged, *, key: jax.Array
) -> Blocks:
    """Compute factors for the layers, and the diagonal of G for the rest, undamped.

    A weighted sum counts as one objective on the examples of all its terms. If several
    terms have a layer, its Ā is their mean, weighted by cₖ, and its Ḡ the sum of cₖ Ḡₖ.
    Weight decay is left out.
    """
    terms = terms_of(objective, batch)
    keys, dtype = keys_of(terms, key), trees.scalar_dtype(params)
    found = []
    for term, part, own_key in zip(terms, model.parts, keys, strict=True):
        c = None if term.weight is None else jnp.asarray(term.weight, dtype)
        found.append((c, *_estimate(term, params, part, key=own_key)))
    leaves = jax.tree.leaves(params)

    def pair(place: int, layer: layers.Layer) -> Pair:
        own = [(c, pairs[place]) for c, pairs, _ in found if place in pairs]
        return _pair(layer, own)

    def entries(n: int) -> jax.Array:
        own = [(c, others[n]) for c, _, others in found if n in others]
        return _total(own) if own else sharding.zeros_like(trees.widen(leaves[n]))

    return Blocks(
        [pair(place, layer) for place, layer in enumerate(model.layers)],
        {n: entries(n) for n in model.others},
        {n: entries(n) for n in model.beside},
    )


def _pair(layer: layers.Layer, found: list[tuple[jax.Array | None, Pair]]) -> Pair:
    """Combine the factors that terms have for a layer, each with its cₖ."""

    def with_bias(inputs: jax.Array) -> jax.Array:
        # A term that does not add the bias has inputs of 0 for it, not of 1.
        if layer.is_lookup:
            return inputs
        missing = (0, layer.rows - inputs.shape[-1])
        return jnp.pad(inputs, [(0, 0)] * (inputs.ndim - 2) + [missing] * 2)

    whole = _total([(c, jnp.ones(())) for c, _ in found])
    inputs = _total([(c, with_bias(pair.inputs)) for c, pair in found])
    units = _total([(c, pair.units) for c, pair in found])
    if found[0][0] is not None:
        # If all weights are 0, so is Ā.
        inputs = inputs / jnp.where(whole > 0, whole, 1).astype(inputs.dtype)
    # The dtypes differ if the layer's product is wider than its inputs.
    dtype = trees.widest(inputs.dtype, units.dtype)
    return Pair(inputs.astype(dtype), units.astype(dtype))


def _total(found: list[tuple[jax.Array | None, jax.Array]]) -> jax.Array:
    """Sum cₖ times an array; a cₖ of `None` is 1."""
    return _sum(*(x if c is None else c.astype(x.dtype) * x for c, x in found))


def _sum(*arrays: jax.Array) -> jax.Array:
    return sum(arrays[1:], arrays[0])


def _estimate(
    term: Term, params: Params, part: Part, *, key: jax.Array
) -> tuple[dict[int, Pair], dict[int, jax.Array]]:
    """Compute a term's factors, by layer of the sum, and the diagonals that it adds."""
    cases = sharding.alike(term.cases)
    leaves, structure = jax.tree.flatten(params)
    whole = jax.tree.leaves(sharding.gathered(params, cases))
    pairs, found = [], {}
    if part.places:
        pairs, found = factors(term, params, part.model, key=key)
    found = {n: x for n, x in found.items() if n in part.diagonals}
    others = {n: leaves[n] for n in part.diagonals if n not in found}
    if others:

        def of_others(others: dict[int, jax.Array], inputs: Tree) -> Tree:
            given = [others.get(n, leaf) for n, leaf in enumerate(whole)]
            return term.model_fn(structure.unflatten(given), inputs)

        # Only `others` are differentiated by, so no gradient of a kernel is formed for an
        # example. Weight decay is left out because the damping includes it.
        bare = term._replace(model_fn=of_others, weight_decay=0.0)
        count = diagonals.DRAWS if term.whole_batch else 1
        found |= diagonals.ggn_rademacher(
            alone(bare), others, term.cases, key=key, num_probes=count
        )
    return dict(zip(part.places, pairs, strict=True)), found
