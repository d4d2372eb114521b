"""Parts of the optimizer state: initial values, the record of a run, and checks."""

from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core.arguments import check_like
from hfjax._core.types import Params, Tree
from hfjax.solvers.descent import Reason, RunStats
from hfjax.update.state import HessianFreeInfo, HessianFreeState, Record

_INTEGERS = ("cg_iterations", "cg_reason", "chosen_iteration", "rejection")
"""The fields of `info` that are int32."""


def no_info(dtype: jax.typing.DTypeLike) -> HessianFreeInfo:
    """Return the `info` before the first update: zeros, and CG has not run."""
    kinds = dict.fromkeys(HessianFreeInfo._fields, dtype)
    kinds |= dict.fromkeys(_INTEGERS, jnp.int32) | {"accepted": bool}
    # Each field is an array of its own, since a donated state must not hold one twice.
    zeros = {name: jnp.zeros((), kind) for name, kind in kinds.items()}
    reason = jnp.array(int(Reason.RUNNING), jnp.int32)
    return HessianFreeInfo(**zeros | {"cg_reason": reason})


def record_of(
    stats: RunStats | None, max_iterations: int, dtype: jax.typing.DTypeLike
) -> Record | None:
    """Return the record of a run for the state; `None` if `max_iterations` is 0.

    `stats` is `None` before the first run.
    """
    if not max_iterations:
        return None
    # The structure must not depend on the run: `scan` and `cond` need states of one type.
    if stats is None or stats.coefficients is None:
        zeros = jnp.zeros(max_iterations + 1, dtype)
        return Record(zeros, jnp.zeros((max_iterations, 2), dtype))
    values = stats.model_values
    values = jnp.where(jnp.isfinite(values), values, 0)
    return Record(values.astype(dtype), stats.coefficients.astype(dtype))


def check_state(
    state: Any, params: Params, memory: Tree, scales: int, *, samples: bool
) -> None:
    """Raise an error unless `state` belongs to this optimizer and these parameters.

    `memory` has the shapes of what the preconditioner keeps, or is `None`; `scales` is the
    number of terms that are balanced, and `samples` says whether cases are drawn.
    """
    if not isinstance(state, HessianFreeState):
        msg = (
            "`state` must be a `HessianFreeState`, as `tx.init(params)` makes, got "
            f"{type(state).__name__}. (To restore one from a checkpoint, hand the "
            "checkpointer a template.)"
        )
        raise TypeError(msg)
    check_like("state.direction", state.direction, params, "Is it of other parameters?")
    came = jax.tree.map(jnp.shape, state.preconditioner)
    if came != jax.tree.map(jnp.shape, memory):
        msg = (
            "`state.preconditioner` is of another preconditioner, `decay` or "
            "`interval`: start from `tx.init(params)`."
        )
        raise ValueError(msg)
    if jax.tree.map(jnp.shape, state.scales) != ((scales,) if scales else None):
        msg = (
            "`state.scales` is of another objective, or of one with or without `balance`: "
            "start from `tx.init(params)`."
        )
        raise ValueError(msg)
    if (state.sample is not None) != samples:
        msg = "`state.sample` is of another `sampling`: start from `tx.init(params)`."
        raise ValueError(msg)
