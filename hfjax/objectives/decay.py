"""Weight decay, ½ Σ β θ²: one β for all parameters, or one for each part of their tree.

`weight_decay` is a tree prefix of the parameters: a single number, which is a prefix of
every tree, or a tree with one number for each leaf or subtree. A schedule may stand for
any of the numbers. Whatever depends on β is computed here, subtree by subtree.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding, trees
from hfjax._core.arguments import describe
from hfjax._core.types import Params, Tree


def check(weight_decay: Tree) -> None:
    """Raise unless every entry is a number of at least 0 or a schedule."""
    for path, beta in jax.tree_util.tree_leaves_with_path(weight_decay, is_leaf=_whole):
        where = f"weight_decay{jax.tree_util.keystr(path)}"
        options.check_range(where, beta, low=0.0)


def at(weight_decay: Tree, count: jax.Array | int) -> Tree:
    """Return the same with the values of schedules; itself if there are none."""
    leaves, structure = jax.tree.flatten(weight_decay, is_leaf=_whole)
    if not any(map(callable, leaves)):
        return weight_decay
    now = jnp.asarray(count)
    return structure.unflatten(
        [jnp.asarray(beta(now)) if callable(beta) else beta for beta in leaves]
    )


def decayed(weight_decay: Tree, v: Tree, tree: Tree) -> Tree:
    """Return `tree` + β v, in the dtypes of `tree`."""
    return _by_part(lambda beta, v, x: trees.axpy(beta, v, x), weight_decay, v, tree)


def half_square(weight_decay: Tree, params: Params) -> jax.Array | None:
    """Return ½ Σ β θ² in float32 or wider; `None` if it is known to be zero."""
    dtype, found = trees.scalar_dtype(params), []

    def add(beta: jax.Array, part: Tree, _: Tree) -> Tree:
        found.append(0.5 * beta.astype(dtype) * trees.dot(part, part).astype(dtype))
        return part

    _by_part(add, weight_decay, params, params)
    return sum(found[1:], found[0]) if found else None


def raised(weight_decay: Tree, diagonal: Tree, times: Any = None) -> Tree:
    """Return a diagonal + c β in its dtypes, where c is `times`; `None` is 1.

    `diagonal` is like the parameters. A scalar will do if β is one number.
    """

    def of_part(beta: jax.Array, part: Tree, _: Tree) -> Tree:
        def leaf(x: jax.Array) -> jax.Array:
            scaled = beta.astype(x.dtype)
            return x + (scaled if times is None else options.like(times, x) * scaled)

        return jax.tree.map(leaf, part)

    return _by_part(of_part, weight_decay, diagonal, diagonal)


def raised_by_all(
    decays: Iterable[tuple[Any, Tree]], damping: Tree, params: Params
) -> Tree:
    """Return λD + Σ c β for pairs (c, β); a scalar λ stays one if each β is one number.

    `damping` is λ or the diagonal of λD.
    """
    decays = list(decays)
    if not all(is_one_number(weight_decay) for _, weight_decay in decays):
        zeros = sharding.zeros_like(trees.widen(params))
        damping = jax.tree.broadcast(damping, params)
        damping = jax.tree.map(lambda x, d: x + d.astype(x.dtype), zeros, damping)
    for times, weight_decay in decays:
        damping = raised(weight_decay, damping, times)
    return damping


def is_one_number(weight_decay: Tree) -> bool:
    """Return whether β is the same for all parameters by construction."""
    return jax.tree_util.all_leaves([weight_decay], is_leaf=_whole)


def spread(weight_decay: Tree, params: Params) -> Tree:
    """Return β, which may be a schedule, for every leaf of the parameters."""
    leaves, structure = jax.tree.flatten(weight_decay, is_leaf=_whole)
    parts = _parts(structure, weight_decay, params)
    return structure.unflatten(
        [jax.tree.map(lambda _, b=b: b, x) for b, x in zip(leaves, parts, strict=True)]
    )


def _by_part(
    function: Callable[[jax.Array, Tree, Tree], Tree],
    weight_decay: Tree,
    v: Tree,
    tree: Tree,
) -> Tree:
    """Replace each subtree x of `tree` by function(β, its part of v, x).

    A part whose β is known to be zero stays as it is: 0 · ∞ would be NaN.
    """
    leaves, structure = jax.tree.flatten(weight_decay, is_leaf=_whole)
    pairs = zip(*(_parts(structure, weight_decay, x) for x in (v, tree)), strict=True)
    found = []
    for beta, (of_v, x) in zip(leaves, pairs, strict=True):
        if callable(beta):
            msg = (
                "`weight_decay` is a schedule: say when, as in "
                "`objective.at(state.count).value_and_grad(params, batch)`."
            )
            raise TypeError(msg)
        # A traced 0 may be something else in another call; only a plain one is known.
        zero = options.is_plain_number(beta) and beta == 0
        found.append(x if zero else function(jnp.asarray(beta), of_v, x))
    return structure.unflatten(found)


def _parts(structure: Any, weight_decay: Tree, params: Params) -> list[Tree]:
    """Return the parts of the parameters that the entries of β are for."""
    try:
        return structure.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as error:
        msg = (
            "`weight_decay` must be a number or a tree prefix of `params`, got "
            f"{describe(weight_decay)} for {describe(params)}. (A number for each leaf: "
            "`jax.tree.map(lambda p: 1e-4 * (p.ndim > 1), params)`.)"
        )
        raise ValueError(msg) from error


def _whole(x: Any) -> bool:
    # A schedule, though JAX also takes it for a tree: that of its arguments.
    return isinstance(x, jax.tree_util.Partial)
