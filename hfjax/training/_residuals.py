"""Residuals as an objective: f(θ) = ½ Σᵢ s² ρ((rᵢ(θ)/s)²).

All residuals together are the outputs of a single example, as nothing says which data
they belong to. ρ bends the square of large residuals, so that outliers count for less:

| loss | ρ(u) |
|---|---|
| linear | u |
| soft_l1 | 2 (√(1 + u) − 1) |
| huber | u if u ≤ 1, else 2√u − 1 |
| cauchy | log(1 + u) |
| arctan | arctan u |

The second derivative of ½ s² ρ((z/s)²) by z is ρ′ + 2uρ″ with u = (z/s)². It is negative
for outliers, and is raised to a tenth of ρ′, so that G is positive semi-definite.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax import losses
from hfjax._core import trees
from hfjax._core.arguments import describe, noting_call
from hfjax._core.types import Batch, Params, Tree
from hfjax.losses.loss import LinearMap, by_leaf
from hfjax.objectives.plain import Objective
from hfjax.objectives.terms import Term

Args = tuple[Any, ...]
"""What follows the parameters in a call of `residual_fn`."""

_LEAST = 0.1
"""The least curvature of an outlier, as a share of ρ′."""


class Residuals(Objective):
    """f(θ) of a function `(params, *args) -> residuals`; `batch(params, args)` is its batch.

    `mode` says how the Jacobian is computed: `"auto"`, `"forward"` or `"reverse"`.
    """

    def __init__(
        self,
        residual_fn: Callable[..., Tree],
        *,
        loss: str = "linear",
        scale: float = 1.0,
        mode: str = "auto",
    ) -> None:
        def model_fn(params: Params, inputs: Tree) -> jax.Array:
            own = jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), inputs)
            with noting_call("`residual_fn(params, *args)`", params=params, args=own):
                residuals = residual_fn(params, *own)
            return _as_vector(residuals)[None]

        super().__init__(model_fn, robust(loss, scale))
        vars(self).update(mode=mode)

    def batch(self, params: Params, args: Args) -> Batch:
        """Return the batch of `args`: one example, whose targets are zeros."""
        inputs = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
        shape = jax.eval_shape(self.model_fn, params, inputs)
        return inputs, jnp.zeros(shape.shape, shape.dtype)

    def _terms(self, batch: Batch, name: str = "batch") -> tuple[Term, ...]:
        terms = super()._terms(batch, name)
        return tuple(term._replace(mode=vars(self)["mode"]) for term in terms)


def _as_vector(residuals: Tree) -> jax.Array:
    """Return all residuals as one vector, in the widest of their dtypes."""
    leaves = jax.tree_util.tree_leaves_with_path(residuals)
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", type(leaf))
        if not (dtype is float or _is_floating(dtype)):
            where = f"residuals{jax.tree_util.keystr(path)}"
            msg = (
                "`residual_fn` must return an array of real floats, or a tree of them, "
                f"got {describe(leaf)} at {where}."
            )
            if hasattr(leaf, "dtype") and jnp.iscomplexobj(leaf):
                msg += " Return the real and the imaginary parts, as two leaves."
            raise TypeError(msg)
    flat = [jnp.asarray(leaf).reshape(-1) for _, leaf in leaves]
    if not sum(leaf.size for leaf in flat):
        msg = f"`residual_fn` returned no residuals: {describe(residuals)}."
        raise ValueError(msg)
    dtype = trees.widest(*(leaf.dtype for leaf in flat))
    return jnp.concatenate([leaf.astype(dtype) for leaf in flat])


def _is_floating(dtype: Any) -> bool:
    return not isinstance(dtype, type) and jnp.issubdtype(dtype, jnp.floating)


def _soft_l1(u: jax.Array) -> jax.Array:
    # 2 (√(1 + u) − 1) would cancel for small u.
    return 2 * u / (jnp.sqrt(1 + u) + 1)


def _huber(u: jax.Array) -> jax.Array:
    # The square root has no derivative at 0, where it is not used.
    return jnp.where(u > 1, 2 * jnp.sqrt(jnp.where(u > 1, u, 1)) - 1, u)


RHO: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda u: u,
    "soft_l1": _soft_l1,
    "huber": _huber,
    "cauchy": jnp.log1p,
    "arctan": jnp.arctan,
}
"""ρ of the losses, by name."""


def robust(name: str, scale: float) -> losses.Loss:
    """Build the loss ½ s² ρ((z/s)²) with s = `scale`, for targets of 0."""
    if name == "linear":
        return losses.squared_error()
    rho = RHO[name]
    first = _derivative(rho)
    second = _derivative(first)

    def square(z: jax.Array) -> jax.Array:
        return jnp.square(z / jnp.asarray(scale, z.dtype))

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.asarray(0.5 * scale**2, z.dtype) * rho(square(z - t))

    def curvature(z: jax.Array, t: jax.Array) -> jax.Array:
        u = square(z - t)
        return jnp.maximum(first(u) + 2 * u * second(u), _LEAST * first(u))

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        curved = curvature(z, t)
        return lambda v: curved * v

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        root = jnp.sqrt(curvature(z, t))
        return lambda v: root * v

    return by_leaf(value, hessian, factor, lambda z: z)


def _derivative(
    function: Callable[[jax.Array], jax.Array],
) -> Callable[[jax.Array], jax.Array]:
    return lambda u: jax.jvp(function, (u,), (jnp.ones_like(u),))[1]
