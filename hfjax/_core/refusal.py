"""Results that have no derivative say so, in forward and in reverse mode.

A run that stops early is no smooth function of what it is given. JAX would hand out the
derivative of its iterations in forward mode, which is another number, and speak of a
`while_loop` in reverse mode. What is dead, as behind `jax.lax.stop_gradient`, is refused
by nobody under `jax.jit` or in reverse mode.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hfjax._core.types import Tree

_CURE = (
    "Differentiate `hfjax.cg.inverse(matvec)(b)` in its place, which is linear in `b` and "
    "differentiable in all that `matvec` closes over; where no derivative is meant, hand in "
    "`jax.lax.stop_gradient` of the arguments."
)


def without_derivative(what: str, tree: Tree) -> Tree:
    """Return a result unchanged; whoever differentiates it is told that it has none.

    Args:
      what: the result, as the subject of the error.
      tree: of arrays; what is no array of floats is no matter.

    Returns:
      The same.
    """

    @jax.custom_jvp
    def same(leaf: jax.Array) -> jax.Array:
        return leaf

    @same.defjvp
    def refuse(
        primals: tuple[jax.Array], tangents: tuple[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return primals[0], _refused.bind(tangents[0], what=what)

    # Leaf by leaf: what does not depend on anything differentiated is not asked then.
    return jax.tree.map(lambda leaf: same(leaf) if _is_floating(leaf) else leaf, tree)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)


def _raise(what: str) -> None:
    msg = (
        f"{what} has no derivative: it stops early, and is no smooth function of what it "
        f"is given. {_CURE}"
    )
    raise TypeError(msg)


_refused = Primitive("hfjax_without_derivative")
"""The identity on tangents that nobody may use: raises where it is run or transposed."""


@_refused.def_impl
def _run(tangent: jax.Array, *, what: str) -> None:
    del tangent
    _raise(what)


@_refused.def_abstract_eval
def _shape(tangent: Any, *, what: str) -> Any:
    del what
    return tangent


def _lower(context: Any, tangent: Any, *, what: str) -> Any:
    del context, tangent
    _raise(what)


def _transpose(cotangent: Any, tangent: Any, *, what: str) -> None:
    del cotangent, tangent
    _raise(what)


def _batch(tangents: tuple, axes: tuple, *, what: str) -> tuple:
    return _refused.bind(*tangents, what=what), axes[0]


mlir.register_lowering(_refused, _lower)
ad.deflinear2(_refused, _transpose)
batching.primitive_batchers[_refused] = _batch
