"""Preconditioners: positive definite P ≈ A whose inverse is cheap.

    P = (d + λ diag(D) + κ s)^ξ        (report, section 11.2)

with `d` the diagonal of a curvature matrix. Damping is inside the power: P stands for
the damped matrix, which is what conjugate gradients work on.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, diagonals
from hfjax._types import Batch, Number, Params, Preconditioner, Tree
from hfjax.objective import Objective


class PreconditionerRule(NamedTuple):
    """How each update makes its preconditioner.

    Attributes:
      build: `(objective, params, batch, damping, key) -> (r -> P⁻¹ r)`, with
        `damping` the diagonal of λD: the scalar λ where D = I, else a tree like the
        parameters, or 0 where D = B, as P's scale does not matter. With structural
        damping `objective` has its distance in its loss.
      needs_key: whether `build` draws random numbers; `key` is `None` if not.
      data: that `build` is given as its batch: the update's `"batch"`, as the
        curvature, or its `"eval_batch"`.
    """

    build: Callable[..., Preconditioner]
    needs_key: bool = False
    data: str = "batch"


def diagonal(
    estimate: diagonals.Estimate = diagonals.empirical_fisher,
    *,
    exponent: Number = 0.75,
    kappa: Number = 0.0,
    scale: Tree | None = None,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by P = (d + λ diag(D) + κ s)^ξ, a diagonal matrix.

    Args:
      estimate: `(objective, params, batch) -> d`, a function of `hfjax.diagonals` or
        the caller's; weight decay counts in d. One that takes a `key` is given a new
        one in each update: `functools.partial(diagonals.ggn_rademacher,
        num_probes=4)`. (The Fisher's: Martens 2010, 4.7.)
      exponent: ξ in [0, 1]; 0.75 (Martens 2010, section 4.7), 1 is the diagonal
        itself, 0 the identity.
      kappa: κ ≥ 0, where λ is weak or absent (report, section 11.2; 0 in Martens'
        program).
      scale: s, a tree like the parameters of the coarse relative scale of their
        curvature; `None` is 1 everywhere.
      data: that d is estimated on: `"batch"`, the curvature data (report, section
        11.2: P is to stand for A), or `"eval_batch"` (Martens' program: all training
        data).

    Returns:
      The rule.

    Raises:
      ValueError: if an option is out of range.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))  # d = 2.5
      >>> rule = diagonal(exponent=0.5)
      >>> precondition = rule.build(f, jnp.zeros(1), batch, jnp.float32(1.5), None)
      >>> print(precondition(jnp.array([6.0])))  # 6 / √(2.5 + 1.5)
      [3.]
    """
    _options.check_range("exponent", exponent, low=0.0, high=1.0)
    _options.check_range("kappa", kappa, low=0.0)
    _options.check_choice("data", data, ("batch", "eval_batch"))

    random = diagonals.needs_key(estimate)

    def build(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array | None,
    ) -> Preconditioner:
        options = {"key": key} if random else {}
        entries = _within_range(estimate(objective, params, batch, **options))
        powers = diagonals.interpolate(
            _plus(entries, damping), exponent=exponent, kappa=kappa, scale=scale
        )
        # Where nothing is known of a parameter's curvature (all zero), leave it be.
        powers = jax.tree.map(lambda p: jnp.where(p > 0, p, 1), powers)
        return lambda r: jax.tree.map(
            lambda r, p: (r.astype(p.dtype) / p).astype(r.dtype), r, powers
        )

    return PreconditionerRule(build, needs_key=random, data=data)


def custom(
    build: Callable[..., Preconditioner], *, needs_key: bool = False
) -> PreconditionerRule:
    """Precondition by the caller's own P.

    Args:
      build: `(objective, params, batch, damping) -> (r -> P⁻¹ r)`, called once in
        each update, with arguments as in `PreconditionerRule`; P must be symmetric
        positive definite. With `needs_key` it takes a fifth argument, a typed key,
        new in each update.
      needs_key: whether `build` draws random numbers; the state then holds a key,
        made from `hessian_free`'s `seed`.

    Returns:
      The rule.

    Raises:
      TypeError: if `build` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = custom(lambda objective, params, batch, damping: lambda r: r / damping)
      >>> print(rule.build(None, None, None, 2.0, None)(jnp.array([6.0])))
      [3.]
    """
    if not callable(build):
        msg = f"`build` must be callable, got {type(build).__name__}."
        raise TypeError(msg)
    if needs_key:
        return PreconditionerRule(build, needs_key=True)

    def without_key(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: None,
    ) -> Preconditioner:
        del key
        return build(objective, params, batch, damping)

    return PreconditionerRule(without_key)


def _within_range(entries: Tree) -> Tree:
    """Put the largest float for infinity: squares of gradients overflow before these."""
    return jax.tree.map(lambda d: jnp.minimum(d, jnp.finfo(d.dtype).max), entries)


def _plus(entries: Tree, damping: Tree) -> Tree:
    """Add a scalar, or a tree like `entries`, in the dtypes of `entries`."""
    if getattr(damping, "ndim", None) == 0:
        return jax.tree.map(lambda d: d + damping.astype(d.dtype), entries)
    return jax.tree.map(lambda d, x: d + x.astype(d.dtype), entries, damping)
