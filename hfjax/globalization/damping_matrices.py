"""Damping matrices: D in A = B + λD, which measures changes of the parameters.

| matrix | D | the exact solution of A δ = −∇f is invariant to |
|---|---|---|
| `identity` | I (Tikhonov) | rotations |
| `diagonal` | (diag(B) + κs)^ξ | with κ = 0, ξ = 1: rescaling of f and of each parameter |
| `curvature` | B | any linear change of parameters; it is the undamped step / (1 + λ) |
| `reparameterization` | CᵀC, C = ∂φ/∂θ | φ: the step is C⁻¹ times that of φ(θ) |
| `custom` | user-supplied | |

D is never rescaled. If D = I, λ has the scale of the curvature of f, a mean over
examples. If D scales as B does, λ is a pure number, about 1 for a step that is half as
long. See Martens & Sutskever (2012), sections 8.1 to 8.3.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from hfjax._core import options, trees
from hfjax._core.arguments import as_product, as_tangent, check_like, with_key
from hfjax._core.types import Batch, Matvec, Number, Params, Tree
from hfjax._tracing.linearize import linearized
from hfjax.curvature import diagonals
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of

_FEW_OUTPUTS = 16
"""diag(B) is computed exactly up to this many outputs per example."""


class Matrix(NamedTuple):
    """D of one update.

    Attributes:
      matvec: v ↦ D v.
      diagonal: its diagonal, for the preconditioner: a tree like the parameters, or a
        scalar. `None` if D is a multiple of B, whose diagonal the preconditioner
        estimates.
    """

    matvec: Matvec
    diagonal: Tree | None


class DampingMatrix(NamedTuple):
    """How each update makes its D.

    Attributes:
      build: `(objective, params, batch, curvature, key) -> Matrix`, where `curvature` is
        v ↦ B v, and `key` a typed key, new in each update.
      of_diagonal: diag(G) ↦ the diagonal of D, if D is diagonal and made of nothing else;
        solvers that have the Jacobian need no `build` then.
    """

    build: Callable[..., Matrix]
    of_diagonal: Callable[[Tree], Tree] | None = None


Builder: TypeAlias = Callable[[Objective, Params, Batch], tuple[Matvec, Tree]]
"""`(objective, params, batch) -> (v -> D v, its diagonal)`."""


@functools.cache  # One object, so that `is` tells D = I from others.
def identity() -> DampingMatrix:
    """Damp with D = I: all parameters alike.

    Returns:
      The matrix.
    """
    return DampingMatrix(lambda *_: Matrix(lambda v: v, jnp.ones(())))


def curvature() -> DampingMatrix:
    """Damp with D = B: A = (1 + λ) B, and every step is shortened by 1 / (1 + λ).

    With structural damping, D = B + μS. This does not help if B is singular.

    Returns:
      The matrix.
    """
    return DampingMatrix(
        lambda objective, params, batch, curvature, key: Matrix(curvature, None)
    )


def diagonal(
    estimate: diagonals.Estimate | None = None,
    *,
    exponent: Number = 1.0,
    kappa: Number = 0.0,
    scale: Tree | None = None,
) -> DampingMatrix:
    """Damp with D = (diag(B) + κ s)^ξ, like the classical Levenberg-Marquardt method.

    B is without structural damping here.

    Args:
      estimate: `(objective, params, batch) -> d`, an estimate of diag(B): a function of
        `hfjax.diagonals`, with or without `key`, or a user-supplied one. `None` is
        diag(G), exactly for up to 16 outputs per example, else from one random sign per
        output. The diagonal of the Fisher matrix scales as f², so steps would depend on
        f's unit.
      exponent: ξ in [0, 1]; 1 gives the diagonal itself, 0 the identity.
      kappa: κ ≥ 0, which moves D towards the identity.
      scale: s, a tree like the parameters; `None` is 1 everywhere.

    Returns:
      The matrix.

    Raises:
      ValueError: if an option is out of range.

    References:
      Martens & Sutskever (2012), sections 8.3, 11.2 and 13 (κ about 1e-2 of the mean
      entry).
    """
    options.check_range("exponent", exponent, low=0.0, high=1.0)
    options.check_range("kappa", kappa, low=0.0)

    def entries_of(d: Tree) -> Tree:
        return trees.interpolate(d, exponent=exponent, kappa=kappa, scale=scale)

    def build(
        objective: Objective, params: Params, batch: Batch, _: Matvec, key: jax.Array
    ) -> Matrix:
        chosen = estimate
        # The exact diagonal costs a gradient per column of S, mostly one per output.
        if chosen is None:
            terms = terms_of(objective, batch)
            most = max(len(term.columns(params)) for term in terms)
            few = most <= _FEW_OUTPUTS
            chosen = diagonals.ggn_exact if few else diagonals.ggn_rademacher
        d = with_key(chosen, key)(objective, params, batch)
        entries = entries_of(d)

        def matvec(v: Tree) -> Tree:
            return jax.tree.map(lambda d, x: (d * x).astype(x.dtype), entries, v)

        return Matrix(matvec, entries)

    return DampingMatrix(build, entries_of if estimate is None else None)


def reparameterization(original: Callable[[Params], Tree]) -> DampingMatrix:
    """Damp with D = CᵀC, C = ∂φ/∂θ: penalise changes of the parameters φ(θ).

    If θ stands for weights w = φ(θ) of roughly uniform scale, as w = exp(θ), this damps
    w: the exact step is C⁻¹ times the Tikhonov-damped one of w.

    Args:
      original: φ, `params -> w`, differentiable; w may be any tree. It is linearised once
        in each update.

    Returns:
      The matrix. Its diagonal, for the preconditioner, is estimated with random signs;
      this is exact if φ acts entry by entry.

    Raises:
      TypeError: if `original` is not callable.

    Example:
      >>> matrix = reparameterization(lambda p: jnp.exp(p))
      >>> p = jnp.log(jnp.array([2.0, 3.0]))
      >>> d, diagonal = matrix.build(None, p, None, None, jax.random.key(0))
      >>> print(d(jnp.ones(2)).round(3), diagonal.round(3))  # CᵀC = diag(w²)
      [4. 9.] [4. 9.]
    """
    if not callable(original):
        msg = f"`original` must be a function of the parameters, got {original!r}."
        raise TypeError(msg)

    def build(
        objective: Objective, params: Params, batch: Batch, _: Matvec, key: jax.Array
    ) -> Matrix:
        del objective, batch
        # diag(CᵀC) = E[(Cᵀs)²] for random signs s.
        weights, tangent, transpose = linearized(original, params)
        signs = optax.tree.random_like(key, weights, jax.random.rademacher)

        def matvec(v: Tree) -> Tree:
            # C is a derivative at θ, so it takes and returns the dtypes of θ.
            v = as_tangent(v, params)
            product = transpose(tangent(trees.cast_like(v, params)))
            return trees.cast_like(product, v)

        return Matrix(matvec, jax.tree.map(jnp.square, transpose(signs)))

    return DampingMatrix(build)


def custom(build: Builder) -> DampingMatrix:
    """Damp with a user-supplied D, symmetric and positive semi-definite.

    Args:
      build: `(objective, params, batch) -> (v -> D v, its diagonal)`, called once in each
        update; v is in float32 or wider. The diagonal, for the preconditioner, is a tree
        like the parameters, or a scalar; an estimate will do.

    Returns:
      The matrix.

    Raises:
      TypeError: if `build` is not callable; in the update, if it does not return a pair,
        or if D v is not a vector.
    """
    if not callable(build):
        msg = (
            "`matrix` must be a name, a `DampingMatrix` or a callable (objective, "
            f"params, batch) -> (matvec, diagonal), got {type(build).__name__}."
        )
        raise TypeError(msg)

    def checked(objective: Objective, params: Params, batch: Batch, *_: Any) -> Matrix:
        pair = build(objective, params, batch)
        if not isinstance(pair, tuple) or len(pair) != 2 or not callable(pair[0]):
            msg = (
                "A damping matrix must be built as (matvec, diagonal), got "
                f"{type(pair).__name__}."
            )
            raise TypeError(msg)
        matvec, diagonal = pair
        diagonal = jax.tree.map(jnp.asarray, diagonal)
        if jax.tree.structure(diagonal) != jax.tree.structure(0) or diagonal.ndim > 0:
            cure = "Hand one number where all entries are alike."
            check_like("diagonal", diagonal, params, cure)
        return Matrix(as_product("matrix", matvec, matrix="D @ v"), diagonal)

    return DampingMatrix(checked)
