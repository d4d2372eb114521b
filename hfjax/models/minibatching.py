"""Minibatches for second-order updates: taken in turn, and growing.

Curvature batches overfit: a step solved on few cases may be wrong for the rest, the
more so the closer training comes to its end (report, section 12.2). What the report
offers against it, and where it is here:

| remedy | here |
|---|---|
| larger batches as training goes on | `growing` |
| gradients from more cases than the curvature | `grads` of a larger batch |
| fewer CG iterations | `cg.conjugate_gradient(max_iterations=…, limit=schedule)` |
| smaller steps | `hessian_free(learning_rate=schedule)` |
| aim for less than M predicts | `damping.ReductionRatio(data="eval_batch", expected=…)` |
| warm starts, from batch to batch | `cg.conjugate_gradient(warm_start_decay=…)` |
| iterates chosen on other data | `update(…, eval_batch=…)` |
"""

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import options
from hfjax._core.arguments import describe
from hfjax._core.types import Tree


def growing(
    first: int, last: int, *, factor: float = 2.0, interval: int = 50
) -> Callable[[int], int]:
    """Return a batch size for each update: `first` · `factor`^⌊count / interval⌋.

    Sizes change in few jumps, as each is compiled anew.

    Args:
      first: size of the first batches.
      last: no batch is larger: the size of the training set.
      factor: between sizes, above 1; heuristic.
      interval: updates of one size; heuristic.

    Returns:
      `count -> size`, Python integers.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      >>> size = growing(100, 1000, interval=10)
      >>> [size(count) for count in (0, 9, 10, 20, 30, 40)]
      [100, 100, 200, 400, 800, 1000]

    References:
      Martens & Sutskever (2012), sections 12.2 and 13.
    """
    options.check_count("first", first, low=1)
    options.check_count("last", last, low=first)
    options.check_count("interval", interval, low=1)
    options.check_range("factor", factor, low=1.0, open_low=True)

    def size(count: int) -> int:
        power = operator.index(count) // interval
        # By logarithms: a power of floats may overflow.
        if power * math.log(factor) >= math.log(last / first):
            return last
        # 100 · 1.15 is 115, which is not to be rounded below.
        return min(last, int(first * factor**power * (1 + 1e-12)))

    return size


def in_turn(data: Tree, size: int, count: jax.Array | int) -> Tree:
    """Take the next `size` cases of the data, from the first again after the last.

    Args:
      data: a tree whose leaves lead with the same number of cases, as a batch
        `(inputs, targets)`; shuffle it beforehand.
      size: cases to take, at most all: a Python integer.
      count: updates so far, which may be traced: update k takes the cases from k ·
        `size` on.

    Returns:
      A tree like `data` with `size` cases.

    Raises:
      TypeError: if `size` is no Python integer, or a leaf of `data` no array of cases.
      ValueError: if `size` is not between 1 and the number of cases, or if the leaves
        differ in it.

    Example:
      >>> cases = jnp.arange(5)
      >>> print(*(in_turn(cases, 2, count) for count in range(4)))
      [0 1] [2 3] [4 0] [1 2]

    References:
      Martens (2010): his program takes the chunks of its data in turn.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not hasattr(leaf, "shape") or not leaf.shape:
            where = f"data{jax.tree_util.keystr(path)}"
            msg = (
                "Every leaf of `data` must be an array that leads with the cases, got "
                f"{describe(leaf)} at {where}."
            )
            raise TypeError(msg)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if len(counts) != 1:
        msg = f"The leaves of `data` must lead with as many cases, got {counts}."
        raise ValueError(msg)
    total = counts.pop()
    options.check_count("size", size, low=1)
    if size > total:
        msg = f"`size` must be at most the {total} cases of `data`, got {size}."
        raise ValueError(msg)
    # A table of (k · size) mod total, made in 64 bits: k · size itself may need them.
    cycle = total // math.gcd(total, size)
    starts = np.arange(cycle, dtype=np.int64) * size % total
    first = jnp.asarray(starts, jnp.int32)[jnp.asarray(count) % cycle]
    places = jnp.arange(size, dtype=jnp.int32)
    return jax.tree.map(
        lambda leaf: jnp.take(leaf, (first + places) % total, axis=0), data
    )
