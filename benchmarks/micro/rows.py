"""Exact updates of a classifier: a row of the Jacobian for each class, or for each label.

    python -m benchmarks rows --data-dir DIR --cases 500,1000,2000 --seeds 0,1,2

A small tanh network learns MNIST's digits, whose sides are halved. Each update is solved
exactly, on the next batch of so many digits. Both ways have the same f, start and batches,
and the second as many processor seconds as the first.
"""

import argparse
import statistics

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
from benchmarks.suites.problem import Problem, alone
from hfjax import hessian_free, sample_space

WAYS = {"each class": "full", "each label": "true_class"}
_SIZES = (196, 10, 10)
_DIGITS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--data-dir", default="data", help="the folder that holds mnist.npz")
    add("--cases", type=lambda word: cli.listed(cli.count, word), default=(500, 1000))
    add("--updates", type=lambda word: cli.listed(cli.count, word), default=(10, 20))
    add("--seeds", type=lambda word: cli.listed(cli.seed, word), default=(0,))
    add("--out", default="runs/rows.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Train both ways, a row for each class first; print and write down f and seconds."""
    path, rows = cli.output_file(args.out), []
    try:
        images, labels = mnist.images(args.data_dir), mnist.labels(args.data_dir)
    except (OSError, ValueError) as error:
        raise cli.RefusedError(error) from error
    digits, counts = (halved(images[:_DIGITS]), labels[:_DIGITS]), sorted(args.updates)
    reached = [*(f"f, {n} updates" for n in counts), "f, the same seconds"]
    cells = [["digits", "a row for", *reached, "updates", "s an update"]]
    for cases in args.cases:
        allowed = dict.fromkeys(args.seeds, 0.0)
        for way, curvature in WAYS.items():
            problem, runs = classification(*digits, _SIZES, curvature), []
            for seed in args.seeds:
                losses, updates, spent = train(
                    problem, cases, seed, counts, allowed[seed]
                )
                allowed[seed] = max(allowed[seed], spent)
                found = {"seed": seed, "losses": losses, "updates": updates}
                runs.append({**found, "seconds": spent / updates})
            words = [
                "; ".join(f"{loss:.3g}" for loss in each)
                for each in zip(*(run["losses"] for run in runs), strict=True)
            ]
            most, seconds = (
                statistics.median(run[name] for run in runs)
                for name in ("updates", "seconds")
            )
            cells.append([f"{cases:,}", way, *words, f"{most:,.0f}", f"{seconds:.2f}"])
            rows += [{"cases": cases, "way": way, **run} for run in runs]
    write_json(path, {"arguments": vars(args), **machine.describe(), "rows": rows})
    Console().print(rich_table(cells, f"f on all digits; seeds {args.seeds}"))
    return 0


def halved(images: np.ndarray) -> np.ndarray:
    """Average the pixels two by two."""
    side = mnist.SIDE // 2
    return images.reshape(-1, side, 2, side, 2).mean(axis=(2, 4)).reshape(-1, side**2)


def train(
    problem: Problem, cases: int, seed: int, counts: list[int], allowed: float
) -> tuple[list[float], int, float]:
    """Train for the most updates of `counts`, and then on until the seconds are over.

    Returns:
      f after so many updates and at the end; the updates, and their processor seconds.
    """
    params = jax.jit(problem.start)(jax.random.key(seed))
    solver = sample_space.cholesky(momentum=MOMENTUM)
    tx = hessian_free(problem.objective, solver=solver)
    racer = ours(tx, problem, params, seed, alone(max(1, _DIGITS // cases)))
    measure, clock = problem.measurer(params, seed), machine.CLOCKS["processor"]
    carry, losses, spent, updates = racer.init(params), [], 0.0, 0
    while updates < counts[-1] or spent < allowed:
        start = clock()
        carry = jax.block_until_ready(racer.step(carry))
        spent, updates = spent + clock() - start, updates + 1
        if updates in counts:
            losses.append(measure(carry.params, updates)[0])
    return [*losses, measure(carry.params, updates)[0]], updates, spent
