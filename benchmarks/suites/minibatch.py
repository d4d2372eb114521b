"""The suite of networks whose examples are drawn anew for each update.

They are judged on examples that no update sees. All optimizers get batches of the same
size, and an update with the same number gets the same batch. The text is the source of
Python's own library, and therefore depends on Python's version.
"""

import dataclasses
import functools
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hfjax
from benchmarks import cli
from benchmarks.suites import classifier, mnist, sequences
from benchmarks.suites.images import sparse_layers
from benchmarks.suites.problem import (
    Kind,
    Measure,
    Minibatches,
    Problem,
    Suite,
    Summary,
)

SIZES = (64, 256, 1024, 4096, 16384)
"""Examples of an update."""

STEPS, SYMBOLS = 64, 96
"""Symbols of a window of text, and of the alphabet: those of ASCII, and the newline."""

WINDOWS = 256
"""Of each part of the text, on which f and the value are measured."""

_CHARACTERS, _HELD_OUT = 4_000_000, 0.1
_MEASURED = 10_000  # training digits, for f
_CHUNK, _TEXT_CHUNK = 1_000, 32  # digits and windows that are measured at a time
_LENGTH = 30  # steps of an addition
_SPACE, _LAST = 32, 126  # of printable ASCII
_LEVELS = {"10 %": 0.1, "5 %": 0.05, "3 %": 0.03, "2 %": 0.02}


def _summary(title: str, value: str, milestones: Mapping[str, float]) -> Summary:
    return Summary(title, value, milestones, lowest=True)


SUMMARIES = {
    "digits": _summary(
        "Classifier of MNIST's digits, 784-100-100-10, tanh",
        "fraction of wrong test digits",
        _LEVELS,
    ),
    "cnn": _summary(
        "Convolutional network on MNIST's digits",
        "fraction of wrong test digits",
        _LEVELS,
    ),
    "text": _summary(
        "Transformer that writes Python, symbol by symbol",
        "nats a symbol of other text",
        {"3": 3.0, "2.5": 2.5, "2": 2.0, "1.75": 1.75},
    ),
    "addition": _summary(
        f"Recurrent network that adds, {_LENGTH} steps",
        "fraction of wrong answers",
        {"50 %": 0.5, "10 %": 0.1, "1 %": 0.01},
    ),
}
"""By kind, whatever the size of a batch."""


class Examples(NamedTuple):
    """What updates learn from, and what they are judged by.

    Attributes:
      training: a tree of arrays, from which updates draw.
      measured: of these, those that f is measured on: inputs and targets.
      held_out: inputs and targets that no update sees.
      chunk: how many are measured at a time, so that memory stays small.
    """

    training: Any
    measured: Any
    held_out: Any
    chunk: int


Take = Callable[[Any, jax.Array, int], Any]
"""`(training arrays, key, size) -> batch`."""


def digits(data_dir: str, size: int) -> Problem:
    """Build the problem of a small tanh network on digits."""
    start = sparse_layers(classifier.SIZES)
    model_fn, examples = classifier.tanh_network, read_digits(data_dir)
    problem = _classification("digits", size, model_fn, start, examples)
    return dataclasses.replace(problem, layered=True)


def cnn(data_dir: str, size: int) -> Problem:
    """Build the problem of a convolutional network on digits."""
    network = _networks().Convolutional()
    examples = read_digits(data_dir)

    def start(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, classifier.SIZES[0])))["params"]

    def model_fn(params: Any, pixels: jax.Array) -> jax.Array:
        return network.apply({"params": params}, pixels)

    problem = _classification("cnn", size, model_fn, start, examples)
    return dataclasses.replace(problem, looped=False)


def text(data_dir: str, size: int) -> Problem:
    """Build the problem of a transformer that writes the source of Python's library."""
    del data_dir
    network, examples = _networks().Reader(SYMBOLS), read_text()
    softmax = hfjax.losses.softmax_cross_entropy_with_integer_labels()
    loss = hfjax.losses.scaled(1 / STEPS, softmax)  # nats a symbol, and not a window

    def start(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, STEPS), jnp.int32))["params"]

    def model_fn(params: Any, symbols: jax.Array) -> jax.Array:
        return network.apply({"params": params}, symbols)

    objective = hfjax.Objective(model_fn, loss)
    value, take = objective.loss.value, _windows_of
    return _problem("text", size, objective, start, examples, take, value)


def addition(data_dir: str, size: int) -> Problem:
    """Build the addition task of the suite `sequences` with batches of this size."""
    del data_dir
    problem = sequences.drawn("addition", _LENGTH, size)
    assert problem.redraw is not None
    return dataclasses.replace(
        problem,
        summary=_sized("addition", size)._replace(note=problem.summary.note),
        minibatches=_as_redrawn(problem.redraw, size),
        parts=1,  # The same batch as all others have.
    )


def read_digits(data_dir: str) -> Examples:
    """Read MNIST, and hold out its test digits."""
    training, held_out = (
        (
            jnp.asarray(mnist.images(data_dir, part)),
            jnp.asarray(mnist.labels(data_dir, part)),
        )
        for part in ("train", "test")
    )
    return Examples(training, tuple(x[:_MEASURED] for x in training), held_out, _CHUNK)


def read_text() -> Examples:
    """Read the source of Python's library, and hold out the last tenth."""
    symbols = encoded(library())
    cut = len(symbols) - int(_HELD_OUT * len(symbols))
    training, held_out = jnp.asarray(symbols[:cut]), jnp.asarray(symbols[cut:])
    measured = spread_windows(training), spread_windows(held_out)
    return Examples(training, *measured, _TEXT_CHUNK)


def library() -> bytes:
    """Return the source of the modules at the top of Python's library, in their order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(file.read_bytes() for file in files)


def encoded(source: bytes) -> np.ndarray:
    """Number the symbols of a text, up to a length; others than ours are dropped.

    Returns:
      uint8, from 0 to 94 for the printable ones of ASCII, and 95 for the newline.
    """
    codes = np.frombuffer(source, np.uint8)
    is_newline = codes == ord("\n")
    ours = is_newline | ((codes >= _SPACE) & (codes <= _LAST))
    symbols = np.where(is_newline, SYMBOLS - 1, codes - _SPACE)
    return symbols[ours][:_CHARACTERS].astype(np.uint8)


def windows(symbols: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut windows out of a text: their symbols, and after each the next one."""
    found = symbols[starts[:, None] + jnp.arange(STEPS + 1)].astype(jnp.int32)
    return found[:, :-1], found[:, 1:]


def spread_windows(symbols: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cut out windows that are spread evenly."""
    starts = np.linspace(0, len(symbols) - STEPS - 1, WINDOWS).astype(np.int32)
    return windows(symbols, jnp.asarray(starts))


def _windows_of(symbols: jax.Array, key: jax.Array, size: int) -> Any:
    starts = jax.random.randint(key, (size,), 0, len(symbols) - STEPS)
    return windows(symbols, starts)


def _rows_of(arrays: Any, key: jax.Array, size: int) -> Any:
    chosen = jax.random.randint(key, (size,), 0, len(jax.tree.leaves(arrays)[0]))
    return jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=0), arrays)


def _classification(
    name: str,
    size: int,
    model_fn: Callable[[Any, jax.Array], jax.Array],
    start: Callable[[jax.Array], Any],
    examples: Examples,
) -> Problem:
    """Build a problem of digits, judged by those that get another label."""
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()

    def is_wrong(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.argmax(outputs, axis=-1) != labels

    objective = hfjax.Objective(model_fn, loss)
    return _problem(name, size, objective, start, examples, _rows_of, is_wrong)


def _problem(
    name: str,
    size: int,
    objective: hfjax.Objective,
    start: Callable[[jax.Array], Any],
    examples: Examples,
    take: Take,
    value: Callable[[Any, Any], jax.Array],
) -> Problem:
    """Build a problem; `value(outputs, targets)` judges each held-out example."""

    def redraw(data: Any, carry: Any) -> Any:
        key, arrays = data
        return take(arrays, jax.random.fold_in(key, carry.updates), size)

    return Problem(
        summary=_sized(name, size),
        objective=objective,
        start=start,
        data=lambda seed: (jax.random.key(seed), examples.training),
        measurer=functools.partial(_measurer, objective, examples, value),
        minibatches=_as_redrawn(redraw, size),
        redraw=redraw,
        loss="softmax",
    )


def _sized(name: str, size: int) -> Summary:
    summary = SUMMARIES[name]
    return summary._replace(title=f"{summary.title}, {size:,} in each update")


def _as_redrawn(redraw: Callable[[Any, Any], Any], size: int) -> Minibatches:
    """Give first-order optimizers the batches that all others have."""
    return Minibatches(
        lambda data, carry, key: (redraw(data, carry), None), f"batches of {size:,}"
    )


def _measurer(
    objective: hfjax.Objective,
    examples: Examples,
    value: Callable[[Any, Any], jax.Array],
    params: Any,
    seed: int,
) -> Measure:
    """Measure f on examples of the training, and the value on those held out."""
    del seed

    def mean(of: Callable[[Any, Any], jax.Array], params: Any, batch: Any) -> jax.Array:
        def one(part: Any) -> jax.Array:
            inputs, targets = part
            values = of(objective.model_fn(params, inputs), targets)
            return jnp.mean(values.astype(jnp.float32))

        chunked = -1, examples.chunk
        parts = jax.tree.map(lambda x: x.reshape(*chunked, *x.shape[1:]), batch)
        return jnp.mean(jax.lax.map(one, parts))

    def tested(params: Any, measured: Any, held_out: Any) -> tuple[jax.Array, ...]:
        loss = mean(objective.loss.value, params, measured)
        return loss, mean(value, params, held_out)

    batches = examples.measured, examples.held_out
    compiled = jax.jit(tested).lower(params, *batches).compile()

    def measure(params: Any, updates: int) -> tuple[float, float]:
        del updates
        loss, judged = jax.device_get(compiled(params, *batches))
        return float(loss), float(judged)

    return measure


def _networks() -> ModuleType:
    try:  # Only some of these problems need Flax.
        from benchmarks.suites import minibatch_networks
    except ImportError as error:
        msg = f"{error}: pip install 'hfjax[flax]'"
        raise cli.RefusedError(msg) from error
    return minibatch_networks


_BUILDERS = {"digits": digits, "cnn": cnn, "text": text, "addition": addition}

PROBLEMS = {
    f"{name}-{size}": Kind(
        f"{SUMMARIES[name].title}, {size:,} in each update",
        functools.partial(build, size=size),
        needs_mnist=build in (digits, cnn),
    )
    for name, build in _BUILDERS.items()
    for size in SIZES
}

SUITE = Suite(
    name="minibatch",
    title="networks whose examples are drawn anew for each update, by other examples",
    problems=PROBLEMS,
    default=("digits-256", "digits-1024", "digits-4096"),
    optimizers=("hfjax", "stochastic", "adam", "muon", "lbfgs", "kfac", "kron"),
    seconds=20.0,
)
