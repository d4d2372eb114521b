"""What a preconditioner keeps from one update to the next: unchanged, or averaged."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import with_decays


def with_memory(build: Callable[..., tuple[Preconditioner, Tree]]) -> Callable:
    """Turn a `build` that always has a memory into one for `PreconditionerRule`.

    The given one is `(objective, params, batch, damping, key, memory, count) -> (r ->
    P⁻¹ r, memory)`, and its `damping` includes the weight decay. The result also works
    without a memory, and then returns only the product.
    """

    def built(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
        memory: dict[str, tuple] | None = None,
        count: jax.Array | int = 0,
    ) -> Any:
        # Factors and sketches are those of G alone: add the weight decay to λD.
        damping = with_decays(terms_of(objective, batch), damping, params)
        product, kept = build(
            objective, params, batch, damping, key, memory or {}, count
        )
        return product if memory is None else (product, kept)

    return built


def every(
    interval: int, count: jax.Array | int, build: Callable[[Tree], Tree], kept: Tree
) -> Tree:
    """Build in the first and every `interval`-th update; otherwise return `kept`.

    `kept` is what was built last, and `build` maps it to a tree of the same shapes and
    dtypes. `count` is the number of updates so far.
    """
    # `cond` runs one branch only, so updates in between do not pay for a build.
    is_due = count % interval == 0
    return jax.lax.cond(is_due, for_loops(build), lambda kept: kept, kept)


def averaged(old: Tree, new: Tree, decay: Number, builds: jax.Array | int) -> Tree:
    """Average over builds: the k-th keeps min(ε, 1 − 1/k) of the average so far.

    ε is `decay` and k − 1 is `builds`, the number of builds before this one. So the
    average of the first build is the build itself.

    References:
      Martens & Grosse (2015), section 5.
    """
    number = jnp.asarray(builds + 1, float)
    kept = jnp.minimum(jnp.asarray(decay, number.dtype), 1 - 1 / number)

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        share = kept.astype(old.dtype)
        mixed = share * old + (1 - share) * new
        # A matrix that is not finite would spoil the average for good: leave it out.
        return jnp.where(jnp.all(jnp.isfinite(new)), mixed, old)

    return jax.tree.map(leaf, old, new)
