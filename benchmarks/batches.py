"""Which cases an update sees: all, parts in turn, or shuffled minibatches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MINIBATCH = 200  # Sutskever et al. (2013), for deep autoencoders


class Handed(NamedTuple):
    """What an update of Hessian-free is given.

    Attributes:
      gradient: the cases of the gradient.
      curvature: of the curvature.
      evaluation: on which iterates are chosen; `None` for those of the curvature.
    """

    gradient: Any
    curvature: Any
    evaluation: Any


Hand = Callable[[Any, jax.Array], Handed]
"""`(batch, updates so far) -> handed`."""


def everything(parts: int) -> Hand:
    """Hand all cases, and for the curvature one of equal parts, in turn.

    Args:
      parts: how many; it divides the number of cases.
    """

    def hand(batch: Any, updates: jax.Array) -> Handed:
        if parts == 1:
            # For evaluation, the same data would be evaluated a second time for ρ.
            return Handed(batch, batch, None)
        return Handed(batch, part(batch, parts, updates), batch)

    return hand


def guarded(parts: int) -> Hand:
    """Hand all cases, for the curvature a part and for the evaluation the next.

    Args:
      parts: how many, at least 2; it divides the number of cases.
    """

    def hand(batch: Any, updates: jax.Array) -> Handed:
        own, other = (part(batch, parts, updates + ahead) for ahead in (0, 1))
        return Handed(batch, own, other)

    return hand


def alone(parts: int) -> Hand:
    """Hand one of equal parts, in turn, for everything.

    Args:
      parts: how many; it divides the number of cases.
    """

    def hand(batch: Any, updates: jax.Array) -> Handed:
        own = part(batch, parts, updates)
        return Handed(own, own, None)

    return hand


def part(batch: Any, parts: int, count: jax.Array) -> Any:
    """Take one of equal parts of the cases, in turn.

    Args:
      batch: a tree whose leaves lead with the cases.
      parts: how many; it divides the number of cases.
      count: which; after the last comes the first.
    """
    size = cases_of(batch) // parts
    start = count % parts * size
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), batch
    )


def shuffled(
    batch: Any, updates: jax.Array, order: Any, key: jax.Array
) -> tuple[Any, jax.Array]:
    """Take the next minibatch of `MINIBATCH` cases; at the start of an epoch, shuffle first.

    A last minibatch that would not be full is left out of the epoch.

    Args:
      batch: all cases, a tree whose leaves lead with them.
      updates: so far.
      order: of the cases in this epoch.
      key: of the shuffling.

    Returns:
      The minibatch, and the order of this epoch.
    """
    cases = cases_of(batch)
    size = min(MINIBATCH, cases)
    place, epoch = updates % (cases // size), updates // (cases // size)
    order = jax.lax.cond(
        place == 0,
        lambda: jax.random.permutation(jax.random.fold_in(key, epoch), cases),
        lambda: order,
    )
    chosen = jax.lax.dynamic_slice_in_dim(order, place * size, size)
    return jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), batch), order


def cases_of(batch: Any) -> int:
    """Count the cases.

    Args:
      batch: a tree whose leaves lead with them.
    """
    return jax.tree.leaves(batch)[0].shape[0]
