"""What the runs of the suite `minibatch` came to, by the size of their batches.

    python -m benchmarks compare --suite minibatch --problem all --out runs/minibatch
    python -m benchmarks batches --out runs/minibatch

It reads the files that the comparison left, and prints tables in Markdown.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks import cli
from benchmarks.harness import history, table
from benchmarks.harness.history import Run, RunFile
from benchmarks.harness.table import Line
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites.minibatch import SUITE, SUMMARIES
from benchmarks.suites.problem import Summary

_UNIT = "adam"
"""Its updates, one gradient each, are what others are counted in."""

_MILLION = 1e6

Lines = dict[str, Line]
"""What the runs on a problem came to, by optimizer."""


class Quantity(NamedTuple):
    """What a table shows.

    Attributes:
      title: `{value}` is what the problem is judged by.
      words: what the cells are.
      cells: `(lines, size of a batch) -> number by optimizer`; NaN if there is none.
      best: of the numbers in a row.
    """

    title: str
    words: str
    cells: Callable[[Lines, int], dict[str, float]]
    best: Callable[[Sequence[float]], float] = min


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--out",
        default=f"runs/{SUITE.name}",
        help=f"the folder of the comparison; default: runs/{SUITE.name}",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables of each kind of problem."""
    try:
        found = read(Path(args.out))
    except (OSError, ValueError) as error:
        raise cli.RefusedError(error) from error
    if not found:
        msg = f"no runs of --suite {SUITE.name} in {args.out}"
        raise cli.RefusedError(msg)
    console = Console(highlight=False, soft_wrap=True)
    for kind, runs in found.items():
        for text in tables(SUMMARIES[kind], runs):
            console.print(text, markup=False)
    return 0


def read(folder: Path) -> dict[str, dict[int, list[RunFile]]]:
    """Read the runs that the suite has in a folder.

    Returns:
      By kind of problem, and by the size of a batch.

    Raises:
      ValueError: if a file does not hold a run.
    """
    found: dict[str, dict[int, list[RunFile]]] = {}
    names = [*OPTIMIZERS]
    files = (history.read(path) for path in sorted(folder.glob("runs/*.json")))
    runs = [one for one in files if one and one.settings.get("suite") == SUITE.name]
    for one in sorted(runs, key=lambda one: names.index(one.plan.optimizer)):
        kind, _, size = one.plan.problem.rpartition("-")
        found.setdefault(kind, {}).setdefault(int(size), []).append(one)
    return {kind: found[kind] for kind in SUMMARIES if kind in found}


def tables(summary: Summary, runs: Mapping[int, Sequence[RunFile]]) -> Iterator[str]:
    """Lay out the tables of a kind of problem in Markdown.

    Args:
      summary: of the problem.
      runs: by the size of a batch.
    """
    lines = {
        size: {line.optimizer: line for line in table.lines(runs[size], summary)}
        for size in sorted(runs)
    }
    columns = [
        name for name in OPTIMIZERS if any(name in its for its in lines.values())
    ]
    for quantity in QUANTITIES:
        rows = [["batch", *columns]]
        for size, its in lines.items():
            found = quantity.cells(its, size)
            numbers = [found.get(name, math.nan) for name in columns]
            rows.append([f"{size:,}", *_row(numbers, quantity.best)])
        title = f"{summary.title}: {quantity.title.format(value=summary.value)}"
        yield table.markdown(title, rows, quantity.words)


def _row(
    numbers: Sequence[float], best: Callable[[Sequence[float]], float]
) -> list[str]:
    """Write the numbers of a row, the best of them in bold."""
    finite = [x for x in numbers if math.isfinite(x)]
    winner = best(finite) if finite else math.nan
    words = (table.spread([x]) for x in numbers)
    return [
        f"**{word}**" if x == winner else word
        for x, word in zip(numbers, words, strict=True)
    ]


def _each(number: Callable[[Run], float]) -> Callable[[Lines, int], dict[str, float]]:
    """Return the cells that are medians over the seeds."""

    def cells(lines: Lines, size: int) -> dict[str, float]:
        del size
        return {name: _median(line, number) for name, line in lines.items()}

    return cells


def _median(line: Line, number: Callable[[Run], float]) -> float:
    return statistics.median(number(one.run) for one in line.runs)


def _lowest(run: Run) -> float:
    return table.judged(run, Summary("", "", {}, lowest=True))


def _seconds(run: Run) -> float:
    """Return the seconds of an update."""
    return run.last.seconds / run.last.updates if run.last.updates else math.nan


def _seconds_of_gradients(lines: Lines) -> float:
    """Return the seconds of Adam's update, NaN if it was not run."""
    return _median(lines[_UNIT], _seconds) if _UNIT in lines else math.nan


def _costs(lines: Lines, size: int) -> dict[str, float]:
    unit = _seconds_of_gradients(lines)
    return {name: x / unit for name, x in _each(_seconds)(lines, size).items()}


def _gains(lines: Lines, size: int) -> dict[str, float]:
    """Return how far ln f falls for a million gradients of examples."""
    unit = _seconds_of_gradients(lines) / size  # seconds of an example's gradient

    def gain(run: Run) -> float:
        losses = [row.loss for row in run.rows if math.isfinite(row.loss)]
        if not (run.last.seconds and losses and min(losses) > 0):
            return math.nan
        fall = math.log(losses[0] / min(losses))
        return _MILLION * fall / (run.last.seconds / unit)

    return _each(gain)(lines, size)


_OF_ALL = "Each with its best learning rate; the median over seeds; – not run"
QUANTITIES = (
    Quantity(
        "lowest {value}",
        f"The lowest of a run, on examples that no update sees. {_OF_ALL}.",
        _each(_lowest),
    ),
    Quantity(
        "f at the end",
        f"On examples of the training, when the seconds are over. {_OF_ALL}, or diverged.",
        _each(lambda run: run.last.loss),
    ),
    Quantity(
        "what an update costs",
        "Seconds of an update, divided by those of Adam's with the same batch: gradients "
        f"of the batch. {_OF_ALL}, or not beside Adam.",
        _costs,
    ),
    Quantity(
        "gain for a million gradients",
        "ln of f at the start over the lowest f, for as many seconds as Adam takes for the "
        f"gradients of a million examples. {_OF_ALL}, or not beside Adam.",
        _gains,
        max,
    ),
)
