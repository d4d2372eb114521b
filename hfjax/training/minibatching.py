"""Minibatches for second-order updates: taken in turn, and of growing size.

A step computed from few examples may be wrong for the others, and the more so the closer
training is to its end (Martens & Sutskever 2012, section 12.2). Remedies:

| remedy | in hfjax |
|---|---|
| larger batches as training goes on | `growing` |
| gradients from more examples than the curvature | `grads` of a larger batch |
| fewer CG iterations | `cg.conjugate_gradient(max_iterations=…, limit=schedule)` |
| smaller steps | `hessian_free(learning_rate=schedule)` |
| expect less than the predicted reduction, and measure it on other data | `damping.ReductionRatio(data="eval_batch", expected=…)` |
| warm starts from one batch to the next | `cg.conjugate_gradient(warm_start_decay=…)` |
| CG iterates chosen on other data | `update(…, eval_batch=…)` |
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
    """Return the batch size as a function of the update: `first`, multiplied at intervals.

    It is `first` · `factor`^⌊count / `interval`⌋, and at most `last`. It changes in few
    jumps because each size is compiled separately.

    Args:
      first: size of the first batches.
      last: upper limit, such as the size of the training set.
      factor: ratio of successive sizes, above 1.
      interval: number of updates with the same size.

    Returns:
      `count -> size`, both Python integers.

    Raises:
      TypeError: if `first`, `last` or `interval` is not a Python integer.
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
        # Compare logarithms, because the power may overflow.
        if power * math.log(factor) >= math.log(last / first):
            return last
        # The small factor makes up for rounding: 100 · 1.15 must give 115, not 114.
        return min(last, int(first * factor**power * (1 + 1e-12)))

    return size


def in_turn(data: Tree, size: int, count: jax.Array | int) -> Tree:
    """Take the next `size` examples of a data set, cyclically.

    Args:
      data: a tree such as `(inputs, targets)` whose leaves all have the same number of
        examples as first axis. Shuffle it beforehand.
      size: number of examples, a Python integer; at most all of them.
      count: the number of updates so far, possibly traced. The examples start at index
        `count` · `size`, modulo their number.

    Returns:
      A tree like `data` with `size` examples.

    Raises:
      TypeError: if `size` is not a Python integer, or a leaf of `data` is not an array
        with at least one axis.
      ValueError: if `size` is not between 1 and the number of examples, or if that number
        is not the same for all leaves.

    Example:
      >>> cases = jnp.arange(5)
      >>> print(*(in_turn(cases, 2, count) for count in range(4)))
      [0 1] [2 3] [4 0] [1 2]

    References:
      Martens (2010), whose program takes the chunks of its data in turn.
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
    # count · size may overflow 32 bits, so look up (k · size) mod total in a table. It has
    # period total / gcd(total, size) in k.
    cycle = total // math.gcd(total, size)
    starts = np.arange(cycle, dtype=np.int64) * size % total
    first = jnp.asarray(starts, jnp.int32)[jnp.asarray(count) % cycle]
    places = (first + jnp.arange(size, dtype=jnp.int32)) % total
    return jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0), data)
