"""Exact updates of a classifier: a row of the Jacobian for each class, or for each label.

    python -m benchmarks rows --data-dir DIR --cases 500,1000,2000 --seeds 0,1,2

A small tanh network learns MNIST's digits, whose sides are halved. Each update is solved
exactly, on the next batch of so many digits. Both ways have the same f, start and batches.
"""

import argparse
import statistics
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.table import rich_table
from benchmarks.optimizers import MOMENTUM, ours
from benchmarks.suites import mnist
from benchmarks.suites.classifier import classification
from benchmarks.suites.problem import alone
from hfjax import hessian_free, sample_space

WAYS = {"each class": "full", "each label": "true_class"}
_SIZES = (196, 20, 10)
_DIGITS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--data-dir", default="data", help="the folder that holds mnist.npz")
    add("--cases", type=lambda word: cli.listed(cli.count, word), default=(500, 1000))
    add("--updates", type=lambda word: cli.listed(cli.count, word), default=(20, 40))
    add("--seeds", type=lambda word: cli.listed(cli.seed, word), default=(0,))
    add("--out", default="runs/rows.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Train both ways; print and write down f and the seconds of an update."""
    path, rows = cli.output_file(args.out), []
    try:
        images, labels = mnist.images(args.data_dir), mnist.labels(args.data_dir)
    except (OSError, ValueError) as error:
        raise cli.RefusedError(error) from error
    digits = halved(images[:_DIGITS]), labels[:_DIGITS]
    counts = sorted(args.updates)
    cells = [
        ["digits", "a row for", *(f"f, {n} updates" for n in counts), "s an update"]
    ]
    for cases in args.cases:
        for way, curvature in WAYS.items():
            taken = [
                train(*digits, curvature, cases, seed, counts) for seed in args.seeds
            ]
            rows += [{"cases": cases, "way": way, **one} for one in taken]
            reached = zip(*(one["losses"] for one in taken), strict=True)
            words = ("; ".join(f"{loss:.3g}" for loss in each) for each in reached)
            seconds = statistics.median(one["seconds"] for one in taken)
            cells.append([f"{cases:,}", way, *words, f"{seconds:.2f}"])
    write_json(path, {"arguments": vars(args), **machine.describe(), "rows": rows})
    Console().print(rich_table(cells, f"f on all digits; seeds {args.seeds}"))
    return 0


def halved(images: np.ndarray) -> np.ndarray:
    """Average the pixels two by two."""
    side = mnist.SIDE // 2
    return images.reshape(-1, side, 2, side, 2).mean(axis=(2, 4)).reshape(-1, side**2)


def train(
    images: np.ndarray,
    labels: np.ndarray,
    curvature: str,
    cases: int,
    seed: int,
    counts: list[int],
) -> dict[str, Any]:
    """Train once; return f after so many updates, and an update's processor seconds."""
    problem = classification(images, labels, _SIZES, curvature)
    params = jax.jit(problem.start)(jax.random.key(seed))
    solver = sample_space.cholesky(momentum=MOMENTUM)
    tx = hessian_free(problem.objective, solver=solver)
    racer = ours(tx, problem, params, seed, alone(len(images) // cases))
    measure = problem.measurer(params, seed)
    clock, carry, losses, seconds = (
        machine.CLOCKS["processor"],
        racer.init(params),
        [],
        [],
    )
    for count in range(1, counts[-1] + 1):
        start = clock()
        carry = jax.block_until_ready(racer.step(carry))
        seconds.append(clock() - start)
        if count in counts:
            losses.append(measure(carry.params, count)[0])
    return {"seed": seed, "losses": losses, "seconds": statistics.median(seconds)}
