"""Means over examples, accumulated over microbatches and summed over devices.

Numerators and denominators are summed separately and divided once, so padding, uneven
shards and a smaller last microbatch do not change the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import sharding, sums, trees
from hfjax._core.types import Params, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax.objectives.cases import Cases, Microbatches, in_use, split

AxisName: TypeAlias = Any
"""Name of a mapped axis, or a tuple of names."""


class Means(NamedTuple):
    """How to take a mean over a batch.

    Attributes:
      microbatch_size: the most examples to compute with at once, or `None`.
      axis_name: the mapped axis that shards the examples, or `None`.
      skips: whether microbatches are passed over if all of their weights are 0. They
        then cost nothing.
    """

    microbatch_size: int | None
    axis_name: AxisName
    skips: bool = False

    def at_most(self, size: int) -> "Means":
        """Return the same with microbatches of at most `size` examples."""
        if self.microbatch_size is not None and self.microbatch_size <= size:
            return self
        return self._replace(microbatch_size=size)

    def parts(self, cases: Cases) -> Microbatches:
        """Split a batch into microbatches."""
        return split(cases, self.microbatch_size)

    def mean(
        self,
        sum_over_cases: Callable[[Cases], Tree],
        cases: Cases,
        *,
        reversible: bool = False,
    ) -> Tree:
        """Compute Σᵢ wᵢ qᵢ / Σᵢ wᵢ, in float32 or wider; 0 if all weights are 0.

        `reversible` says whether it may be differentiated in reverse mode.
        """
        parts = self.parts(cases)
        if parts.count == 1:
            total = trees.widen(sum_over_cases(parts.cases))
        else:
            total = self.summed(
                lambda k: for_loops(sum_over_cases)(parts.take(k)),
                parts,
                reversible=reversible,
            )
        return self.divide(total, cases.weights)

    def summed(
        self,
        of_number: Callable[[jax.Array], Tree],
        parts: Microbatches,
        *,
        reversible: bool = False,
    ) -> Tree:
        """Sum over the numbers of this device's microbatches, in float32 or wider."""
        shapes = jax.eval_shape(of_number, jnp.zeros((), jnp.int32))
        # Under `shard_map` the carry of a loop must vary over devices as the terms do.
        zeros = self.local(trees.widen(sharding.zeros(shapes)))

        def term(k: jax.Array) -> Tree:
            return trees.widen(of_number(k))

        if not self.skips:
            return sums.summed(term, parts.count, zeros)
        order, used = self.in_use(parts)
        if not reversible:
            return sums.summed(lambda k: term(order[k]), parts.count, zeros, used)

        def if_used(k: jax.Array) -> Tree:
            # Both branches must vary over the devices alike.
            def own() -> Tree:
                return self.local(term(order[k]))

            return jax.lax.cond(k < used, own, lambda: zeros)

        return sums.summed(if_used, parts.count, zeros)

    def in_use(self, parts: Microbatches) -> tuple[jax.Array, jax.Array]:
        """Return the numbers of microbatches, those with weight first, and how many.

        They are the same on all devices, which may have to exchange something in each.
        """
        counts = self.over_devices(parts.has_weight().astype(jnp.int32))
        return in_use(counts > 0)

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
