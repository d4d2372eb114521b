"""Random signs for every output of every case: vᵢ with E[vᵢvᵢᵀ] = I."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core.types import Tree
from hfjax.objectives.cases import Cases
from hfjax.objectives.means import Means


class Probes(NamedTuple):
    """A key for each case.

    Attributes:
      data: of the keys, with a leading axis of cases: arrays that can be split.
      implementation: of the keys.
    """

    data: jax.Array
    implementation: str

    def signs(self, data: jax.Array, probe: jax.Array | int, outputs: Tree) -> Tree:
        """Draw the signs of one case.

        Args:
          data: of its key.
          probe: number of the draw.
          outputs: of the case.

        Returns:
          A tree like `outputs`.
        """
        leaves, structure = jax.tree.flatten(outputs)

        def of_leaf(number: int, z: jax.Array) -> jax.Array:
            # Another key for each leaf and draw: the case's keys are far apart, and a
            # hash for each would be one more program to compile.
            offset = jnp.asarray(probe * len(leaves) + number, data.dtype)
            own = data.at[-1].add(offset)
            key = jax.random.wrap_key_data(own, impl=self.implementation)
            return jax.random.rademacher(key, z.shape, z.dtype)

        return structure.unflatten([of_leaf(n, z) for n, z in enumerate(leaves)])


def probes(means: Means, cases: Cases, key: jax.Array) -> Probes:
    """Give each case a key of its own, whatever the microbatches and the devices.

    Args:
      means: that know of devices.
      cases: this device's.
      key: a typed key.

    Returns:
      The keys; a case's depends on `key` and on its place in the whole batch alone.
    """
    first = means.first_case(cases)
    numbers = first + jnp.arange(cases.weights.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return Probes(jax.random.key_data(keys), jax.random.key_impl(key))  # pyright: ignore[reportArgumentType]
