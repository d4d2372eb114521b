"""Models run in fewer digits; `hfjax.curvature` is the module to use."""

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
"""Not float16: what is small in v would be 0 there."""


class Rounding(NamedTuple):
    """How digits are lost.

    Attributes:
      dtype: what the model is run in, `None` is the parameters' own.
      dot_precision: of float32, for `jax.default_matmul_precision`, `None` is as it is.
    """

    dtype: str | None
    dot_precision: str | None

    def of(self, objective: Objective) -> Objective:
        """Return the objective of the model run in `dtype`.

        Parameters and outputs keep their dtypes, and so does what is not floating; sums
        over cases are those of `dtype` within a layer, and wide beyond.
        """
        if self.dtype is None:
            return objective
        dtype = self.dtype

        def rounded(plain: Objective) -> Objective:
            def model_fn(params: Params, inputs: Tree) -> Tree:
                # Its constants keep their dtypes, and may now meet others.
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
        """Build a curvature's product in these digits."""
        with self.dots():
            matvec = of(self.of(objective), *args, **options)

        def product(v: Tree) -> Tree:
            with self.dots():  # Where it linearises microbatches.
                return matvec(v)

        return product

    def dots(self) -> contextlib.AbstractContextManager:
        """Return the setting to trace a product in."""
        if self.dot_precision is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.dot_precision)


def as_rounding(precision: str | DTypeLike | None) -> Rounding:
    """Read the name of a dtype or of a dot precision.

    Args:
      precision: as the user gave it; `None` loses none.

    Returns:
      What it stands for.

    Raises:
      ValueError: if it is neither.
    """
    if precision is None:
        return Rounding(None, None)
    name = precision if isinstance(precision, str) else _name_of(precision)
    if name in _DTYPES:
        # float32 is float32 on a GPU, too; what JAX calls "bfloat16" there is TF32.
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
    """Cast what is floating; labels and keys stay."""

    def leaf(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)
