"""What the runs on a problem have come to: a line for each optimizer, and the table."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.compare_history import Ended, Row
from benchmarks.milestones import first_below

DISTURBED = 1.25
"""Where the probe took so many times the best, the machine was not free."""


class Line(NamedTuple):
    """What the runs of one optimizer, one for each seed, have come to.

    Attributes:
      optimizer: its name.
      runs: of its best learning rate, if it has several.
      reached: seconds of training to each milestone, by run; infinite if it was not.
      probe: median of the runs' medians, relative to the best of all.
      searched: seconds of training of all learning rates together, for one seed.
    """

    optimizer: str
    runs: list[Ended]
    reached: list[list[float]]
    probe: float
    searched: float

    @property
    def name(self) -> str:
        """The optimizer with the learning rate that won."""
        return self.runs[0].plan.racer

    def final(self, field: str) -> list[float]:
        """Return a measurement at the end, by run; infinite if it is no number."""
        values = [float(getattr(ended.run.last, field)) for ended in self.runs]
        return [x if math.isfinite(x) else math.inf for x in values]

    def document(self) -> dict[str, Any]:
        """Describe it in JSON's types."""
        return {
            "optimizer": self.optimizer,
            "name": self.name,
            "seeds": [ended.plan.seed for ended in self.runs],
            "reached": self.reached,
            "excess": self.final("excess"),
            "updates": self.final("updates"),
            "compile_seconds": [ended.run.compile_seconds for ended in self.runs],
            "probe": self.probe,
            "searched": self.searched,
        }


def final_excess(ended: Ended) -> float:
    """Return a run's excess at its end.

    Args:
      ended: the run.
    """
    return ended.run.last.excess


def lines(
    ended: Sequence[Ended],
    milestones: Sequence[float],
    value: Callable[[Any], float] = lambda row: row.excess,
    judged: Callable[[Ended], float] = final_excess,
) -> list[Line]:
    """Sum up the runs on one problem.

    Of an optimizer's learning rates the one with the least final excess counts, by the
    median over seeds.

    Args:
      ended: the runs.
      milestones: excesses, falling.
      value: `row -> number` to compare with the milestones, if it is not the excess.
      judged: `run -> number` that is least for the rate that counts, if that is not the
        final excess.

    Returns:
      A line for each optimizer, as they first come.
    """
    best_probe = min((p for run in ended for p in probes(run.run.rows)), default=1.0)
    found = []
    for optimizer in dict.fromkeys(run.plan.optimizer for run in ended):
        its = [run for run in ended if run.plan.optimizer == optimizer]
        rates = [
            [run for run in its if run.plan.rate == rate]
            for rate in dict.fromkeys(run.plan.rate for run in its)
        ]
        runs = min(rates, key=lambda runs: _median(map(judged, runs)))
        medians = [statistics.median(probes(run.run.rows)) for run in runs]
        seeds = len({run.plan.seed for run in its})
        found.append(
            Line(
                optimizer,
                runs,
                [[_seconds_to(run, value, x) for run in runs] for x in milestones],
                statistics.median(medians) / best_probe,
                sum(run.run.last.seconds for run in its) / seeds,
            )
        )
    return found


def probes(rows: Iterable[Row]) -> list[float]:
    """Return the probe of each turn.

    Args:
      rows: of a run.
    """
    return [probe for probe, _ in itertools.groupby(row.probe for row in rows)]


def cells(found: Sequence[Line], milestones: Sequence[float]) -> list[list[str]]:
    """Lay out a table, its head first.

    Args:
      found: a line for each optimizer.
      milestones: excesses, falling.
    """
    head = ["optimizer", *(f"{x:g}" for x in milestones)]
    head += ["final f − floor", "updates", "compile", "training", "probe"]
    table = [head]
    for line in found:
        disturbed = " !" if line.probe > DISTURBED else ""
        row = [line.name, *map(spread, line.reached), spread(line.final("excess"))]
        row += [f"{statistics.median(line.final('updates')):,.0f}"]
        compiled = [run.run.compile_seconds for run in line.runs]
        row += [f"{statistics.median(compiled):.1f} s", f"{line.searched:.0f} s"]
        table.append([*row, f"{line.probe:.2f}{disturbed}"])
    return table


def caption(found: Sequence[Line]) -> str:
    """Say what the cells are.

    Args:
      found: a line for each optimizer.
    """
    seeds = len({run.plan.seed for line in found for run in line.runs})
    return (
        f"Seconds of training until f − floor is below each number, {seeds} seed"
        f"{'s' * (seeds > 1)}: median (least–most); – not reached. Training: of one "
        "seed, all learning rates together. Probe: a matrix product's time, relative "
        f"to the best; ! above {DISTURBED:g}."
    )


def table(cells: Sequence[Sequence[str]], caption: str) -> Table:
    """Lay out a table for the terminal.

    Args:
      cells: its head first.
      caption: below it.
    """
    head, *rows = cells
    result = Table(caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(head):
        result.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def markdown(title: str, cells: Sequence[Sequence[str]], caption: str) -> str:
    """Lay out a table in Markdown, with a heading and what the cells are.

    Args:
      title: above it.
      cells: its head first.
      caption: below it.
    """
    head, *rows = cells
    rule = ["---", *("---:" for _ in head[1:])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    return f"## {title}\n\n{text}\n\n{caption}\n"


def _median(values: Iterable[float]) -> float:
    return statistics.median(x if math.isfinite(x) else math.inf for x in values)


def _seconds_to(ended: Ended, value: Callable[[Any], float], milestone: float) -> float:
    row = first_below(ended.run.rows, value, milestone)
    return math.inf if row is None else row.seconds


def spread(values: Sequence[float]) -> str:
    """Write the median, and where there are several values the least and the most.

    Args:
      values: by run; infinite where there is none.
    """
    middle = _short(statistics.median_low(values))
    if len(values) == 1 or not any(map(math.isfinite, values)):
        return middle
    return f"{middle} ({_short(min(values))}–{_short(max(values))})"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
