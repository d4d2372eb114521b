"""The problems that optimizers are compared on: data, objective, start and floor.

Data never depend on the seed, the start does. There is no weight decay: f − floor is
then what a perfect model would bring to 0, and the same f for whoever has its own idea
of weight decay.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks import data, mnist, pinn_operators, pinn_problems, sequences
from benchmarks.network import autoencoder
from benchmarks.problem import SETUPS
from benchmarks.rnn_network import recurrent_network
from benchmarks.rnn_tasks import TASKS

_IMAGE_MILESTONES = (77.0, 27.0, 10.0, 1.0, 0.1)
_CLASSES = (784, 100, 100, 10)
_SEQUENCES, _LENGTH = 2_000, 30
_POINTS = 1_000


class Problem(NamedTuple):
    """What all optimizers are given.

    Attributes:
      title: in a few words.
      objective: f, without weight decay.
      batch: all training cases, `(inputs, targets)`.
      start: `key -> params`.
      floor: below which f cannot be.
      milestones: excesses of f over the floor, falling.
      parts: equal ones of the cases, which curvature is taken on in turn.
      damping: λ before the first update, on the scale of f.
      loss: `"sigmoid"`, `"softmax"` or `"squared"`, for who must be told.
      layered: whether every weight is used once for a case, as K-FAC wants it.
    """

    title: str
    objective: hfjax.Objective
    batch: Any
    start: Callable[[jax.Array], Any]
    floor: float
    milestones: tuple[float, ...]
    parts: int
    damping: float
    loss: str
    layered: bool = True


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

    def missing(self, data_dir: str) -> str | None:
        """Say why it cannot be built, if it cannot.

        Args:
          data_dir: the folder of mnist.npz.
        """
        path = Path(data_dir) / mnist.FILE
        if self.needs_mnist and not path.exists():
            return f"no {path}: give --data-dir the folder that holds {mnist.FILE}"
        return None


def curves(
    data_dir: str,
    *,
    cases: int,
    parts: int = 1,
    encoder: tuple[int, ...] = SETUPS["curves"].encoder,
) -> Problem:
    """Build the autoencoder of curves.

    Args:
      data_dir: not needed.
      cases: training images.
      parts: that curvature is taken on in turn.
      encoder: layer sizes from the pixels to the code.

    Returns:
      The problem.
    """
    del data_dir
    return _autoencoder("Curves", data.curves(cases, 1), encoder, parts)


def digits(data_dir: str, *, cases: int, parts: int) -> Problem:
    """Build the autoencoder of MNIST.

    Args:
      data_dir: the folder of mnist.npz.
      cases: training images, the first so many.
      parts: that curvature is taken on in turn.

    Returns:
      The problem.
    """
    images = mnist.load(data_dir)
    images = dataclasses.replace(images, train=images.train[:cases])
    return _autoencoder("MNIST", images, SETUPS["mnist"].encoder, parts)


def classifier(data_dir: str, *, cases: int) -> Problem:
    """Build a small classifier of MNIST's digits: tanh units, sparse start.

    Args:
      data_dir: the folder of mnist.npz.
      cases: training images, the first so many.

    Returns:
      The problem.
    """
    images = jnp.asarray(mnist.load(data_dir).train[:cases])
    labels = jnp.asarray(mnist.labels(data_dir)[:cases])
    sparse = hfjax.initializers.sparse()

    def start(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(_CLASSES) - 1)
        shapes = itertools.pairwise(_CLASSES)
        return [
            {"kernel": sparse(layer_key, shape), "bias": jnp.zeros(shape[1])}
            for layer_key, shape in zip(keys, shapes, strict=True)
        ]

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    layers = "-".join(map(str, _CLASSES))
    return Problem(
        title=f"Classifier of {cases:,} MNIST digits, {layers}, tanh",
        objective=hfjax.Objective(
            model_fn, hfjax.losses.softmax_cross_entropy_with_integer_labels()
        ),
        batch=(images, labels),
        start=start,
        floor=0.0,
        milestones=(1.0, 0.3, 0.1, 0.01, 0.001),
        parts=1,
        damping=1.0,
        loss="softmax",
    )


def recurrent(data_dir: str, *, cases: int = _SEQUENCES) -> Problem:
    """Build the addition problem, on sequences that stay the same.

    Args:
      data_dir: not needed.
      cases: sequences.

    Returns:
      The problem.
    """
    del data_dir
    task = TASKS["addition"]
    network = recurrent_network(task)
    return Problem(
        title=f"Recurrent network, addition over {_LENGTH} steps, {cases:,} sequences",
        objective=hfjax.Objective(network.model_fn, task.loss),
        batch=sequences.arithmetic(jax.random.key(0), cases, _LENGTH),
        start=network.init,
        floor=0.0,
        # 0.083 is the best constant's; 0.0008 an answer that is off by 0.04.
        milestones=(0.08, 0.03, 0.01, 0.001, 0.0001),
        parts=1,
        damping=1.0,
        loss="squared",
        layered=False,
    )


def equation(data_dir: str, *, cases: int = _POINTS) -> Problem:
    """Build a differential equation, in the precision that all of these problems have.

    −Δu = f on the unit square, u = Π sin(πxᵢ) on its edges: a case is a point inside and
    one on an edge. Below f = 1e-4 see `python -m benchmarks pinn`, in float64.

    Args:
      data_dir: not needed.
      cases: pairs of points.

    Returns:
      The problem.
    """
    del data_dir
    poisson = pinn_problems.PROBLEMS["poisson2d"]
    inside, edge = jax.random.split(jax.random.key(0))
    points = poisson.equation.inside(inside, cases)
    known = poisson.equation.given(edge, cases)
    values = poisson.equation.solution(known)

    def model_fn(params: Any, inputs: Any) -> jax.Array:
        inside, edge = inputs
        found = poisson.residual(params, inside), pinn_operators.network(params, edge)
        return jnp.stack(found, axis=-1)

    return Problem(
        title=f"Poisson's equation in 2d, {cases:,} points inside, as many on edges",
        objective=hfjax.Objective(model_fn, hfjax.losses.squared_error()),
        batch=((points, known), jnp.stack([jnp.zeros_like(values), values], axis=-1)),
        start=poisson.init,
        floor=0.0,
        milestones=(1.0, 0.1, 0.01, 0.001, 0.0001),
        parts=1,
        damping=1.0,
        loss="squared",
        layered=False,
    )


def _autoencoder(
    name: str, images: data.Images, encoder: tuple[int, ...], parts: int
) -> Problem:
    network = autoencoder(encoder)
    train = jnp.asarray(images.train)
    layers = "-".join(map(str, encoder))
    return Problem(
        title=f"{name}, {len(train):,} images, encoder {layers}",
        objective=hfjax.Objective(
            network.model_fn, hfjax.losses.sigmoid_cross_entropy()
        ),
        batch=(train, train),
        start=network.init,
        floor=images.entropy_floor(),
        milestones=_IMAGE_MILESTONES,
        parts=parts,
        damping=45.0,  # Martens' program, for losses summed over 784 outputs
        loss="sigmoid",
    )


# Parts of 5,000 are Martens' for his 20,000 curves.
PROBLEMS = {
    "curves2000": Kind(
        "autoencoder of 2,000 curves", functools.partial(curves, cases=2_000)
    ),
    "curves20000": Kind(
        "autoencoder of 20,000 curves",
        functools.partial(curves, cases=20_000, parts=4),
    ),
    "mnist10000": Kind(
        "autoencoder of MNIST's first 10,000 images",
        functools.partial(digits, cases=10_000, parts=2),
        needs_mnist=True,
    ),
    "mnist": Kind(
        "autoencoder of MNIST's 60,000 images",
        functools.partial(digits, cases=60_000, parts=8),
        needs_mnist=True,
    ),
    "rnn": Kind(f"recurrent network on addition, {_LENGTH} steps", recurrent),
    "poisson": Kind(f"differential equation, {_POINTS:,} points", equation),
    "classifier": Kind(
        "classifier of MNIST's first 10,000 digits",
        functools.partial(classifier, cases=10_000),
        needs_mnist=True,
    ),
}
"""By the name on the command line."""
