"""The experiments of Martens (2010): images, network, objective and start."""

import argparse
import dataclasses
import os
from typing import Any, NamedTuple

import jax

import hfjax
from benchmarks import data, mnist, options
from benchmarks.data import PIXELS, Images
from benchmarks.network import Autoencoder, Layers, autoencoder

CURVES = 1000
"""Training images of curves in the demo, few enough for its half minute; Martens had
20,000."""


class Setup(NamedTuple):
    """Sizes and weight decay of one experiment, as in his program.

    Attributes:
      title: of the images.
      encoder: layer sizes from the pixels to the code.
      weight_decay: on all parameters.
      curvature_batches: parts of the images, if neither is asked for.
    """

    title: str
    encoder: tuple[int, ...]
    weight_decay: float
    curvature_batches: int


SETUPS = {
    "curves": Setup("CURVES-like", (PIXELS, 400, 200, 100, 50, 25, 6), 2e-5, 1),
    "mnist": Setup("MNIST", (PIXELS, 1000, 500, 250, 30), 1e-5, 8),
}


class Problem(NamedTuple):
    """What all racers are given.

    Attributes:
      title: in a few words.
      encoder: layer sizes from the pixels to the code.
      images: to learn and to be tested on.
      network: the model.
      objective: f.
      params: where all start.
      curvature_batches: parts of the training images, for HF.
    """

    title: str
    encoder: tuple[int, ...]
    images: Images
    network: Autoencoder
    objective: hfjax.Objective
    params: Layers
    curvature_batches: int

    def document(self) -> dict[str, Any]:
        """Describe the problem and the machine in JSON's types."""
        return {
            "title": self.title,
            "data": self.images.name,
            "cases": len(self.images.train),
            "test_cases": len(self.images.test),
            "encoder": list(self.encoder),
            "weight_decay": self.objective.weight_decay,
            "curvature_batches": self.curvature_batches,
            **machine(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that make the problem.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--data", choices=tuple(SETUPS), default="curves", help="default: curves")
    add("--data-dir", default="data", help="of mnist.npz; default: data")
    add("--download", action="store_true", help="fetch mnist.npz if it is missing")
    add(
        "--cases",
        type=options.count,
        help=f"training images, and half as many for testing; default: {CURVES} "
        "curves, all of MNIST",
    )
    add(
        "--layers",
        type=options.layers,
        help="sizes from the pixels to the code; default: Martens' for the data",
    )
    add(
        "--curvature-batches",
        type=options.count,
        help="parts of the images that HF takes the curvature on, in turn; default: "
        "1, for all of MNIST 8",
    )
    add("--seed", type=int, default=0, help="of start and shuffling; default: 0")


def build(args: argparse.Namespace) -> Problem:
    """Build the problem that is asked for.

    Args:
      args: with the options of `add_arguments`.

    Returns:
      The problem.

    Raises:
      OSError: if the images are not to be had.
      ValueError: if they are not what they should be, or cannot be cut up so.
    """
    setup = SETUPS[args.data]
    images = _images(args)
    cases = len(images.train)
    usual = setup.curvature_batches if args.cases is None else 1
    batches = args.curvature_batches or usual
    if cases % batches:
        msg = f"--curvature-batches must divide the {cases} images, got {batches}"
        raise ValueError(msg)
    encoder = args.layers or setup.encoder
    network = autoencoder(encoder)
    objective = hfjax.Objective(
        network.model_fn,
        hfjax.losses.sigmoid_cross_entropy(),
        weight_decay=setup.weight_decay,
    )
    layers = "-".join(map(str, encoder))
    return Problem(
        title=f"{setup.title}, {cases:,} images, encoder {layers}",
        encoder=encoder,
        images=images,
        network=network,
        objective=objective,
        params=jax.jit(network.init)(jax.random.key(args.seed)),
        curvature_batches=batches,
    )


def machine() -> dict[str, Any]:
    """Describe what the numbers are measured on, in JSON's types.

    Returns:
      Device, processors and versions.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "processors": os.cpu_count(),
        "jax": jax.__version__,
        "hfjax": hfjax.__version__,
    }


def _images(args: argparse.Namespace) -> Images:
    """Make or read the images; half as many for testing as for training."""
    if args.data == "curves":
        cases = args.cases or CURVES
        return data.curves(cases, max(1, cases // 2))
    images = mnist.load(args.data_dir, download=args.download)
    cases = args.cases
    if cases is None:
        return images
    if cases > len(images.train):
        msg = f"--cases: MNIST has {len(images.train)} training images, got {cases}"
        raise ValueError(msg)
    return dataclasses.replace(
        images, train=images.train[:cases], test=images.test[: max(1, cases // 2)]
    )
