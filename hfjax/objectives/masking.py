"""Parameters of which a wrapper hides some: `optax.partition` and `optax.masked`.

Optax puts an `optax.MaskedNode`, an empty tree, in place of what it hides. Then f is a
function of the visible leaves alone: the model is given the hidden ones beside them, at
the values that they have. Everything else in an update sees a tree of visible leaves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core.arguments import describe
from hfjax._core.types import Params, Tree
from hfjax.objectives import decay
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import each


class Hidden(NamedTuple):
    """Stands for a hidden leaf or subtree within an update; an empty tree.

    Everywhere else a `MaskedNode` is refused, because the model would meet it.
    """


def ours(tree: Tree) -> Tree:
    """Return a tree with `Hidden` in place of `optax.MaskedNode`."""
    return _replaced(tree, optax.MaskedNode, Hidden())


def theirs(tree: Tree) -> Tree:
    """Undo `ours`."""
    return _replaced(tree, Hidden, optax.MaskedNode())


def _replaced(tree: Tree, kind: type, instead: Any) -> Tree:
    def is_one(x: Any) -> bool:
        return isinstance(x, kind)

    return jax.tree.map(lambda x: instead if is_one(x) else x, tree, is_leaf=is_one)


def hidden_of(params: Params, all_params: Params | None) -> Tree | None:
    """Return what is hidden in `params`, with `Hidden` for the rest; `None` if nothing is.

    Raises:
      TypeError: if something is hidden and `all_params` is missing or masked as well.
      ValueError: if `all_params` is not the tree that `params` is part of.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_hidden)
    places = [path for path, leaf in leaves if _is_hidden(leaf)]
    if not places:
        return None
    # `mask_compatible_extra_args` of the wrapper would mask this argument, too.
    masked = jax.tree.leaves(ours(all_params), is_leaf=_is_hidden)
    if all_params is None or any(map(_is_hidden, masked)):
        came = "is missing" if all_params is None else "is masked as well"
        msg = (
            f"params{jax.tree_util.keystr(places[0])} is masked, as `optax.masked` and "
            f"`optax.partition` do, and `all_params` {came}: call `tx.update(grads, "
            "state, params, batch=batch, all_params=params)`. The wrapper hands it on, "
            "and what is masked is held fixed. (Or pass only what is trained, and let "
            "`model_fn` close over the rest.)"
        )
        raise TypeError(msg)

    def hidden(x: Any, whole: Tree) -> Tree:
        if _is_hidden(x):
            return whole
        if jnp.shape(whole) != x.shape:
            raise ValueError(whole)
        return Hidden()

    try:
        return _map(hidden, params, all_params)
    except (ValueError, TypeError) as error:
        msg = (
            "`all_params` must be the parameters that `params` is part of, got "
            f"{describe(all_params)} for {describe(params)}."
        )
        raise ValueError(msg) from error


def of_visible(objective: Objective, params: Params, hidden: Tree) -> Objective:
    """Return f as a function of the visible leaves; the hidden ones are constants.

    The weight decay of what is hidden, a constant too, is left out.
    """

    def change(f: Objective) -> Objective:
        def model_fn(visible: Params, inputs: Tree) -> Tree:
            return f.model_fn(_filled(visible, hidden), inputs)

        own = f.weight_decay
        if not decay.is_one_number(own):
            own = decay.spread(own, _filled(params, hidden))
            own = _map(lambda x, beta: x if _is_hidden(x) else beta, params, own)
        return dataclasses.replace(f, model_fn=model_fn, weight_decay=own)

    return each(objective, change)


def _filled(visible: Params, hidden: Tree) -> Params:
    return _map(lambda x, whole: whole if _is_hidden(x) else x, visible, hidden)


def _map(function: Callable[[Any, Tree], Tree], params: Params, tree: Tree) -> Tree:
    return jax.tree.map(function, params, tree, is_leaf=_is_hidden)


def _is_hidden(x: Any) -> bool:
    return isinstance(x, Hidden)
