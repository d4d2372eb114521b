"""What a preconditioner hands from one update to the next: kept, or averaged."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax.objectives.objective import Objective
from hfjax.objectives.terms import decay_of

_Kept = TypeVar("_Kept", bound=Tree)


def with_memory(build: Callable[..., tuple[Preconditioner, Tree]]) -> Callable:
    """Make a rule's `build` of one that always has a memory.

    Args:
      build: `(objective, params, batch, damping, key, memory, count) -> (r -> P⁻¹ r,
        memory)`, whose `damping` has the weight decay in it.

    Returns:
      `build` as a rule has it: without a memory it returns none.
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
        decay = decay_of(objective.weight_decay)
        if decay is not None:
            damping = jax.tree.map(lambda d: d + decay.astype(d.dtype), damping)
        product, kept = build(
            objective, params, batch, damping, key, memory or {}, count
        )
        return product if memory is None else (product, kept)

    return built


def every(
    interval: int, count: jax.Array | int, build: Callable[[_Kept], _Kept], kept: _Kept
) -> _Kept:
    """Build in every `interval`-th update; keep what there is in those between.

    Args:
      interval: updates from one build to the next.
      count: updates so far; the first builds.
      build: `kept -> kept`, which is not computed where nothing is built.
      kept: what was built last, a tree of the same shapes and dtypes.

    Returns:
      What there is now.
    """
    built = jax.lax.cond(
        count % interval == 0, for_loops(build), lambda kept: kept, kept
    )
    assert built is not None
    return built


def averaged(old: Tree, new: Tree, decay: Number, builds: jax.Array | int) -> Tree:
    """Average over builds: min(ε, 1 − 1/k) of what there was before the k-th.

    A matrix that is not finite is left out: it would stay for ever.

    Args:
      old: the average so far.
      new: of this build.
      decay: ε.
      builds: k − 1, those before.

    Returns:
      The average now; that of the first build is the build.

    References:
      Martens & Grosse (2015), section 5.
    """
    number = jnp.asarray(builds + 1, float)
    kept = jnp.minimum(jnp.asarray(decay, number.dtype), 1 - 1 / number)

    def leaf(old: jax.Array, new: jax.Array) -> jax.Array:
        share = kept.astype(old.dtype)
        mixed = share * old + (1 - share) * new
        return jnp.where(jnp.all(jnp.isfinite(new)), mixed, old)

    return jax.tree.map(leaf, old, new)
