"""The tasks: each a kind of sequence, its loss, and when an answer is wrong."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks import sequences
from benchmarks.sequences import Batch

_TOLERANCE = 0.04
"""Of a real answer (Hochreiter & Schmidhuber 1997)."""


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
        generate=functools.partial(sequences.arithmetic, **options),
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
        generate=functools.partial(sequences.temporal_order, windows=windows),
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
        generate=functools.partial(
            sequences.memorisation, symbols=symbols, count=count
        ),
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
        draw=sequences.bits,
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
        generate=sequences.permutation,
        wrong=_last_wrong,
        damping=lambda length: length,
    ),
    "memorisation-5": _memorisation("5-bit memorisation", 2, 5, 2**5),
    "memorisation-20": _memorisation("20-bit memorisation", 5, 10, None),
}
"""By the name on the command line. Sutskever's exclusive or has half the steps of his
other problems, so that his ranges for "T = 100" are ours for 50 steps."""
