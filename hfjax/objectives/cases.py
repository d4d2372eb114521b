"""Batches: check them, give them weights, and split them into microbatches."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core import sharding, sums, trees
from hfjax._core.arguments import ShapeError
from hfjax._core.types import Batch, Tree


class Cases(NamedTuple):
    """A batch, or a microbatch of it; the first axis of every leaf indexes the examples.

    Attributes:
      inputs: a pytree, the argument of `model_fn`.
      targets: a pytree, which the loss compares with the outputs.
      weights: shape `[cases]`, where 0 marks padding; as the user gives them, also
        `[cases, positions…]`.
    """

    inputs: Tree
    targets: Tree
    weights: jax.Array


class Microbatches(NamedTuple):
    """A single microbatch is `cases`; of several, leaves are [position, microbatch, …].

    Attributes:
      count: of microbatches.
      cases: the examples, with some at weight 0 to fill up the last round.
      total: of examples, without those.
      shares: of how many devices each were filled up apart; 1 if all of them at once.
    """

    count: int
    cases: Cases
    total: int
    shares: int = 1

    def take(self, k: jax.Array | int) -> Cases:
        """Return the k-th microbatch."""
        return trees.row(self.cases, k, axis=1)

    def numbers(self) -> jax.Array:
        """Return the number of the microbatch that each example of the batch is in."""
        numbers = jnp.arange(self.total, dtype=jnp.int32)
        return numbers % (self.total // self.shares) % self.count

    def has_weight(self) -> jax.Array:
        """Return of each microbatch whether any of its examples has a weight."""
        weights = self.cases.weights
        return jnp.any(weights != 0, axis=(0, *range(2, weights.ndim)))

    def in_order(self, stacked: jax.Array) -> jax.Array:
        """Put results of shape [microbatch, position, …] into the order of the batch."""
        found = jnp.swapaxes(stacked, 0, 1).reshape(-1, *stacked.shape[2:])
        if self.shares > 1:
            found = found.reshape(self.shares, -1, *found.shape[1:])
            found = found[:, : self.total // self.shares]
            found = found.reshape(-1, *found.shape[2:])
        return found[: self.total]


def split(cases: Cases, microbatch_size: int | None) -> Microbatches:
    """Split a batch into microbatches of at most `microbatch_size` examples.

    Microbatch k holds the examples k, k + count, k + 2·count, …, of each device's share
    where that may be one. Each device therefore holds its share of every microbatch.
    """
    total = cases.weights.shape[0]
    if microbatch_size is None or microbatch_size >= total:
        return Microbatches(1, cases, total)
    # Every device gets equally many in a microbatch, or the batch would be gathered.
    # Over `Auto` axes, examples may be sharded over as many devices as divide them.
    shards, shares = sharding.shards_of_cases(cases), 1
    automatic = math.gcd(total, sharding.automatic(cases))
    if shards < automatic <= microbatch_size:
        shards = shares = automatic
    count = -(-total // max(shards, microbatch_size // shards * shards))
    rounds = -(-total // (count * shards)) * shards
    missing = rounds * count - total

    # The last round is filled up with the first examples, at weight 0. They are real ones
    # because the model may not be defined at a row of zeros, and 0 · NaN is NaN.
    def fold(leaf: jax.Array) -> jax.Array:
        example = leaf.shape[1:]
        if missing and shares > 1:  # Each share from itself: nothing is sent.
            leaf = leaf.reshape(shares, -1, *example)
            leaf = jnp.concatenate([leaf, leaf[:, : missing // shares]], axis=1)
        elif missing:
            leaf = jnp.concatenate([leaf, leaf[:missing]])
        return leaf.reshape(rounds, count, *example)

    folded = jax.tree.map(fold, cases)
    if count > sums.FEW:
        # Sums are then nested loops. XLA moves constants into loops, and copies them in
        # each round of the outer one. The barrier keeps a batch that the user's compiled
        # function closes over from being treated as a constant.
        folded = jax.lax.optimization_barrier(folded)
    places = jnp.arange(rounds * count).reshape(rounds, count)
    padding = places % (rounds * count // shares) >= total // shares
    padding = padding.reshape(rounds, count, *[1] * (folded.weights.ndim - 2))
    weights = jnp.where(padding, 0, folded.weights)
    return Microbatches(count, folded._replace(weights=weights), total, shares)


def subsample(batch: Batch, cases: int, microbatch_size: int | None = None) -> Batch:
    """Return at least `cases` evenly spaced examples of a batch, or the batch itself.

    Every k-th example is taken, so that each device still holds its share of sharded ones.
    Of a batch with weights and microbatches, the others only lose their weight.
    """
    if microbatch_size is not None and len(batch) > 2 and batch[2] is not None:
        return _first_used(batch, microbatch_size, cases)
    given = as_cases(batch)
    total, every = given.weights.shape[0], stride(given, cases)
    if every == 1:
        return batch
    automatic = math.gcd(total, sharding.automatic(given))

    def taken(leaf: jax.Array) -> jax.Array:
        if automatic == 1:
            return jax.lax.slice_in_dim(leaf, 0, total, every)
        # The compiler lays out the rows of this as the examples, but not those of a slice
        # with a stride.
        return leaf.reshape(-1, every, *leaf.shape[1:])[:, 0]

    return jax.tree.map(taken, tuple(batch))


def stride(given: Cases, cases: int) -> int:
    """Return k, if every k-th example is taken to have at least `cases` of them."""
    total, shards = given.weights.shape[0], sharding.shards_of_cases(given)
    # Over `Auto` axes, they may be sharded over as many devices as divide them.
    automatic = math.gcd(total, sharding.automatic(given))
    every = max(1, total // cases)

    def is_even(every: int) -> bool:
        if automatic > 1:
            return total // automatic % every == 0
        return -(-total // every) % shards == 0

    # Devices keep equal shares only if their number divides that of the examples taken.
    while not is_even(every):
        every -= 1
    return every


def in_use(has_weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the numbers of all microbatches, those with weight first, and how many."""
    order = jnp.argsort(~has_weight, stable=True).astype(jnp.int32)
    return order, jnp.sum(has_weight, dtype=jnp.int32)


def _first_used(batch: Batch, microbatch_size: int, cases: int) -> Batch:
    """Keep the weights of as many microbatches as have about `cases` examples.

    Those that have weight 0 already are passed over, as they are in all computations: of
    every k-th example they might leave none.
    """
    given = as_cases(batch)
    parts = split(given, microbatch_size)
    needed = -(-cases // (-(-parts.total // parts.count)))
    if needed >= parts.count:
        return batch
    places = jnp.argsort(in_use(parts.has_weight())[0])
    keeps = (places < needed)[parts.numbers()]
    keeps = keeps.reshape(-1, *[1] * (given.weights.ndim - 1))
    return given.inputs, given.targets, jnp.where(keeps, given.weights, 0)


def as_cases(batch: Batch, name: str = "batch") -> Cases:
    """Check a user-supplied batch and give it weights; `name` is for the error.

    `()` is the batch of a penalty, which reads no data: one example of nothing.
    """
    if isinstance(batch, tuple) and not batch:
        return Cases(jnp.zeros(1, jnp.float32), (), jnp.ones(1, jnp.float32))
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        came = f"{type(batch).__name__}"
        came += f" of {len(batch)} parts" if isinstance(batch, tuple | list) else ""
        msg = f"`{name}` must be (inputs, targets) or (inputs, targets, weights), got {came}."
        raise ValueError(msg)
    inputs, targets, *rest = batch
    sizes = {}
    for part, tree in (("inputs", inputs), ("targets", targets)):
        if any(_is_sparse(x) for x in jax.tree.leaves(tree, is_leaf=_is_sparse)):
            msg = (
                f"`{name}` holds a sparse matrix in its {part}, which cannot be split into "
                "cases. Pass its parts, with the cases first: `data` and `indices` of "
                "`BCOO.fromdense(x, n_batch=1)`, and multiply with them in `model_fn`. "
                "(`model_fn` may close over a sparse matrix.)"
            )
            raise TypeError(msg)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = f"{part}{jax.tree_util.keystr(path)}"
            if not _is_array(leaf):
                came = getattr(leaf, "dtype", type(leaf).__name__)
                msg = (
                    f"Every leaf of `{name}` must be an array of numbers, got {came} "
                    f"at {where}: use `jnp.asarray`."
                )
                raise TypeError(msg)
            sizes[where] = jnp.shape(leaf)[:1]
    if not sizes or len(set(sizes.values())) > 1 or () in sizes.values():
        msg = (
            f"Every leaf of `{name}` must lead with the same number of cases, got "
            f"leading axes { ({where: list(size) for where, size in sizes.items()}) }. "
            "What all cases share is not part of a batch: let `model_fn` close over it "
            "(docs/changing.md). Pad graphs and sequences to one size, stack them, and "
            "`jax.vmap` the model over them."
        )
        raise ValueError(msg)
    (cases,) = next(iter(sizes.values()))
    if cases == 0:
        msg = f"`{name}` holds no cases: a mean over none is not defined."
        raise ValueError(msg)
    # Weights are summed, so they are at least float32 whatever their dtype.
    own = rest[0] if rest else None
    weights = jnp.ones(cases, jnp.float32) if own is None else jnp.asarray(own)
    if weights.shape[:1] != (cases,):
        msg = (
            f"`{name}` weights must have shape ({cases},), or ({cases}, positions…) where "
            f"the loss has positions, got {weights.shape}."
        )
        raise ValueError(msg)
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        msg = f"`{name}` weights must be real, got {weights.dtype}."
        raise TypeError(msg)
    return Cases(inputs, targets, weights.astype(trees.wide(weights.dtype)))


def _is_sparse(leaf: object) -> bool:
    return hasattr(leaf, "todense") and hasattr(leaf, "nse")


def _is_array(leaf: object) -> bool:
    if isinstance(leaf, jax.Array):  # Typed keys included, for random models.
        return True
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "OSU"


def check_outputs(outputs: Tree, cases: int) -> None:
    """Raise unless outputs are real floats whose first axis indexes the examples."""
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    if not leaves:
        msg = f"`model_fn` must return arrays, got {outputs!r}: is a `return` missing?"
        raise TypeError(msg)
    for path, leaf in leaves:
        where = f"outputs{jax.tree_util.keystr(path)}"
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            msg = (
                "`model_fn` must return arrays of real floats and nothing else, got "
                f"{dtype or type(leaf).__name__} at {where}. (What the loss reads "
                "besides, as lengths or masks, belongs to the targets.)"
            )
            raise TypeError(msg)
        if leaf.shape[:1] != (cases,):
            often = f"{cases} case{'s' * (cases != 1)}"
            msg = (
                "`model_fn` must keep the case axis first: got "
                f"{where} of shape {leaf.shape} for {often} (it is run on other "
                "numbers of them, too)."
            )
            if cases == 1:
                msg += (
                    " `squeeze()` drops the case axis of a single case: write "
                    "`squeeze(-1)`."
                )
            raise ShapeError(msg)
