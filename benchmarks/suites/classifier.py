"""The suite of a classifier: a small tanh network on MNIST's digits.

The examples can be told apart, so that f goes to 0.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import hfjax
from benchmarks.suites import mnist
from benchmarks.suites.images import Layers, sparse_layers
from benchmarks.suites.problem import (
    Kind,
    Problem,
    Suite,
    Summary,
    excess_over,
    full_batch_measurer,
    shuffled,
)

SIZES = (784, 100, 100, 10)
_CASES = 10_000


def tanh_network(params: Layers, x: jax.Array) -> jax.Array:
    """Map `[cases, inputs]` to logits, through dense layers with tanh between them."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def classification(
    images: np.ndarray,
    labels: np.ndarray,
    sizes: Sequence[int] = SIZES,
    curvature: str = "full",
) -> Problem:
    """Build the problem of a classifier, with a curvature of its loss."""
    loss = hfjax.losses.softmax_cross_entropy_with_integer_labels(curvature=curvature)
    objective = hfjax.Objective(tanh_network, loss)
    batch = (jnp.asarray(images), jnp.asarray(labels))
    layers = "-".join(map(str, sizes))
    return Problem(
        summary=Summary(
            title=f"Classifier of {len(images):,} MNIST digits, {layers}, tanh",
            value="f",
            milestones=excess_over((1.0, 0.3, 0.1, 0.01, 0.001)),
        ),
        objective=objective,
        start=sparse_layers(sizes),
        data=lambda seed: batch,
        measurer=full_batch_measurer(objective, batch, 0.0),
        minibatches=shuffled(batch),
        loss="softmax",
        layered=True,
    )


def _digits(data_dir: str) -> Problem:
    images, labels = mnist.images(data_dir), mnist.labels(data_dir)
    return classification(images[:_CASES], labels[:_CASES])


SUITE = Suite(
    name="classifier",
    title="a classifier of digits, by f",
    problems={"digits": Kind("MNIST's first 10,000 digits", _digits, needs_mnist=True)},
    default=("digits",),
    optimizers=("hfjax", "adam", "muon", "lbfgs", "kfac", "somax", "optimistix"),
    seconds=40.0,
)
