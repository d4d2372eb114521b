"""Functions made linear at one place: J v, Jᵀu, and H v of a gradient.

A `jax.custom_vjp` has a backward rule alone: JAX then knows u ↦ Jᵀu, and no J v. But
that map is linear, and J v is its transpose: reverse mode over reverse mode, wherever
the backward rule can be differentiated in the cotangent that it is given. `linearized`
does this by itself. It is decided while the program is traced, and all that is computed
besides the products is computed once, outside of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from hfjax._core import sharding, trees
from hfjax._core.types import Matvec, Tree
from hfjax._tracing import programs

NO_FORWARD = (
    "A curvature-vector product needs J v, the derivative of the model along v. A "
    "`jax.custom_vjp` has no forward derivative, and the backward rule of this one "
    "cannot be differentiated either. Use `solver=hfjax.sample_space.cholesky()`, which "
    "needs reverse mode only, or `curvature=hfjax.curvature.finite_difference_hessian`. "
    "Or give the function a forward derivative: write a `jax.custom_jvp`; with Diffrax, "
    "use `adjoint=diffrax.DirectAdjoint()`."
)
"""What is noted in an error where there is no J v."""

NO_SECOND = (
    "Second derivatives are needed here, and a derivative rule in the model or the loss "
    "cannot be differentiated. Use `curvature=hfjax.curvature.finite_difference_hessian`, "
    "and if the rule is the loss's, also "
    "`preconditioner=hfjax.preconditioners.diagonal()`. Or write the rule as a "
    "`jax.custom_jvp`, or the loss as an `hfjax.losses.Loss` with a `hessian` and a "
    "`factor` of its own."
)
"""What is noted in an error where there is no H v."""

NO_REVERSE = (
    "Training needs reverse-mode derivatives of the model and the loss (∇f, and Jᵀu in "
    "each curvature-vector product), and these have forward mode only. Write a loop with "
    "a bounded number of rounds as `jax.lax.scan`, or as `fori_loop` with Python integers "
    "as bounds; write a fixed point as `jax.lax.custom_root`; or give the function a "
    "`jax.custom_vjp`. With Diffrax, use `adjoint=diffrax.DirectAdjoint()`."
)
"""What is noted in an error where there is no Jᵀu."""


class Linearized(NamedTuple):
    """A function at one place.

    Attributes:
      outputs: its value.
      tangent: v ↦ J v.
      transpose: u ↦ Jᵀu.
    """

    outputs: Tree
    tangent: Callable[[Tree], Tree]
    transpose: Callable[[Tree], Tree]


def linearized(forward: Callable[[Tree], Tree], at: Tree) -> Linearized:
    """Linearise a function, if need be by its backward rules alone.

    Args:
      forward: of one tree of real floats.
      at: where.

    Returns:
      The value and the two maps, which run the function no more. Where there is no J v,
      asking for it is the error: not everybody does.
    """
    outputs, tangent = jax.linearize(forward, at)
    pull = jax.linear_transpose(tangent, at)

    def transpose(u: Tree) -> Tree:
        with noting_no_reverse():
            return pull(u)[0]

    if not _backward_only(tangent, at):
        return Linearized(outputs, tangent, transpose)
    zeros = sharding.zeros_like(outputs)

    def transposed() -> tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        with _noting(NO_FORWARD):
            # At u = 0. The map is linear, and what it computes of the residuals alone is
            # computed here.
            back = jax.linearize(transpose, zeros)[1]
            return back, jax.linear_transpose(back, zeros)

    def forwards(v: Tree) -> Tree:
        with _noting(NO_FORWARD):
            return push(v)[0]

    try:
        back, push = transposed()
    except (
        Exception
    ):  # Whatever a rule raises. It is raised again where J v is asked for.
        return Linearized(outputs, lambda v: transposed()[1](v)[0], transpose)
    # Within a backward rule another `custom_vjp` may stand: `back` then has no forward
    # derivative in turn, but its own transpose all the same.
    nested = _backward_only(back, zeros)
    return Linearized(outputs, forwards, transpose if nested else back)


def derivative_of_gradient(gradient: Callable[[Tree], Tree], at: Tree) -> Matvec:
    """Linearise a gradient: v ↦ H v, with H symmetric, so that its transpose will do.

    Args:
      gradient: `at` to a tree like it, perhaps of wider dtypes.
      at: where.

    Returns:
      The product: trees like `at` to trees like the gradient.
    """
    try:
        with noting_no_reverse():
            value, tangent = jax.linearize(gradient, at)
    except Exception as error:
        if not noted(error) and _has_shapes(gradient, at):
            error.add_note(NO_SECOND)
        raise
    if not _backward_only(tangent, at):
        return tangent
    pull = jax.linear_transpose(tangent, at)

    def product(v: Tree) -> Tree:
        with _noting(NO_SECOND):
            return trees.cast_like(pull(trees.cast_like(v, value))[0], value)

    return product


def _has_shapes(function: Callable[[Tree], Tree], at: Tree) -> bool:
    """Return whether a function can be traced: else its derivative is not at fault."""
    try:
        jax.eval_shape(function, at)
    except Exception:  # Whatever a user's function raises.
        return False
    return True


@contextlib.contextmanager
def noting_no_reverse() -> Iterator[None]:
    """Note in an error that reverse mode is needed, if that is what JAX says it is."""
    try:
        yield
    except Exception as error:
        if "everse-mode" in str(error) and not noted(error):
            error.add_note(NO_REVERSE)
        raise


def noted(error: BaseException) -> str | None:
    """Return the note of this module that an error has, if any."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note in _NOTES), None)


_NOTES = (NO_FORWARD, NO_SECOND, NO_REVERSE)


@contextlib.contextmanager
def _noting(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not noted(error):
            error.add_note(note)
        raise


def _backward_only(tangent: Callable[[Tree], Tree], at: Tree) -> bool:
    """Return whether a linear map can be transposed, but not be applied.

    Evaluating it would show this only when it is compiled: as a program it is fine.
    """
    return programs.contains(jax.make_jaxpr(tangent)(at), "custom_lin")
