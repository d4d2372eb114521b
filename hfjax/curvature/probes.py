"""Random signs vᵢ for every output of every example, with E[vᵢvᵢᵀ] = I.

With a factor Sᵢ Sᵢᵀ = L″ᵢ of the loss's Hessian, gᵢ = Jᵢᵀ Sᵢ vᵢ has E[gᵢgᵢᵀ] = Jᵢᵀ L″ᵢ
Jᵢ. So one backward pass gives an unbiased estimate of an example's part of G. Diagonals
and Kronecker factors are estimated in this way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import sharding
from hfjax._core.types import Tree
from hfjax.objectives.cases import Cases
from hfjax.objectives.means import Means
from hfjax.objectives.terms import Term


class Probes(NamedTuple):
    """A key for each example.

    Attributes:
      data: the data of the keys, with a leading axis of examples: arrays that can be
        split into microbatches.
      implementation: the implementation of the keys.
    """

    data: jax.Array
    implementation: str

    def signs(self, data: jax.Array, probe: jax.Array | int, outputs: Tree) -> Tree:
        """Draw signs for one example, a tree like its `outputs`.

        `data` is that of the example's key, and `probe` the number of the draw.
        """
        leaves, structure = jax.tree.flatten(outputs)

        def of_leaf(number: int, z: jax.Array) -> jax.Array:
            # Each leaf and draw needs another key. Counting up is enough, because the keys
            # of the examples are far apart; `fold_in` would be one more hash to compile.
            offset = jnp.asarray(probe * len(leaves) + number, data.dtype)
            own = data.at[-1].add(offset)
            key = jax.random.wrap_key_data(own, impl=self.implementation)
            # Otherwise the compiler could lay out all that follows from them like the
            # parameters, and not like the examples.
            return sharding.like(jax.random.rademacher(key, z.shape, z.dtype), z)

        return structure.unflatten([of_leaf(n, z) for n, z in enumerate(leaves)])


def probes(means: Means, cases: Cases, key: jax.Array) -> Probes:
    """Give each example a key that depends on `key` and its place in the batch alone.

    So the signs of an example do not depend on microbatches or on the number of
    devices. `cases` are those of this device, and `means` knows their place in the
    whole batch.
    """
    first = means.first_case(cases)
    numbers = first + jnp.arange(cases.weights.shape[0])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    # As plain arrays, they can be split into microbatches with the rest of the data, and
    # `signs` can count up from them.
    return Probes(jax.random.key_data(keys), jax.random.key_impl(key))  # pyright: ignore[reportArgumentType]


def keys_of(terms: Sequence[Term], key: jax.Array) -> list[jax.Array]:
    """Return a key for each term of a weighted sum, or for a plain objective."""
    return [
        key if term.weight is None else jax.random.fold_in(key, k)
        for k, term in enumerate(terms)
    ]
