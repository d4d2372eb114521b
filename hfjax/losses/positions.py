"""Losses with a weight for each position of an example: a token, a pixel, an output.

The targets of such a loss are pairs (targets, weights), with weights of shape `[cases,
positions…]`. Its value for an example is Σₚ wₚ Lₚ, so that the position's part of L″ is
multiplied by wₚ, and its part of S by √wₚ.

A position of weight 0 counts for nothing, whatever the model returns for it: its outputs
are replaced by 0 before the loss sees them, and what the loss makes of them by 0
afterwards. So NaN there reaches neither values nor derivatives. Only a loss that compares
examples reads what it can read there, and gets 0 for NaN and infinity alone.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import ShapeError
from hfjax._core.types import Tree

_Values: TypeAlias = Callable[[Tree, Tree], Tree]
_Pair: TypeAlias = tuple[Tree, jax.Array]
_Build: TypeAlias = Callable[[Tree, Any], Callable[[Tree], Tree]]
_Scale: TypeAlias = Callable[[jax.Array], jax.Array]


def weighted_values(values: _Values) -> Callable[[Tree, _Pair], jax.Array]:
    """Build `(outputs, (targets, weights)) -> wₚ Lₚ`, with the shape of the weights.

    `values` returns arrays that start with the axes of the weights; their further axes are
    summed, and so are several arrays.
    """

    @functools.wraps(values)
    def weighted(outputs: Tree, pair: _Pair) -> jax.Array:
        targets, weights = pair
        found = jax.tree.leaves(values(counted(outputs, weights), targets))
        _check(found, weights)
        dtype = trees.widest(jnp.float32, *(leaf.dtype for leaf in found))
        axes = weights.ndim
        sums = [
            jnp.sum(leaf.astype(dtype), axis=range(axes, leaf.ndim)) for leaf in found
        ]
        return _times(weights, functools.reduce(jnp.add, sums))

    return weighted


def whole_batch_values(
    fn: Callable[[Tree, Tree], jax.Array], *, is_weighted: bool
) -> Callable[[Tree, _Pair], jax.Array]:
    """Build `(outputs, (targets, weights)) -> Σᵢ wᵢ Lᵢ`, of a batch that is one example.

    All leaves have a leading axis of length 1, which `fn` does not see. It may compare the
    examples of the batch with one another, so outputs of those of weight 0 reach it if
    they are finite. It returns Lᵢ, or unless `is_weighted` their mean.
    """

    @functools.wraps(fn)
    def summed(outputs: Tree, pair: _Pair) -> jax.Array:
        outputs, (targets, weights) = jax.tree.map(
            lambda x: jax.lax.squeeze(x, (0,)), (outputs, pair)
        )
        outputs = counted(outputs, weights, finite_stay=True)
        values = jnp.asarray(fn(outputs, targets))
        is_mean = values.ndim == 0 and not is_weighted
        if not is_mean and values.shape[: weights.ndim] != weights.shape:
            shape = list(weights.shape)
            wanted = (
                f"weights of shape {shape} need values of such a shape, before any mean"
                if is_weighted
                else f"return one value for each case, of shape {shape}, or their mean"
            )
            msg = (
                "The loss of a whole batch has values of shape "
                f"{list(values.shape)}: {wanted}."
            )
            raise ShapeError(msg)
        values = values.astype(trees.wide(values.dtype))
        if is_mean:
            return values[None]
        values = jnp.sum(values, axis=range(weights.ndim, values.ndim))
        return jnp.sum(_times(weights, values))[None]

    return summed


def weighted_map(values: _Values, build: _Build, scale: _Scale) -> _Build:
    """Build `(outputs, (targets, weights)) -> (v -> scale(wₚ) times build's product)`.

    This is for a loss whose values, as in `weighted_values`, depend on the outputs at
    their position alone. `build` is `(outputs, targets) -> (v -> L″ v)`, or S v.
    """

    def weighted(outputs: Tree, pair: _Pair) -> Callable[[Tree], Tree]:
        targets, weights = pair
        _check(jax.tree.leaves(jax.eval_shape(values, outputs, targets)), weights)
        product = build(counted(outputs, weights), targets)
        times = functools.partial(_times, scale(weights))
        return lambda v: jax.tree.map(times, product(v))

    return weighted


def counted(
    tree: Tree, weights: jax.Array, *, finite_stay: bool = False, fill: int = 0
) -> Tree:
    """Replace what stands at positions of weight 0; or only NaN and infinities there.

    Integers become 0, a label that every loss takes, and floats `fill`.
    An entry that is not laid out by position belongs to several: it is replaced if all of
    them have weight 0. Random keys stay.
    """

    def leaf(x: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(x.dtype, jnp.inexact)
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        if is_key or (finite_stay and not is_float):
            return x
        empty = weights == 0
        while x.shape[: empty.ndim] != empty.shape:
            empty = jnp.all(empty, axis=-1)
        empty = _like(empty, x)
        if finite_stay:
            empty &= ~jnp.isfinite(x)
        if x.dtype == jnp.bool_:
            return x & ~empty
        # Labels may have the dtype of another precision mode, in which no 0 can be made.
        return jnp.where(empty, fill if is_float else x - x, x)

    return jax.tree.map(leaf, tree)


def _times(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Multiply by the weights, where 0 · NaN is 0."""
    along = _like(weights, x)
    return jnp.where(along == 0, jnp.zeros((), x.dtype), along.astype(x.dtype) * x)


def _like(weights: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.expand_dims(weights, range(weights.ndim, x.ndim))


def _check(found: list[Any], weights: jax.Array) -> None:
    """Raise unless the values of a loss start with the axes of the weights."""
    for leaf in found:
        if leaf.shape[: weights.ndim] == weights.shape:
            continue
        given, have = (list(x.shape[1:]) for x in (weights, leaf))
        msg = (
            f"The weights of the batch have shape {given} a case, but the loss has values "
            f"of shape {have} a case: they must start alike. Give one weight to each of "
            "these values, or one to each case."
        )
        raise ShapeError(msg)
