"""Checks user-supplied arguments while the program is built: structures, shapes, dtypes.

Every error names the argument, says what was passed and what to do. Values are usually
traced, so numbers that are not finite are left to the update, which rejects such steps.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hfjax._core.types import Approximate, Matvec, Params, Tree

_SHOWN = 8
"""The most leaves of a tree that a message lists."""


class ShapeError(ValueError):
    """Shapes of outputs, targets or losses do not match the number of examples."""


def as_params(params: Params) -> Params:
    """Return parameters as a tree of arrays of real floats.

    Raises:
      TypeError: naming the first leaf that is masked or is anything else.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_hole):
        if _is_hole(leaf):
            msg = (
                f"params{jax.tree_util.keystr(path)} is masked, as `optax.masked` and "
                "`optax.partition` do, and `model_fn` needs it. Pass all parameters "
                "here; only `tx.update` takes a part of them, with "
                "`all_params=params`. (Or pass only what is trained, and let "
                "`model_fn` close over the rest: Flax has "
                "`hfjax.flax.nnx_model_fn(model, wrt)`, Equinox `eqx.partition`.)"
            )
            raise TypeError(msg)

    def leaf(path: tuple, x: Any) -> jax.Array:
        x = jnp.asarray(x) if isinstance(x, float | np.ndarray) else x
        if _is_real(x):
            return x
        cure = (
            "Pass real and imaginary parts as leaves of their own."
            if jnp.iscomplexobj(x)
            else "Pass only what is trained, and let `model_fn` close over the rest "
            "(Flax: `nnx.split(model, nnx.Param, ...)`)."
        )
        msg = (
            f"Every leaf of `params` must be an array of real floats, got {_kind(x)} "
            f"at params{jax.tree_util.keystr(path)}. {cure}"
        )
        raise TypeError(msg)

    return jax.tree_util.tree_map_with_path(leaf, params)


def missing(name: str) -> TypeError:
    """Return the error for an update without `"params"` or `"batch"`."""
    call = f"`{name}` is missing: call `tx.update(grads, state, params, batch=batch)`."
    # Wrappers that do not pass extra arguments on to `tx.update`, with what to do instead.
    droppers = (
        " These wrappers drop it: Flax's `TrainState` (take `hfjax.flax.TrainState`), "
        "`MultiSteps(...).gradient_transformation()` (take "
        "`Objective(microbatch_size=...)`), `optax.lookahead`, `optax.contrib.sam` and "
        "`optax.contrib.split_real_and_imaginary` (leave them out)."
    )
    return TypeError(call + droppers * (name == "batch"))


def check_gradient(grads: Any, params: Params) -> None:
    """Raise unless `grads` can be the gradient at `params`.

    Raises:
      TypeError: if a leaf is not an array of real floats.
      ValueError: if the structure or a shape differs from that of `params`.
    """
    cure = "Pass the gradient of the same parameters"
    # A tuple in place of another tree is likely what `jax.value_and_grad` returned.
    pair = isinstance(grads, tuple) and not isinstance(params, tuple)
    also = ", without the value that `value_and_grad` returns before it"
    check_like("grads", grads, params, cure + also * pair + ".")
    _check_real("grads", grads, "real floats")


def check_like(name: str, tree: Any, params: Params, cure: str) -> None:
    """Raise a `ValueError`, ending in `cure`, unless `tree` is shaped like `params`."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        msg = (
            f"`{name}` must be a tree like `params`, got {describe(tree)} for "
            f"{describe(params)}. {cure}"
        )
        raise ValueError(msg)
    expected = jax.tree_util.tree_leaves_with_path(params)
    for (path, ours), leaf in zip(expected, jax.tree.leaves(tree), strict=True):
        if jnp.shape(leaf) != ours.shape:
            where = f"{name}{jax.tree_util.keystr(path)}"
            msg = (
                f"`{name}` must have the shapes of `params`, got {where} of shape "
                f"{jnp.shape(leaf)} for {ours.shape}. {cure}"
            )
            raise ValueError(msg)


def as_vector(name: str, tree: Tree, *, like: Tree = None, whose: str = "") -> Tree:
    """Return a user-supplied vector as a tree of arrays of real floats.

    Numbers and NumPy arrays become arrays. Integers and booleans become floats, because a
    linear system of integers rarely has a solution in integers. If `like` is given, the
    vector must have its structure and shapes; `whose` is what the error calls it.

    Raises:
      TypeError: naming the first leaf that is anything else.
      ValueError: if `tree` does not match `like`.
    """
    if tree is None:
        msg = f"`{name}` must be an array of real floats, or a tree of them, got None."
        raise TypeError(msg)

    def leaf(path: tuple, x: Any) -> jax.Array:
        if isinstance(x, bool | int | float):
            return jnp.asarray(x, float)
        dtype = getattr(x, "dtype", np.dtype(object))
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.asarray(x)
        if jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_):
            return jnp.asarray(x).astype(float)
        is_complex = isinstance(x, complex) or jnp.issubdtype(
            dtype, jnp.complexfloating
        )
        cure = " Pass real and imaginary parts as leaves of their own." * is_complex
        msg = (
            f"`{name}` must be an array of real floats, or a tree of them, got "
            f"{_kind(x)} at {name}{jax.tree_util.keystr(path)}.{cure}"
        )
        raise TypeError(msg)

    tree = jax.tree_util.tree_map_with_path(leaf, tree)
    if like is not None:
        _check_alike(name, tree, like, whose)
    return tree


def as_product(name: str, product: Any, *, matrix: str = "A @ v") -> Matvec:
    """Return a user-supplied product `v -> A v` (or `Approximate`) that checks its results.

    `matrix` writes the product with the matrix that may have been passed by mistake.

    Raises:
      TypeError: if it is not callable.
    """
    if isinstance(product, Approximate):
        return Approximate(*(as_product(name, each) for each in product))
    if not callable(product):
        cure = (
            f"pass `lambda v: {matrix}`"
            if hasattr(product, "shape")
            else "call `build` of a rule to have its product"
            if hasattr(product, "build")
            else "a product with a matrix is a function of one vector"
        )
        msg = (
            f"`{name}` must be a function `v -> {matrix}`, got {describe(product)}: "
            f"{cure}."
        )
        raise TypeError(msg)

    # Only structures and dtypes are checked: it costs nothing in a compiled program.
    def checked(v: Tree) -> Tree:
        with noting_call(f"`{name}(v)`", v=v):
            found = product(v)
        return as_vector_of(name, found, v)

    return checked


def as_vector_of(name: str, found: Any, v: Tree) -> Tree:
    """Return the result of a user-supplied product, which must be like `v` except in dtype.

    Raises:
      TypeError: if a leaf is not an array of real floats.
      ValueError: if the structure or a shape differs from that of `v`.
    """
    whose = "the vector that it is given"
    _check_alike(f"{name}(v)", found, v, whose)
    found = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float) else x, found)
    _check_real(f"{name}(v)", found, f"real floats, as {whose}")
    return jax.tree.map(jnp.asarray, found)


def _check_real(name: str, tree: Tree, wanted: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _is_real(leaf):
            where = f"{name}{jax.tree_util.keystr(path)}"
            msg = f"`{name}` must be {wanted}, got {_kind(leaf)} at {where}."
            raise TypeError(msg)


def _check_alike(name: str, tree: Tree, like: Tree, whose: str) -> None:
    came, wanted = (
        (jax.tree.structure(x), [jnp.shape(leaf) for leaf in jax.tree.leaves(x)])
        for x in (tree, like)
    )
    if came != wanted:
        msg = (
            f"`{name}` must be a tree like {whose}, got {describe(tree)} for "
            f"{describe(like)}."
        )
        raise ValueError(msg)


def as_key(name: str, key: Any) -> jax.Array:
    """Return a typed key, made from an old-style pair of numbers if need be.

    Raises:
      TypeError: if `key` is neither.
    """
    dtype = getattr(key, "dtype", np.dtype(object))
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if dtype == jnp.uint32 and jnp.ndim(key) == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    msg = f"`{name}` must be one key, as `jax.random.key(0)`, got {describe(key)}."
    raise TypeError(msg)


def as_tangent(v: Tree, params: Params) -> Tree:
    """Return `v` of a user's curvature-vector product, checked to be like `params`."""
    return as_vector("v", v, like=params, whose="`params`")


def check_function(name: str, function: Any, call: str) -> None:
    """Raise a `TypeError` unless `function` is callable; `call` is its signature."""
    if not callable(function):
        msg = f"`{name}` must be a function `{call}`, got {describe(function)}."
        raise TypeError(msg)


def with_key(function: Callable[..., Any], key: jax.Array) -> Callable[..., Any]:
    """Bind `key` if the function has a parameter of that name without a default."""
    parameter = inspect.signature(function).parameters.get("key")
    if parameter is None or parameter.default is not inspect.Parameter.empty:
        return function
    return functools.partial(function, key=key)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function accepts an argument of this name."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # Functions that are not written in Python have no signature.
        return True
    kinds = [parameter.kind for parameter in parameters.values()]
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


@contextlib.contextmanager
def noting_call(call: str, **trees: Tree) -> Iterator[None]:
    """Note in errors of a user-supplied function what it was called with."""
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
    """Describe a tree: `dict(['b'] float32[2], ['w'] float32[3,2])`."""
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
