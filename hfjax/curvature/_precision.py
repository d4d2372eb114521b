"""Runs a model in lower precision, for `hfjax.curvature.with_precision`."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hfjax._core import trees
from hfjax._core.types import Matvec, Params, Tree
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import each

_DTYPES = ("bfloat16", "float32")
"""Not float16: its range is so narrow that small entries of v would become 0."""


class Rounding(NamedTuple):
    """How precision is reduced.

    Attributes:
      dtype: the dtype to run the model in; `None` for that of the parameters.
      dot_precision: how float32 is multiplied, for `jax.default_matmul_precision`;
        `None` leaves the setting unchanged.
    """

    dtype: str | None
    dot_precision: str | None

    def of(self, objective: Objective) -> Objective:
        """Return an objective whose model runs in `dtype`.

        Parameters and outputs keep their dtypes, and so does what is not floating. Sums
        over examples are in `dtype` within a layer, and wider outside of the model.
        """
        if self.dtype is None:
            return objective
        dtype = self.dtype

        def rounded(plain: Objective) -> Objective:
            def model_fn(params: Params, inputs: Tree) -> Tree:
                # Constants in the model keep their dtypes, and may now meet others.
                with jax.numpy_dtype_promotion("standard"):
                    outputs = plain.model_fn(_in(dtype, params), _in(dtype, inputs))
                return _in(trees.scalar_dtype(params), outputs)

            return dataclasses.replace(plain, model_fn=model_fn)

        return each(objective, rounded)

    def product(
        self,
        of: Callable[..., Matvec],
        objective: Objective,
        *args: Any,
        **options: Any,
    ) -> Matvec:
        """Build a curvature's product in this precision."""
        with self.dots():
            matvec = of(self.of(objective), *args, **options)

        def product(v: Tree) -> Tree:
            # A product that linearises microbatches runs the model, too.
            with self.dots():
                return matvec(v)

        return product

    def dots(self) -> contextlib.AbstractContextManager:
        """Return the context in which a product is to be traced."""
        if self.dot_precision is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.dot_precision)


def as_rounding(precision: str | DTypeLike | None) -> Rounding:
    """Read the name of a dtype or of a precision; raise if it is neither."""
    if precision is None:
        return Rounding(None, None)
    name = precision if isinstance(precision, str) else _name_of(precision)
    if name in _DTYPES:
        # "bfloat16" is a dtype here: as a dot precision of JAX it means TF32 on a GPU.
        # "float32" is both, because a GPU may otherwise multiply in TF32.
        return Rounding(name, name if name == "float32" else None)
    rounding = Rounding(None, name)
    try:
        with rounding.dots():
            return rounding
    except (TypeError, ValueError):
        msg = (
            'A precision must be "bfloat16", "float32", or what '
            '`jax.default_matmul_precision` takes, as "tensorfloat32"; got '
            f"{precision!r}."
        )
        raise ValueError(msg) from None


def _name_of(dtype: DTypeLike) -> str:
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return ""


def _in(dtype: DTypeLike, tree: Tree) -> Tree:
    """Cast floating leaves; labels and keys stay as they are."""

    def leaf(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)
