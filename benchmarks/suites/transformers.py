"""The suite of small transformers, as people write them in Flax, that learn examples by heart.

Symbols, tags and labels are random, so all that can be learned is the examples; the floor
is what stays unknown then. About 20,000 parameters each.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hfjax
from benchmarks import cli
from benchmarks.suites.problem import (
    Kind,
    Problem,
    Suite,
    Summary,
    excess_over,
    full_batch_measurer,
    shuffled,
)

CASES, STEPS, PATCHES, PIXELS = 256, 16, 16, 9
_MINIBATCH = 32


def writer() -> Problem:
    """Build the problem of sequences to be written from their first symbol."""
    networks = _networks()
    symbols = np.random.default_rng(0).integers(
        networks.SYMBOLS, size=(CASES, STEPS + 1)
    )
    # Nothing but the first symbol tells which of the sequences that begin so comes.
    counts = np.bincount(symbols[:, 0], minlength=networks.SYMBOLS)
    floor = float(np.mean(np.log(counts[symbols[:, 0]])))
    batch = (symbols[:, :-1], symbols[:, 1:])
    title = f"{CASES} sequences of {STEPS + 1} symbols, each symbol from those before"
    return _problem(networks.Writer(), batch, title, floor, (30.0, 10.0, 3.0, 1.0, 0.3))


def tagger() -> Problem:
    """Build the problem of sequences of different lengths with random tags."""
    networks, generator = _networks(), np.random.default_rng(0)
    symbols = generator.integers(1, networks.SYMBOLS + 1, size=(CASES, STEPS))
    tags = generator.integers(networks.TAGS, size=symbols.shape)
    lengths = generator.integers(STEPS // 2, STEPS + 1, size=CASES)
    there = np.arange(STEPS) < lengths[:, None]
    floor = float(np.mean(np.sum(~there, axis=1)) * np.log(networks.TAGS))
    batch = (np.where(there, symbols, 0), np.where(there, tags, 0))
    title = f"Tags of {CASES} sequences of {STEPS // 2} to {STEPS} symbols"
    return _problem(networks.Tagger(), batch, title, floor, (20.0, 10.0, 3.0, 1.0, 0.3))


def vision() -> Problem:
    """Build the problem of random images with random labels."""
    networks, generator = _networks(), np.random.default_rng(0)
    patches = generator.standard_normal((CASES, PATCHES, PIXELS), dtype=np.float32)
    batch = (patches, generator.integers(networks.LABELS, size=CASES))
    title = f"Labels of {CASES} images of {PATCHES} patches"
    return _problem(networks.Vision(), batch, title, 0.0, (1.0, 0.3, 0.1, 0.03, 0.01))


def _problem(
    network: Any,
    arrays: Any,
    title: str,
    floor: float,
    milestones: tuple[float, ...],
) -> Problem:
    batch = jax.tree.map(jnp.asarray, arrays)
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels()
    objective = hfjax.Objective(lambda p, x: network.apply({"params": p}, x), loss)

    def start(key: jax.Array) -> Any:
        return network.init(key, batch[0][:1])["params"]

    return Problem(
        summary=Summary(
            title=title,
            value="f − the lowest",
            milestones=excess_over(milestones),
            floor=floor,
        ),
        objective=objective,
        start=start,
        data=lambda seed: batch,
        measurer=full_batch_measurer(objective, batch, floor),
        minibatches=shuffled(batch, _MINIBATCH),
        loss="softmax",
    )


def _networks() -> ModuleType:
    try:  # Only this suite needs Flax.
        from benchmarks.suites import transformer_networks
    except ImportError as error:
        msg = f"{error}: pip install 'hfjax[flax]'"
        raise cli.RefusedError(msg) from error
    return transformer_networks


SUITE = Suite(
    name="transformers",
    title="small transformers that learn examples by heart, by f above its floor",
    problems={
        "writer": Kind("sequences, each symbol from those before", lambda _: writer()),
        "tagger": Kind("tags of sequences of different lengths", lambda _: tagger()),
        "vision": Kind("labels of images in patches", lambda _: vision()),
    },
    default=("writer", "tagger", "vision"),
    optimizers=("hfjax", "sacrifice", "ratio", "stochastic", "adam", "muon", "lbfgs"),
    seconds=20.0,
)
