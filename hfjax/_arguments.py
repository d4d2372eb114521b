"""What users hand in, looked at while the program is built: structures, shapes, dtypes.

Every error names the argument, says what came and what to do. Numbers are traced, and
judged by the update itself (`_trial`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hfjax._types import Params, Tree

_SHOWN = 8
"""Leaves of a tree that a message lists."""


def as_params(params: Params) -> Params:
    """Return parameters as arrays, which must be real floats.

    Args:
      params: arrays, NumPy's too, or Python floats.

    Returns:
      The same tree, of arrays.

    Raises:
      TypeError: naming the first leaf that is something else, or is masked.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_hole):
        if _is_hole(leaf):
            msg = (
                f"params{jax.tree_util.keystr(path)} is masked, as `optax.masked` and "
                "`optax.partition` do, and `model_fn` needs it. Hand only what is "
                "trained, and let `model_fn` close over the rest (Flax: "
                "`hfjax.flax.nnx_model_fn(model, wrt)`; Equinox: `eqx.partition`)."
            )
            raise TypeError(msg)

    def leaf(path: tuple, x: Any) -> jax.Array:
        x = jnp.asarray(x) if isinstance(x, float | np.ndarray) else x
        if _is_real(x):
            return x
        cure = (
            "Hand real and imaginary parts as leaves of their own."
            if jnp.iscomplexobj(x)
            else "Hand only what is trained, and let `model_fn` close over the rest "
            "(Flax: `nnx.split(model, nnx.Param, ...)`)."
        )
        msg = (
            f"Every leaf of `params` must be an array of real floats, got {_kind(x)} "
            f"at params{jax.tree_util.keystr(path)}. {cure}"
        )
        raise TypeError(msg)

    return jax.tree_util.tree_map_with_path(leaf, params)


def missing(name: str) -> TypeError:
    """Return the error for an update without one of its arguments.

    Args:
      name: `"params"` or `"batch"`.
    """
    call = f"`{name}` is missing: call `tx.update(grads, state, params, batch=batch)`."
    droppers = (
        " These wrappers drop it: Flax's `TrainState` (take `hfjax.flax.TrainState`), "
        "`MultiSteps(...).gradient_transformation()` (take "
        "`Objective(microbatch_size=...)`), `optax.lookahead`, `optax.contrib.sam` and "
        "`optax.contrib.split_real_and_imaginary` (leave them out)."
    )
    return TypeError(call + droppers * (name == "batch"))


def check_gradient(grads: Any, params: Params) -> None:
    """Raise unless `grads` can be the gradient at `params`.

    Args:
      grads: what came.
      params: arrays.

    Raises:
      TypeError: if a leaf is no array of real floats.
      ValueError: if structure or shapes are others than those of `params`.
    """
    cure = "Hand the gradient of the same parameters"
    pair = isinstance(grads, tuple) and not isinstance(params, tuple)
    also = ", without the value that `value_and_grad` returns before it"
    check_like("grads", grads, params, cure + also * pair + ".")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if not _is_real(leaf):
            where = f"grads{jax.tree_util.keystr(path)}"
            msg = f"`grads` must be real floats, got {_kind(leaf)} at {where}."
            raise TypeError(msg)


def check_like(name: str, tree: Any, params: Params, cure: str) -> None:
    """Raise unless `tree` has the structure and shapes of `params`.

    Args:
      name: of the argument, for the error.
      tree: what came.
      params: arrays.
      cure: what to do.

    Raises:
      ValueError: saying where they first differ.
    """
    if jax.tree.structure(tree) != jax.tree.structure(params):
        msg = (
            f"`{name}` must be a tree like `params`, got {describe(tree)} for "
            f"{describe(params)}. {cure}"
        )
        raise ValueError(msg)
    theirs = jax.tree.leaves(tree)
    for (path, ours), leaf in zip(
        jax.tree_util.tree_leaves_with_path(params), theirs, strict=True
    ):
        if jnp.shape(leaf) != ours.shape:
            where = f"{name}{jax.tree_util.keystr(path)}"
            msg = (
                f"`{name}` must have the shapes of `params`, got {where} of shape "
                f"{jnp.shape(leaf)} for {ours.shape}. {cure}"
            )
            raise ValueError(msg)


@contextlib.contextmanager
def noting_call(call: str, **trees: Tree) -> Iterator[None]:
    """Note in an error of a user's function what it was called with.

    The error stays what it is; a note is added.

    Args:
      call: the function and its arguments, in words.
      **trees: the arguments.
    """
    try:
        yield
    except Exception as error:
        came = ", ".join(f"{name} {describe(tree)}" for name, tree in trees.items())
        params: Any = trees.get("params")
        vector = _is_real(params) and jnp.ndim(params) == 1
        flat = " If `optax.flatten` made one vector of `params`, leave it out."
        error.add_note(f"hfjax called {call} with {came}.{flat * vector}")
        raise


def describe(tree: Tree) -> str:
    """Return a few words for a tree: dtypes and shapes of its first leaves.

    Args:
      tree: of anything.

    Returns:
      As in `dict(['b'] float32[2], ['w'] float32[3,2])`.
    """
    if jax.tree_util.all_leaves([tree]):
        return _kind(tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    words = [
        f"{jax.tree_util.keystr(path)} {_kind(leaf)}" for path, leaf in leaves[:_SHOWN]
    ]
    more = [f"… of {len(leaves)} leaves"] if len(leaves) > _SHOWN else []
    return f"{type(tree).__name__}({', '.join(words + more)})"


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_real(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def _kind(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    return f"{x.dtype}[{','.join(map(str, jnp.shape(x)))}]"
