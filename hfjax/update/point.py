"""What an update starts from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.types import Batch, Params, Tree
from hfjax.globalization.rule import Damping
from hfjax.objectives.balance import next_scales
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import terms_of
from hfjax.objectives.terms import value_on_part
from hfjax.update.state import HessianFreeState


class Point(NamedTuple):
    """What an update starts from.

    Attributes:
      objective: f, with its schedules evaluated at `count`.
      params: θ.
      gradient: ∇f.
      batch: the curvature data.
      eval_batch: the evaluation data.
      scalar: λ, or the radius of the trust region.
      count: number of updates so far.
      key: random key of this update, for the preconditioner and the damping matrix.
      memory: what the preconditioner keeps between updates, or `None`.
      scales: of the weights of a balanced sum, which f has, or `None`.
    """

    objective: Objective
    params: Params
    gradient: Params
    batch: Batch
    eval_batch: Batch
    scalar: jax.Array
    count: jax.Array
    key: jax.Array
    memory: Tree = None
    scales: jax.Array | None = None

    def value(self, data: Batch) -> jax.Array:
        """Return f(θ) on `data`."""
        return self.objective.value(self.params, data).astype(self.scalar.dtype)

    def value_on_part(self, some: Batch, cases: int) -> jax.Array:
        """Return f(θ) on `some`, what `subsample` returns for the evaluation data."""
        whole = terms_of(self.objective, self.eval_batch)
        part = terms_of(self.objective, some)
        return value_on_part(whole, part, self.params, cases).astype(self.scalar.dtype)

    def next_scales(self) -> jax.Array | None:
        """Return the scales in the next update, by the terms at θ."""
        if self.scales is None:
            return None
        scales = jnp.asarray(self.scales, self.scalar.dtype)
        return next_scales(self.objective, scales, self.params, self.eval_batch)


def starting_point(
    objective: Objective,
    damping: Damping,
    seed: int,
    *,
    grads: Params,
    state: HessianFreeState,
    params: Params,
    batch: Batch,
    eval_batch: Batch | None,
) -> Point:
    """Collect what the update starts from."""
    dtype = trees.scalar_dtype(params)
    scalar = damping.current(jnp.asarray(state.damping, dtype), state.count)
    return Point(
        objective=objective.at(state.count, state.scales),
        params=params,
        gradient=grads,
        batch=batch,
        eval_batch=batch if eval_batch is None else eval_batch,
        scalar=scalar.astype(dtype),
        count=state.count,
        key=key_of(seed, state.count),
        memory=state.preconditioner,
        scales=state.scales,
    )


def rounding_noise(value: jax.Array) -> jax.Array:
    """Return how much of f(θ) may be rounding: 10 ε |f|, or the least normal float."""
    # A mean over n examples, summed pairwise, is off by about ε log₂(n)/2: 10 is ample.
    limits = jnp.finfo(value.dtype)
    return jnp.maximum(10 * limits.eps * jnp.abs(value), limits.tiny)


def key_of(seed: int, count: jax.Array) -> jax.Array:
    """Return the typed key from which update number `count` draws all random numbers."""
    # The two numbers are the key. `fold_in` would compile one more program, for nothing.
    data = [jnp.uint32(seed % 2**32), count.astype(jnp.uint32)]
    return jax.random.wrap_key_data(jnp.stack(data), impl="threefry2x32")
