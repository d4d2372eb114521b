"""Tasks that need a long memory: random sequences, their losses, and wrong answers.

The problems of Hochreiter & Schmidhuber (1997), with the ranges of Sutskever's program
(2011) for Martens & Sutskever (2011). What must be remembered is near the start of a
sequence, and is asked for at its end. Ranges are in per cent of `length`, the fewest
steps that a sequence has.

Where the number of steps varies, it is uniform in `[length, 1.1 length)`, and the array
is as long as the longest. What follows a sequence's last step is zero and has no target.

    >>> inputs, targets = arithmetic(jax.random.key(0), 3, 30)
    >>> inputs.steps.shape, targets.shape
    ((3, 32, 2), (3, 1))
    >>> values, markers = jnp.moveaxis(inputs.steps, -1, 0)
    >>> print(jnp.allclose(targets[:, 0], jnp.sum(values * (markers == 1), axis=1)))
    True
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax

SHORTEST = 21
"""Steps below which the ranges of some task are empty."""

_TOLERANCE = 0.04
"""Of a real answer (Hochreiter & Schmidhuber 1997)."""

_NOISE = 4  # symbols of temporal order: noise, A and B, trigger, start
_TRIGGER, _START = _NOISE + 2, _NOISE + 3


class Inputs(NamedTuple):
    """What a recurrent network reads.

    Attributes:
      steps: `[cases, longest, features]`, float32.
      lengths: `[cases]`, int32: how many of the steps are the sequence's own.
    """

    steps: jax.Array
    lengths: jax.Array


Batch = tuple[Inputs, jax.Array]
"""Inputs and their targets."""


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw from [0, 1)."""
    return jax.random.uniform(key, shape, jnp.float32)


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw 0 or 1, as floats."""
    return jax.random.bernoulli(key, shape=shape).astype(jnp.float32)


def arithmetic(
    key: jax.Array,
    cases: int,
    length: int,
    *,
    operation: Callable[[jax.Array, jax.Array], jax.Array] = jnp.add,
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array] = uniform,
    first: tuple[int, int] = (1, 10),
    second: tuple[int, int] = (10, 50),
) -> Batch:
    """Draw two marked values among others; the target combines the two.

    A step is `(value, marker)`. The marker is 1 at the two operands, −1 at the first
    step and at the third but last, else 0.

    Args:
      key: of the random numbers.
      cases: number of sequences.
      length: fewest steps.
      operation: `(first, second) -> target`, elementwise.
      draw: `(key, shape) -> values`.
      first: where the first operand is, in per cent, the upper end excluded; never at
        the first step.
      second: where the second operand is.

    Returns:
      Inputs of two features, and targets `[cases, 1]` for the last step.
    """
    keys = jax.random.split(key, 4)
    lengths = _lengths(keys[0], cases, length)
    time = jnp.arange(longest(length))
    values = draw(keys[1], (cases, len(time)))
    places = jnp.stack(
        [
            _places(keys[2], cases, _step(length, first[0]), _step(length, first[1])),
            _places(keys[3], cases, _step(length, second[0]), _step(length, second[1])),
        ],
        axis=1,
    )
    marked = jnp.any(time == places[:, :, None], axis=1)
    ends = (time == 0) | (time == lengths[:, None] - 3)
    markers = marked.astype(jnp.float32) - ends.astype(jnp.float32)
    operands = jnp.take_along_axis(values, places, axis=1)
    targets = operation(operands[:, :1], operands[:, 1:])
    return _inputs(jnp.stack([values, markers], axis=-1), lengths), targets


def temporal_order(
    key: jax.Array,
    cases: int,
    length: int,
    *,
    windows: Sequence[tuple[int, int]] = ((1, 10), (40, 50)),
) -> Batch:
    """Draw a few letters, each A or B, among noise; the class is which, in their order.

    A step is one of 8 symbols: 4 of noise, A, B, the trigger at the last step, and the
    start at the first. The number of an example is its class, so that classes are equally
    frequent. (In Sutskever's program the trigger of two letters comes one step before the
    last.)

    Args:
      key: of the random numbers.
      cases: number of sequences.
      length: fewest steps.
      windows: where each letter is, in per cent, both ends included.

    Returns:
      Inputs of 8 features, and targets `[cases]` for the last step: the letters as
      binary digits, A for 0, the first letter the highest.
    """
    keys = jax.random.split(key, 2 + len(windows))
    lengths = _lengths(keys[0], cases, length)
    time = jnp.arange(longest(length))
    targets = jnp.arange(cases, dtype=jnp.int32) % 2 ** len(windows)
    symbols = jax.random.randint(keys[1], (cases, len(time)), 0, _NOISE)
    for index, (low, high) in enumerate(windows):
        letters = _NOISE + (targets >> (len(windows) - 1 - index)) % 2
        places = _places(
            keys[2 + index], cases, _step(length, low), _step(length, high) + 1
        )
        symbols = jnp.where(time == places[:, None], letters[:, None], symbols)
    symbols = jnp.where(time == 0, _START, symbols)
    symbols = jnp.where(time == lengths[:, None] - 1, _TRIGGER, symbols)
    return _inputs(jax.nn.one_hot(symbols, _NOISE + 4), lengths), targets


def permutation(
    key: jax.Array, cases: int, length: int, *, symbols: int = 100
) -> Batch:
    """Draw symbols; each step asks for the next symbol, the last step for the first.

    The first is 0 or 1, equally often, and the others are drawn from those above, which is
    no permutation, in spite of the name. Only the last target can be known.

    Args:
      key: of the random numbers.
      cases: number of sequences.
      length: steps.
      symbols: how many there are.

    Returns:
      Inputs of a feature for each symbol, and targets `[cases, length]`.
    """
    first = jnp.arange(cases, dtype=jnp.int32)[:, None] % 2
    others = jax.random.randint(key, (cases, length - 1), 2, symbols, jnp.int32)
    sequences = jnp.concatenate([first, others], axis=1)
    inputs = _inputs(jax.nn.one_hot(sequences, symbols), _all(cases, length))
    return inputs, jnp.roll(sequences, -1, axis=1)


def memorisation(
    key: jax.Array, cases: int, length: int, *, symbols: int, count: int
) -> Batch:
    """Draw symbols that must be repeated at the end, in their order.

    `count` symbols, blanks, a trigger one step before the recall, blanks. The target is
    blank until the recall.

    Args:
      key: of the random numbers.
      cases: number of sequences; if as many as there are strings, each comes once.
      length: steps, recall included.
      symbols: how many different ones, besides blank and trigger.
      count: of symbols to remember.

    Returns:
      Inputs of `symbols + 2` features, and targets `[cases, length]`, where `symbols`
      is the blank.
    """
    blank, trigger = symbols, symbols + 1
    if cases == symbols**count:
        digits = jnp.arange(cases)[:, None] // symbols ** jnp.arange(count)[::-1]
        strings = digits % symbols
    else:
        strings = jax.random.randint(key, (cases, count), 0, symbols)
    shown = jnp.full((cases, length), blank, jnp.int32)
    targets = shown.at[:, length - count :].set(strings)
    shown = shown.at[:, :count].set(strings).at[:, length - count - 1].set(trigger)
    steps = jax.nn.one_hot(shown, symbols + 2)
    return _inputs(steps, _all(cases, length)), targets


def longest(length: int) -> int:
    """Return the most steps where the number varies: uniform in `[length, 1.1 length)`.

    Args:
      length: fewest steps.
    """
    return _most(length) - 1


def _most(length: int) -> int:
    return 11 * length // 10


def _step(length: int, percent: int) -> int:
    return max(1, length * percent // 100)


def _lengths(key: jax.Array, cases: int, length: int) -> jax.Array:
    return _places(key, cases, length, _most(length))


def _all(cases: int, length: int) -> jax.Array:
    return jnp.full(cases, length, jnp.int32)


def _places(key: jax.Array, cases: int, low: int, high: int) -> jax.Array:
    return jax.random.randint(key, (cases,), low, high, jnp.int32)


def _inputs(steps: jax.Array, lengths: jax.Array) -> Inputs:
    """Put zeros where a sequence has ended."""
    own = jnp.arange(steps.shape[1]) < lengths[:, None]
    return Inputs(jnp.where(own[:, :, None], steps, 0), lengths)


class Task(NamedTuple):
    """A problem for a recurrent network.

    Attributes:
      title: for people.
      features: of an input step.
      outputs: of the network.
      loss: matching the outputs; a sum over the steps that have a target.
      every_step: whether every step has a target, or only the last.
      generate: `(key, cases, length) -> batch`.
      wrong: `(outputs, targets) -> [cases]`, true where an answer is wrong.
      damping: λ of Sutskever's program before the first update, in hundredths, where
        the loss is a mean over target steps: `length -> number`.
      strings: how many sequences there are at all, if a batch holds them.
    """

    title: str
    features: int
    outputs: int
    loss: hfjax.losses.Loss
    every_step: bool
    generate: Callable[[jax.Array, int, int], Batch]
    wrong: Callable[[Any, Any], jax.Array]
    damping: Callable[[int], float]
    strings: int | None = None

    def target_steps(self, length: int) -> int:
        """Return how many steps of a sequence have a target."""
        return length if self.every_step else 1


def _off(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return ~(jnp.abs(outputs - targets)[:, 0] <= _TOLERANCE)  # so that NaN is wrong


def _wrong_sign(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return ((outputs > 0) != (targets > 0.5))[:, 0]


def _wrong_class(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.argmax(outputs, axis=-1) != targets


def _last_wrong(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return _wrong_class(outputs[:, -1], targets[:, -1])


def _any_wrong(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.any(_wrong_class(outputs, targets), axis=1)


def _classes() -> hfjax.losses.Loss:
    return hfjax.losses.softmax_cross_entropy_with_integer_labels()


def _arithmetic(title: str, **options: Any) -> Task:
    return Task(
        title=title,
        features=2,
        outputs=1,
        loss=hfjax.losses.squared_error(),
        every_step=False,
        generate=functools.partial(arithmetic, **options),
        wrong=_off,
        damping=lambda length: 1,
    )


def _temporal_order(title: str, *windows: tuple[int, int]) -> Task:
    return Task(
        title=title,
        features=8,
        outputs=2 ** len(windows),
        loss=_classes(),
        every_step=False,
        generate=functools.partial(temporal_order, windows=windows),
        wrong=_wrong_class,
        damping=lambda length: 8,
    )


def _memorisation(title: str, symbols: int, count: int, strings: int | None) -> Task:
    return Task(
        title=title,
        features=symbols + 2,
        outputs=symbols + 1,
        loss=_classes(),
        every_step=True,
        generate=functools.partial(memorisation, symbols=symbols, count=count),
        wrong=_any_wrong,
        damping=lambda length: symbols * count * length,
        strings=strings,
    )


TASKS = {
    "addition": _arithmetic("addition"),
    "multiplication": _arithmetic("multiplication", operation=jnp.multiply),
    "xor": _arithmetic(
        "exclusive or",
        operation=lambda a, b: jnp.abs(a - b),
        draw=bits,
        first=(2, 20),
        second=(30, 50),
    )._replace(loss=hfjax.losses.sigmoid_cross_entropy(), wrong=_wrong_sign),
    "temporal-order": _temporal_order("temporal order", (1, 10), (40, 50)),
    "temporal-order-3": _temporal_order(
        "temporal order of three", (1, 10), (30, 40), (50, 60)
    ),
    "permutation": Task(
        title="random permutation",
        features=100,
        outputs=100,
        loss=_classes(),
        every_step=True,
        generate=permutation,
        wrong=_last_wrong,
        damping=lambda length: length,
    ),
    "memorisation-5": _memorisation("5-bit memorisation", 2, 5, 2**5),
    "memorisation-20": _memorisation("20-bit memorisation", 5, 10, None),
}
"""By name. Sutskever's exclusive or has half the steps of his other problems, so that his
ranges for "T = 100" are ours for 50 steps."""
