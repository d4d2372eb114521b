"""The examples that an update computes its curvature from, by a rule for sampling."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, sharding
from hfjax._core.types import Batch, Params, Tree
from hfjax.curvature.forms import quadratic_form
from hfjax.objectives.cases import as_cases, split
from hfjax.objectives.means import Means
from hfjax.objectives.objective import Objective
from hfjax.update.sampling import Sampling
from hfjax.update.state import Sample

_MOST_PARTS = 16
"""A batch is divided into so many parts at most, of which the curvature gets some."""
_FEWEST_PARTS = 4
"""A smaller batch is not divided: loops over parts would cost what they save."""
_KEPT = 0.7
"""Weight of the agreements so far, in the mean of all."""


class Drawn(NamedTuple):
    """The examples of an update.

    Attributes:
      objective: f, in microbatches some of which may be left out.
      batch: the examples for the curvature, where the others have weight 0.
      fresh: as many others, or those that are left; `None` if all of the batch is taken,
        whatever the state says.
      before: which examples those are.
      fresh_weight: the sum of their weights.
      taken: the number of microbatches.
      count: of all that have weight.
      enough: the number of examples on which steps can be compared; `None` for no limit.
    """

    objective: Objective
    batch: Batch
    fresh: Batch | None = None
    before: Sample | None = None
    fresh_weight: jax.Array | float = 0.0
    taken: jax.Array | None = None
    count: jax.Array | None = None
    enough: int | None = None

    def compared(self, cases: int | None) -> int | None:
        """Return on how many examples to compare steps, given what their rule says."""
        return (
            cases if cases is None or self.enough is None else min(cases, self.enough)
        )

    def is_part(self) -> jax.Array:
        """Return whether the curvature is of a part of the cases."""
        if self.taken is None or self.count is None:
            return jnp.zeros((), bool)
        return self.taken < self.count

    def after(
        self, rule: Sampling | None, params: Params, step: Tree, curved: jax.Array
    ) -> Sample | None:
        """Return which examples to take in the next update.

        Args:
          rule: the one that drew these.
          params: θ.
          step: δ, a tree like the parameters.
          curved: δᵀBδ on the examples of this update.
        """
        if rule is None or self.fresh is None or self.before is None:
            return self.before
        assert self.taken is not None
        assert self.count is not None
        _, turn, mean = self.before
        fresh = quadratic_form(self.objective, params, self.fresh, step)
        fresh = jnp.where(self.fresh_weight > 0, fresh, 0).astype(mean.dtype)
        agreement = curved.astype(mean.dtype) / jnp.where(fresh > 0, fresh, 1)
        known = (fresh > 0) & jnp.isfinite(agreement)
        agreement = jnp.maximum(agreement, 0)
        # −1 says that nothing is known about so many examples.
        new = jnp.where(mean >= 0, _KEPT * mean + (1 - _KEPT) * agreement, agreement)
        new = jnp.where(known, new, mean)
        grows = known & (new < options.like(rule.agreement, new))
        share = self.taken.astype(mean.dtype) / self.count.astype(mean.dtype)
        return Sample(
            share=jnp.where(grows, jnp.minimum(2 * share, 1), share),
            turn=(turn + self.taken) % self.count,
            agreement=jnp.where(grows, -1, new),
        )


def drawn(
    rule: Sampling | None,
    objective: Objective,
    params: Params,
    batch: Batch,
    sample: Sample | None,
) -> Drawn:
    """Draw the examples of an update; `sample` is that of the state."""
    if rule is None or sample is None or not is_divisible(objective):
        return Drawn(objective, batch, before=sample)
    cases = as_cases(batch)
    total = cases.weights.shape[0]
    parts = _MOST_PARTS
    while parts * rule.smallest > total:
        parts //= 2
    work = total * sum(leaf.size for leaf in jax.tree.leaves(params))
    if parts < _FEWEST_PARTS or work < rule.least_work:
        return Drawn(objective, batch, before=sample)
    # Each device has equally many examples of every part.
    share = math.gcd(
        total, max(sharding.automatic(cases), sharding.shards_of_cases(cases))
    )
    size = -(-total // (parts * share)) * share
    if objective.microbatch_size is None:
        objective = dataclasses.replace(
            objective, microbatch_size=size, linearize_once=True
        )
    else:  # It may be smaller, and then some microbatches make a part.
        size = min(size, objective.microbatch_size)
        objective = dataclasses.replace(objective, microbatch_size=size)
    microbatches, means = split(cases, size), Means(size, objective.axis_name)
    order, count = means.in_use(microbatches)
    count = jnp.maximum(count, 1)
    least = (count + parts - 1) // parts
    given = sample.share.astype(jnp.float32) * count.astype(jnp.float32)
    taken = jnp.clip(jnp.round(given).astype(jnp.int32), least, count)
    # Those without weight come last, wherever they are in the batch.
    numbers = jnp.argsort(order).astype(jnp.int32)[microbatches.numbers()]
    places = (numbers - sample.turn) % count

    def only(these: jax.Array) -> jax.Array:
        these = these.reshape(-1, *[1] * (cases.weights.ndim - 1))
        return jnp.where(these, cases.weights, 0)

    fresh = only((places >= taken) & (places < 2 * taken))
    return Drawn(
        objective,
        (cases.inputs, cases.targets, only(places < taken)),
        (cases.inputs, cases.targets, fresh),
        sample,
        means.over_devices(jnp.sum(fresh)),
        taken,
        count,
        2 * rule.smallest,
    )


def first_sample(rule: Sampling | None, dtype: Any) -> Sample | None:
    """Return the sample of the first update: as few examples as the rule allows."""
    if rule is None:
        return None
    nothing = jnp.full((), -1, dtype)
    return Sample(jnp.zeros((), dtype), jnp.zeros((), jnp.int32), nothing)


def is_divisible(objective: Objective) -> bool:
    """Return whether f is a mean over examples: no sum, and no loss of a whole batch."""
    return not getattr(objective, "parts", None) and not objective.whole_batch
