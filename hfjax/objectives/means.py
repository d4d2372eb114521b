"""Means over examples, accumulated over microbatches and summed over devices.

Numerators and denominators are summed separately and divided once, so padding, uneven
shards and a smaller last microbatch do not change the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import sharding, trees
from hfjax._core.types import Params, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax.objectives.cases import Cases, Microbatches, split

AxisName: TypeAlias = Any
"""Name of a mapped axis, or a tuple of names."""


class Means(NamedTuple):
    """How to take a mean over a batch.

    Attributes:
      microbatch_size: the most examples to compute with at once, or `None`.
      axis_name: the mapped axis that shards the examples, or `None`.
    """

    microbatch_size: int | None
    axis_name: AxisName

    def at_most(self, size: int) -> "Means":
        """Return the same with microbatches of at most `size` examples."""
        if self.microbatch_size is not None and self.microbatch_size <= size:
            return self
        return self._replace(microbatch_size=size)

    def parts(self, cases: Cases) -> Microbatches:
        """Split a batch into microbatches."""
        return split(cases, self.microbatch_size)

    def mean(self, sum_over_cases: Callable[[Cases], Tree], cases: Cases) -> Tree:
        """Compute Σᵢ wᵢ qᵢ / Σᵢ wᵢ, in float32 or wider; 0 if all weights are 0."""
        sums = self.accumulate(sum_over_cases, self.parts(cases))
        return self.divide(sums, cases.weights)

    def accumulate(
        self, sum_over_cases: Callable[[Cases], Tree], parts: Microbatches
    ) -> Tree:
        """Sum over this device's microbatches, in float32 or wider."""
        if parts.count == 1:
            return trees.widen(sum_over_cases(parts.cases))

        shapes = jax.eval_shape(lambda: sum_over_cases(parts.take(0)))
        # Under `shard_map` the carry of a loop must vary over devices as the terms do.
        zeros = self.local(trees.widen(sharding.zeros(shapes)))
        return trees.summed(
            lambda k: trees.widen(for_loops(sum_over_cases)(parts.take(k))),
            parts.count,
            zeros,
        )

    def divide(self, sums: Tree, weights: jax.Array) -> Tree:
        """Sum over all devices, and divide by the sum of their weights."""
        weight, sums = self.total(weights), self.over_devices(sums)
        return jax.tree.map(lambda x: x / weight.astype(x.dtype), sums)

    def total(self, weights: jax.Array) -> jax.Array:
        """Return the sum of all devices' weights; 1 if they are all 0."""
        weight = self.over_devices(jnp.sum(weights))
        return jnp.where(weight == 0, 1, weight)

    def gathered(self, rows: jax.Array) -> jax.Array:
        """Return the rows of all devices, in the order of the devices, on each of them."""
        if self.axis_name is None:
            return rows
        # This is a sum of rows padded with zeros, not an `all_gather`, because
        # `shard_map` knows that a sum is the same on all devices.
        count = jax.lax.axis_size(self.axis_name)
        whole = self.local(jnp.zeros((count, *rows.shape), rows.dtype))
        number = jax.lax.axis_index(self.axis_name)
        whole = jax.lax.dynamic_update_index_in_dim(whole, rows, number, 0)
        return self.over_devices(whole).reshape(-1, *rows.shape[1:])

    def share(self, rows: jax.Array) -> jax.Array:
        """Return this device's rows of what `gathered` has returned."""
        if self.axis_name is None:
            return rows
        count = jax.lax.axis_size(self.axis_name)
        own = rows.reshape(count, -1, *rows.shape[1:])
        return trees.row(own, jax.lax.axis_index(self.axis_name))

    def over_devices(self, sums: Tree) -> Tree:
        """Sum over the devices."""
        return sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)

    def first_case(self, cases: Cases) -> jax.Array | int:
        """Return the index of this device's first example among those of all devices."""
        if self.axis_name is None:
            return 0
        return jax.lax.axis_index(self.axis_name) * cases.weights.shape[0]

    def local(self, tree: Params) -> Params:
        """Mark replicated parameters as varying, before differentiating by them."""
        # Under `shard_map(check_vma=True)`, the transpose with respect to a replicated
        # value sums over the devices by itself. For a varying value it does not, and
        # `mean` takes that sum, once, just as without `check_vma`.
        if self.axis_name is None:
            return tree
        axis = self.axis_name
        return sharding.vary(tree, axis if isinstance(axis, tuple) else (axis,))
