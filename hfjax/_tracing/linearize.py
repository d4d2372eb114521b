"""Linearise a function at one point: v ↦ J v, u ↦ Jᵀu, and v ↦ H v for a gradient.

A `jax.custom_vjp` defines only a backward rule, so that JAX can compute Jᵀu but not
J v. Since u ↦ Jᵀu is linear, J v is its transpose: reverse mode over reverse mode,
provided that the backward rule is itself differentiable. `linearized` falls back to
this by itself, while the program is traced; everything but the products is still
evaluated only once.
"""

import contextlib
import functools
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
"""Note added to an error if J v does not exist."""

NO_SECOND = (
    "Second derivatives are needed here, and a derivative rule in the model or the loss "
    "cannot be differentiated. Use `curvature=hfjax.curvature.finite_difference_hessian`, "
    "and if the rule is the loss's, also "
    "`preconditioner=hfjax.preconditioners.diagonal()`. Or write the rule as a "
    "`jax.custom_jvp`, or the loss as an `hfjax.losses.Loss` with a `hessian` and a "
    "`factor` of its own."
)
"""Note added to an error if H v does not exist."""

NO_REVERSE = (
    "Training needs reverse-mode derivatives of the model and the loss (∇f, and Jᵀu in "
    "each curvature-vector product), and these have forward mode only. Write a loop with "
    "a bounded number of rounds as `jax.lax.scan`, or as `fori_loop` with Python integers "
    "as bounds; write a fixed point as `jax.lax.custom_root`; or give the function a "
    "`jax.custom_vjp`. With Diffrax, use `adjoint=diffrax.DirectAdjoint()`."
)
"""Note added to an error if Jᵀu does not exist."""


class Linearized(NamedTuple):
    """A function linearised at one point.

    Attributes:
      outputs: its value there.
      tangent: v ↦ J v.
      transpose: u ↦ Jᵀu.
    """

    outputs: Tree
    tangent: Callable[[Tree], Tree]
    transpose: Callable[[Tree], Tree]


def linearized(forward: Callable[[Tree], Tree], at: Tree) -> Linearized:
    """Linearise a function of one tree of real floats, by its backward rules if need be.

    The two maps do not evaluate the function again. If J v does not exist, an error is
    raised only when `tangent` is called, since not every solver needs it.
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
            # `transpose` is linear, so any u would do as the point of linearisation. Work
            # that depends only on the residuals is done here, not in each product.
            back = jax.linearize(transpose, zeros)[1]
            return back, jax.linear_transpose(back, zeros)

    def forwards(v: Tree) -> Tree:
        with _noting(NO_FORWARD):
            return push(v)[0]

    try:
        back, push = transposed()
    except Exception:
        # A user's rule may raise anything. It is raised again when J v is requested.
        return Linearized(outputs, lambda v: transposed()[1](v)[0], transpose)
    # If a backward rule contains another `custom_vjp`, `back` cannot be evaluated either,
    # but its transpose `push` can.
    nested = _backward_only(back, zeros)
    return Linearized(outputs, forwards, transpose if nested else back)


def derivative_of_gradient(gradient: Callable[[Tree], Tree], at: Tree) -> Matvec:
    """Linearise a gradient: return v ↦ H v.

    `gradient` maps a tree to one of the same structure, perhaps of wider dtypes; so
    does H.
    """
    try:
        with noting_no_reverse():
            value, tangent = jax.linearize(gradient, at)
    except Exception as error:
        if not noted(error) and is_traceable(gradient, at):
            error.add_note(NO_SECOND)
        raise
    if not _backward_only(tangent, at):
        return tangent
    # H is symmetric, so its transpose will do where it cannot be applied itself.
    pull = jax.linear_transpose(tangent, at)

    def product(v: Tree) -> Tree:
        with _noting(NO_SECOND):
            return trees.cast_like(pull(trees.cast_like(v, value))[0], value)

    return product


def is_traceable(function: Callable[..., Tree], *args: Tree) -> bool:
    """Return whether a function can be traced; if not, its derivative is not at fault."""
    try:
        jax.eval_shape(function, *args)
    except Exception:  # A user's function may raise anything.
        return False
    return True


def has_tangent(function: Callable[[Tree], Tree], at: Tree) -> bool:
    """Return whether J v exists, and not only Jᵀu."""

    def tangent(v: Tree) -> Tree:
        return jax.jvp(function, (at,), (v,))[1]

    try:
        return not _backward_only(tangent, at)
    except Exception:  # A user's function may raise anything.
        return False


def noted(error: BaseException) -> str | None:
    """Return the note of this module that was added to an error, if any."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note in _NOTES), None)


_NOTES = (NO_FORWARD, NO_SECOND, NO_REVERSE)


@contextlib.contextmanager
def _noting(note: str, words: str = "") -> Iterator[None]:
    """Add a note to errors whose message contains some words."""
    try:
        yield
    except Exception as error:
        if words in str(error) and not noted(error):
            error.add_note(note)
        raise


# JAX has no error class for this, only a message.
noting_no_reverse = functools.partial(_noting, NO_REVERSE, "everse-mode")
"""Add a note to errors of JAX that say that reverse mode does not exist."""


def _backward_only(tangent: Callable[[Tree], Tree], at: Tree) -> bool:
    """Return whether a linear map can be transposed but not evaluated."""
    # JAX raises no error for this until the map is lowered, so look for its primitive.
    return programs.contains(jax.make_jaxpr(tangent)(at), "custom_lin")
