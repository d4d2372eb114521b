"""What a suite consists of: problems, with the same data and start for all optimizers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax

MINIBATCH = 200
"""Examples, as Sutskever et al. (2013) had for deep autoencoders."""

Measure = Callable[[Any, int], tuple[float, float]]
"""`(params, updates) -> (f, value)`, compiled."""


class Handed(NamedTuple):
    """What an update of Hessian-free is given.

    Attributes:
      gradient: the examples of the gradient.
      curvature: of the curvature.
      evaluation: on which the step is chosen; `None` for those of the curvature.
    """

    gradient: Any
    curvature: Any
    evaluation: Any


Hand = Callable[[Any, jax.Array], Handed]
"""`(batch, updates so far) -> handed`."""


class Minibatches(NamedTuple):
    """Small batches for first-order optimizers.

    Attributes:
      draw: `(data, carry, key) -> (batch, kept)`, where `kept` is what the next draw finds
        in the carry, such as the order of the examples in this epoch.
      words: what a batch is, for people.
      cases: whose order is kept; 0 if there is no order.
      epoch: batches in an epoch, if there are epochs.
    """

    draw: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
    words: str
    cases: int = 0
    epoch: int = 0


class Summary(NamedTuple):
    """What tables and pictures say about a problem.

    Attributes:
      title: in a few words.
      value: what is measured, in a few words.
      milestones: values to come below, by name; falling.
      floor: below which f cannot be.
      goal: a run ends when the value is below it; minus infinity if only time ends it.
      lowest: whether the lowest value of a run counts, and not its last one.
      note: what others have reached.
    """

    title: str
    value: str
    milestones: Mapping[str, float]
    floor: float = 0.0
    goal: float = float("-inf")
    lowest: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all optimizers are given.

    Attributes:
      summary: for tables and pictures.
      objective: f.
      start: `key -> params`.
      data: `seed -> what updates learn from`, a tree of arrays.
      measurer: `(params, seed) -> measure`, compiled for such parameters.
      minibatches: for first-order optimizers.
      redraw: `(data, carry) -> batch`, if the examples change; `None` if the data are a
        batch, the same for each update.
      kept: what stands for the batch before the first update, if a batch depends on the
        one before; else `None`.
      parts: equal ones of the examples; each update has curvature on one, in turn.
      damping: λ of `recipes.martens2010` before the first update, on the scale of f.
      options: of `hfjax.hessian_free`, if the problem is of a kind that has its own.
      loss: `"sigmoid"`, `"softmax"` or `"squared"`, for packages that must be told;
        `None` if f is not one loss of one model.
      layered: whether every weight is used once for an example, as K-FAC wants it.
      hidden: f with the hidden states beside the outputs, for structural damping.
      clip: norm that gradients of a minibatch are clipped to, if they must be.
      rows: of the Jacobian, if a step can be solved for exactly.
      residuals: `(params, batch) -> r` of which f is ½ rᵀr, if it is.
      looped: whether several small updates may be one compiled loop. XLA's convolutions on
        a CPU are many times slower in a loop.
    """

    summary: Summary
    objective: Any
    start: Callable[[jax.Array], Any]
    data: Callable[[int], Any]
    measurer: Callable[[Any, int], Measure]
    minibatches: Minibatches
    redraw: Callable[[Any, Any], Any] | None = None
    kept: Any = None
    parts: int = 1
    damping: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: str | None = None
    layered: bool = False
    hidden: hfjax.Objective | None = None
    clip: float | None = None
    rows: int = 0
    residuals: Callable[[Any, Any], jax.Array] | None = None
    looped: bool = True

    def batch(self, data: Any, carry: Any) -> tuple[Any, Any]:
        """Return the examples of an update, and what the next one keeps of them.

        Args:
          data: of `data`.
          carry: where the optimizer stands.
        """
        batch = data if self.redraw is None else self.redraw(data, carry)
        return batch, None if self.kept is None else batch


class Kind(NamedTuple):
    """A problem that can be built.

    Attributes:
      title: in a few words.
      build: `folder of mnist.npz -> problem`.
      needs_mnist: whether it needs that folder.
    """

    title: str
    build: Callable[[str], Problem]
    needs_mnist: bool = False


class Suite(NamedTuple):
    """Problems that are measured in the same way.

    Attributes:
      name: on the command line.
      title: in a few words.
      problems: by name.
      default: names of the problems that run if none is asked for.
      optimizers: names of those that run if none is asked for.
      seconds: of training for each run, if the command does not say.
      float64: whether the suite is in float64.
      numbers: other names of the problems.
    """

    name: str
    title: str
    problems: dict[str, Kind]
    default: tuple[str, ...]
    optimizers: tuple[str, ...]
    seconds: float
    float64: bool = False
    numbers: Mapping[str, str] = {}

    def named(self, words: str | None) -> tuple[str, ...]:
        """Read names of problems.

        Args:
          words: as the user typed them, with commas; `all` is all, `None` the default.

        Returns:
          The names, in the order of `problems`.

        Raises:
          ValueError: if one of them is unknown.
        """
        if words is None:
            return self.default
        asked = set(self.problems) if words == "all" else set()
        for word in () if words == "all" else words.split(","):
            name = self.numbers.get(word.zfill(2), word)
            if name not in self.problems:
                other = {name: f" ({number})" for number, name in self.numbers.items()}
                known = ", ".join(f"{p}{other.get(p, '')}" for p in self.problems)
                msg = f"--problem must be all, or among {known}; got {word!r}"
                raise ValueError(msg)
            asked.add(name)
        return tuple(name for name in self.problems if name in asked)


def everything(parts: int) -> Hand:
    """Give all examples, and for the curvature one of equal parts, in turn."""

    def hand(batch: Any, updates: jax.Array) -> Handed:
        if parts == 1:
            # As evaluation data, they would be evaluated a second time for ρ.
            return Handed(batch, batch, None)
        return Handed(batch, part(batch, parts, updates), batch)

    return hand


def guarded(parts: int) -> Hand:
    """Give all examples, for the curvature a part and for the evaluation the next."""

    def hand(batch: Any, updates: jax.Array) -> Handed:
        own, other = (part(batch, parts, updates + ahead) for ahead in (0, 1))
        return Handed(batch, own, other)

    return hand


def alone(parts: int) -> Hand:
    """Give one of equal parts, in turn, for everything."""

    def hand(batch: Any, updates: jax.Array) -> Handed:
        own = part(batch, parts, updates)
        return Handed(own, own, None)

    return hand


def part(batch: Any, parts: int, count: jax.Array) -> Any:
    """Take one of equal parts of the examples, in turn.

    Args:
      batch: a tree whose leaves lead with the examples.
      parts: how many; it divides the number of examples.
      count: which; after the last comes the first.
    """
    size = _cases(batch) // parts
    start = count % parts * size
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, size), batch
    )


def shuffled(batch: Any, size: int = MINIBATCH) -> Minibatches:
    """Give minibatches of so many examples, shuffled anew in each epoch.

    A last minibatch that would not be full is left out of the epoch.
    """
    cases = _cases(batch)
    size = min(size, cases)
    batches = cases // size

    def draw(batch: Any, carry: Any, key: jax.Array) -> tuple[Any, Any]:
        place, epoch = carry.updates % batches, carry.updates // batches
        order = jax.lax.cond(
            place == 0,
            lambda: jax.random.permutation(jax.random.fold_in(key, epoch), cases),
            lambda: carry.kept,
        )
        chosen = jax.lax.dynamic_slice_in_dim(order, place * size, size)
        return jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), batch), order

    return Minibatches(draw, f"minibatches of {size}", cases, batches)


def excess_over(milestones: Sequence[float]) -> dict[str, float]:
    """Name milestones, which are excesses over the floor and fall, by their numbers."""
    return {f"{number:g}": number for number in milestones}


def full_batch_measurer(
    objective: hfjax.Objective, batch: Any, floor: float
) -> Callable[[Any, int], Measure]:
    """Measure f on all examples, and its excess over the floor."""

    def measurer(params: Any, seed: int) -> Measure:
        del seed
        compiled = jax.jit(objective.value).lower(params, batch).compile()

        def measure(params: Any, updates: int) -> tuple[float, float]:
            del updates
            loss = float(compiled(params, batch))
            return loss, loss - floor

        return measure

    return measurer


def _cases(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
