"""What the runs on a problem have come to: a line for each optimizer, and the table."""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.harness.history import Row, Run, RunFile
from benchmarks.suites.problem import Summary

DISTURBED = 1.25
"""If the probe took so many times the best, the machine was not free."""

ROUNDING = 1e-8
"""About √ε of float64: f cannot show a gain of less than this fraction of it."""

_LATE = 10
"""Updates that tell why a run of Hessian-free got no further."""

_FLAT = 0.02
"""If f or the value falls by less than this fraction in the last quarter, it stands still."""


class Line(NamedTuple):
    """What the runs of one optimizer, one for each seed, have come to.

    Attributes:
      optimizer: its name.
      runs: with its best learning rate, if it has several.
      judged: the value that counts, by run; infinite if it is NaN.
      reached: seconds of training to each milestone, by name and run; infinite if it was
        not reached.
      probe: median of the runs' medians, relative to the best of all.
      searched: seconds of training of all learning rates together, for one seed.
      lost: median of the value that counts, by the name of each learning rate that lost.
    """

    optimizer: str
    runs: list[RunFile]
    judged: list[float]
    reached: dict[str, list[float]]
    probe: float
    searched: float
    lost: dict[str, float]

    @property
    def name(self) -> str:
        """The optimizer with the learning rate that won."""
        return self.runs[0].plan.name

    def from_python(self, milestone: str) -> list[float]:
        """Return seconds from the start of Python to a milestone, by run."""
        seconds = self.reached[milestone]
        return [
            one.run.before_training + to
            for one, to in zip(self.runs, seconds, strict=True)
        ]

    def last(self, field: str) -> list[float]:
        """Return a measurement at the end, by run."""
        return [float(getattr(one.run.last, field)) for one in self.runs]

    def document(self) -> dict[str, Any]:
        """Describe it in JSON's types."""
        return {
            "optimizer": self.optimizer,
            "name": self.name,
            "seeds": [one.plan.seed for one in self.runs],
            "reached": self.reached,
            "from_python": {name: self.from_python(name) for name in self.reached},
            "value": self.judged,
            "updates": self.last("updates"),
            "compile_seconds": [one.run.compile_seconds for one in self.runs],
            "startup_seconds": [one.run.startup_seconds for one in self.runs],
            "probe": self.probe,
            "searched": self.searched,
            "lost": self.lost,
        }


def lines(ended: Sequence[RunFile], summary: Summary) -> list[Line]:
    """Sum up the runs on one problem.

    Of an optimizer's learning rates the one with the least value counts, by the median
    over seeds.

    Returns:
      A line for each optimizer, in the order in which they first come.
    """
    best_probe = min((p for one in ended for p in probes(one.run.rows)), default=1.0)

    def middle(runs: Sequence[RunFile]) -> float:
        return statistics.median(judged(one.run, summary) for one in runs)

    found = []
    for optimizer in dict.fromkeys(one.plan.optimizer for one in ended):
        its = [one for one in ended if one.plan.optimizer == optimizer]
        rates = [
            [one for one in its if one.plan.rate == rate]
            for rate in dict.fromkeys(one.plan.rate for one in its)
        ]
        runs = min(rates, key=middle)
        medians = [statistics.median(probes(one.run.rows)) for one in runs]
        seeds = len({one.plan.seed for one in its})
        found.append(
            Line(
                optimizer,
                runs,
                [judged(one.run, summary) for one in runs],
                {
                    name: [seconds_to(one.run, level) for one in runs]
                    for name, level in summary.milestones.items()
                },
                statistics.median(medians) / best_probe,
                sum(one.run.last.seconds for one in its) / seeds,
                {its[0].plan.name: middle(its) for its in rates if its is not runs},
            )
        )
    return found


def judged(run: Run, summary: Summary) -> float:
    """Return the value of a run that counts: its last one, or its lowest."""
    values = [row.value for row in run.rows] if summary.lowest else [run.last.value]
    return min((x for x in values if math.isfinite(x)), default=math.inf)


def seconds_to(run: Run, level: float) -> float:
    """Return the seconds of training until the value was first below a level."""
    return next((row.seconds for row in run.rows if row.value < level), math.inf)


def probes(rows: Iterable[Row]) -> list[float]:
    """Return the probe of each turn."""
    return [probe for probe, _ in itertools.groupby(row.probe for row in rows)]


def limited(run: Run, goal: float = -math.inf) -> str:
    """Say why a run got no further, as far as its history tells.

    Returns:
      `"the goal"` if it was reached, `"divergence"`, `"rounding"` (see `ROUNDING`), `"no
      decrease"` (the last updates were all rejected), `"standstill"` (neither f nor the
      value fell in the last quarter of the seconds), `"the data"` (only f fell), or `"the
      seconds"`.
    """
    rows, late = run.rows, run.scalars[-_LATE:]
    if rows[-1].value < goal:
        return "the goal"
    if not math.isfinite(rows[-1].loss):
        return "divergence"
    if late and not any(scalars["accepted"] for scalars in late):
        return "rounding" if all(map(_tiny, late)) else "no decrease"
    before = [row for row in rows if row.seconds <= 0.75 * rows[-1].seconds]
    if _falls(before, rows, lambda row: row.value):
        return "the seconds"
    return "the data" if _falls(before, rows, lambda row: row.loss) else "standstill"


def farthest(found: Sequence[Line], milestones: Mapping[str, float]) -> str | None:
    """Return the lowest milestone that an optimizer reached, by the median over seeds."""
    reached = [
        name
        for name in milestones
        if any(map(math.isfinite, (statistics.median(x.reached[name]) for x in found)))
    ]
    return min(reached, key=lambda name: milestones[name], default=None)


def cells(found: Sequence[Line], summary: Summary) -> list[list[str]]:
    """Lay out a table, its head first."""
    far = farthest(found, summary.milestones)
    which = "lowest" if summary.lowest else "final"
    head = ["optimizer", *summary.milestones, f"from Python to {far or '–'}"]
    head += [f"{which} {summary.value}", "updates", "CG", "limited by", "compile"]
    table = [[*head, "training", "probe"]]
    for line in found:
        whole = spread(line.from_python(far)) if far else "–"
        why = Counter(limited(one.run, summary.goal) for one in line.runs)
        compiled = statistics.median(one.run.compile_seconds for one in line.runs)
        disturbed = " !" if line.probe > DISTURBED else ""
        table.append(
            [
                line.name,
                *map(spread, line.reached.values()),
                whole,
                spread(line.judged),
                f"{statistics.median(line.last('updates')):,.0f}",
                f"{statistics.median(line.last('cg_iterations')):,.0f}",
                why.most_common(1)[0][0],
                f"{compiled:.1f} s",
                f"{line.searched:.0f} s",
                f"{line.probe:.2f}{disturbed}",
            ]
        )
    return table


def caption(found: Sequence[Line], summary: Summary) -> str:
    """Say what the cells are, and what became of learning rates that lost."""
    seeds = len({one.plan.seed for line in found for one in line.runs})
    lost = [f"{name}: {_short(x)}" for line in found for name, x in line.lost.items()]
    words = [
        f"{seeds} seed{'s' * (seeds > 1)}: median (least–most). Under a number: seconds of "
        f"training until {summary.value} is below it; – not reached. From Python: the "
        "same from the start of Python, imports, data and compiling included. Training: "
        "of one seed, all learning rates together. Probe: a matrix product's time, "
        f"relative to the best; ! above {DISTURBED:g}.",
        summary.note,
        f"Learning rates that lost, and their {summary.value}: {'; '.join(lost)}."
        if lost
        else "",
    ]
    return " ".join(filter(None, words))


def rich_table(
    cells: Sequence[Sequence[str]], caption: str = "", title: str = ""
) -> Table:
    """Lay out a table for the terminal."""
    head, *rows = cells
    result = Table(caption=caption, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(head):
        result.add_column(name, justify="right" if index else "left")
    for row in rows:
        # Heads may be broken into lines, cells may not.
        result.add_row(*(cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in row))
    return result


def markdown(title: str, cells: Sequence[Sequence[str]], caption: str) -> str:
    """Lay out a table in Markdown, with a heading and what the cells are."""
    head, *rows = cells
    rule = ["---", *("---:" for _ in head[1:])]
    text = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
    return f"## {title}\n\n{text}\n\n{caption}\n"


def spread(values: Sequence[float]) -> str:
    """Write the median, and of several values the least and the most."""
    middle = _short(statistics.median_low(values))
    if len(values) == 1 or not any(map(math.isfinite, values)):
        return middle
    return f"{middle} ({_short(min(values))}–{_short(max(values))})"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _tiny(scalars: dict[str, Any]) -> bool:
    value, promised = scalars["value_before"], scalars["predicted_change"]
    return not abs(promised) > ROUNDING * abs(value)


def _falls(
    before: Sequence[Row], rows: Sequence[Row], value: Callable[[Row], float]
) -> bool:
    """Return whether something came lower after a part of the rows than within it."""
    then = min(map(value, before), default=math.inf)
    return min(map(value, rows)) < (1 - _FLAT) * then
