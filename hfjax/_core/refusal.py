"""Makes results without a derivative say so, in forward and in reverse mode.

A solver that stops early is not a smooth function of its arguments. Without this, JAX
would return the derivative of its iterations in forward mode, which is a different
number, and complain about a `while_loop` in reverse mode. A derivative that is unused, as
behind `jax.lax.stop_gradient`, is accepted under `jax.jit` and in reverse mode.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hfjax._core.types import Tree

_CURE = (
    "Differentiate `hfjax.cg.inverse(matvec)(b)` instead, which is linear in `b` and "
    "differentiable in all that `matvec` closes over; if no derivative is meant, pass "
    "`jax.lax.stop_gradient` of the arguments."
)


def without_derivative(what: str, tree: Tree) -> Tree:
    """Return a result unchanged; differentiating it raises a `TypeError`.

    Args:
      what: the result, as the subject of the error.
      tree: the result; only its arrays of floats matter.
    """

    @jax.custom_jvp
    def same(leaf: jax.Array) -> jax.Array:
        return leaf

    @same.defjvp
    def refuse(
        primals: tuple[jax.Array], tangents: tuple[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return primals[0], _refused.bind(tangents[0], what=what)

    # One call per leaf: a leaf without a tangent is then not asked for its derivative.
    return jax.tree.map(lambda leaf: same(leaf) if _is_floating(leaf) else leaf, tree)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _raise(*unused: Any, what: str) -> Any:
    del unused
    msg = (
        f"{what} has no derivative: it stops early, so it is not a smooth function of its "
        f"arguments. {_CURE}"
    )
    raise TypeError(msg)


def _batch(tangents: tuple, axes: tuple, *, what: str) -> tuple:
    return _refused.bind(*tangents, what=what), axes[0]


_refused = Primitive("hfjax_without_derivative")
"""The identity on tangents that must not be used: raises if it is run or transposed."""

_refused.def_impl(_raise)
_refused.def_abstract_eval(lambda tangent, what: tangent)
# Compiling the tangent raises, as does transposing it; a dead one is removed before.
mlir.register_lowering(_refused, _raise)
ad.deflinear2(_refused, _raise)
batching.primitive_batchers[_refused] = _batch
