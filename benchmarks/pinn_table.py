"""What the runs on a differential equation have come to, beside the levels of the logs."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import compare_table
from benchmarks.compare_history import Ended
from benchmarks.compare_table import Line, spread
from benchmarks.pinn_problem import Problem

ROUNDING = 1e-8
"""Where updates are refused that promise to lower f by less than this fraction of it,
about √ε of float64, f itself is known no better."""

_LATE = 10
"""Updates that tell why a run of Hessian-free came no further."""

_FLAT = 0.02
"""Fraction of f or of the error; who falls by less in the last quarter is at a standstill."""


class Row(NamedTuple):
    """Measurements at one moment of a run.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for who has none.
      loss: f, on the points of training, or where these change on others.
      error: root of the mean squared error of u on points of its own, not relative.
      probe: seconds that the fixed matrix product took before this turn.
    """

    seconds: float
    updates: int
    cg_iterations: int
    loss: float
    error: float
    probe: float

    def words(self) -> str:
        """Put the measurements into a few words."""
        return f"f {self.loss:<9.3g} error {self.error:<9.3g}"


def lines(ended: Sequence[Ended], problem: Problem) -> list[Line]:
    """Sum up the runs on one problem; of learning rates that of the lowest error counts.

    Args:
      ended: the runs.
      problem: whose levels are the milestones.

    Returns:
      A line for each optimizer, as they first come.
    """
    levels = list(milestones(problem).values())
    return compare_table.lines(
        ended, levels, lambda row: row.error, lambda ended: lowest(ended).error
    )


def milestones(problem: Problem) -> dict[str, float]:
    """Return errors to reach by name: of the first-order optimizers and L-BFGS the least.

    Args:
      problem: with its levels.
    """
    known = problem.levels.known()
    first = [known.pop(name) for name in ("L-BFGS", "Adam", "SGD") if name in known]
    return {**known, **({"others": min(first)} if first else {})}


def lowest(ended: Ended) -> Row:
    """Return the row of a run's lowest error.

    Args:
      ended: the run.
    """
    rows = [row for row in ended.run.rows if math.isfinite(row.error)]
    return min(rows, key=lambda row: row.error, default=ended.run.rows[0])


def limited(ended: Ended) -> str:
    """Say what kept a run from a lower error, as far as its history tells.

    Args:
      ended: the run.

    Returns:
      `"divergence"`, `"rounding"` (see `ROUNDING`), `"no decrease"` (the last updates
      were all refused), `"standstill"` (neither f nor the error fell in the last quarter
      of the seconds), `"the points"` (f fell and the error did not), or `"the budget"`.
    """
    rows, late = ended.run.rows, ended.run.scalars[-_LATE:]
    if not math.isfinite(rows[-1].loss):
        return "divergence"
    if late and not any(scalars["accepted"] for scalars in late):
        return "rounding" if all(map(_tiny, late)) else "no decrease"
    before = [row for row in rows if row.seconds <= 0.75 * rows[-1].seconds]
    if _falls(before, rows, "error"):
        return "the budget"
    return "the points" if _falls(before, rows, "loss") else "standstill"


def cells(found: Sequence[Line], problem: Problem) -> list[list[str]]:
    """Lay out a table, its head first.

    Args:
      found: a line for each optimizer.
      problem: with its levels.
    """
    levels = [f"{name} {level:.2g}" for name, level in milestones(problem).items()]
    head = ["optimizer", "lowest error", "at update", "at second", *levels]
    head += ["f at the end", "updates", "CG", "limited by", "training", "probe"]
    table = [head]
    for line in found:
        best = [lowest(ended) for ended in line.runs]
        why = Counter(limited(ended) for ended in line.runs).most_common(1)[0][0]
        disturbed = " !" if line.probe > compare_table.DISTURBED else ""
        table.append(
            [
                line.name,
                spread([row.error for row in best]),
                f"{statistics.median(row.updates for row in best):,.0f}",
                spread([row.seconds for row in best]),
                *map(spread, line.reached),
                spread(line.final("loss")),
                f"{statistics.median(line.final('updates')):,.0f}",
                f"{statistics.median(line.final('cg_iterations')):,.0f}",
                why,
                f"{line.searched:.0f} s",
                f"{line.probe:.2f}{disturbed}",
            ]
        )
    return table


def caption(found: Sequence[Line], problem: Problem) -> str:
    """Say what the cells are, and what the logs have.

    Args:
      found: a line for each optimizer.
      problem: with its levels.
    """
    seeds = len({run.plan.seed for line in found for run in line.runs})
    logs = ", ".join(f"{name} {x:.2g}" for name, x in problem.levels.known().items())
    return (
        f"{seeds} seed{'s' * (seeds > 1)}: median (least–most). Error: root of the mean "
        f"square on {problem.evaluation:,} points. Under a name and its error in the "
        "published logs: seconds of training until ours is below; – not reached; others: "
        "the best of L-BFGS, Adam and SGD. Training: of one seed, all learning rates "
        "together. Probe: a matrix product's time, relative to the best; ! above "
        f"{compare_table.DISTURBED:g}. The logs, {problem.budget:g} s on a GPU: {logs}."
    )


def document(ended: Ended) -> dict[str, Any]:
    """Describe where a run came to in JSON's types.

    Args:
      ended: the run.
    """
    return {
        **ended.plan._asdict(),
        "finished": ended.finished,
        "compile_seconds": ended.run.compile_seconds,
        "lowest": lowest(ended)._asdict(),
        "limited_by": limited(ended),
        "rows": [row._asdict() for row in ended.run.rows],
    }


def _tiny(scalars: dict[str, Any]) -> bool:
    value, promised = scalars["value_before"], scalars["predicted_change"]
    return not abs(promised) > ROUNDING * abs(value)


def _falls(before: Sequence[Row], rows: Sequence[Row], field: str) -> bool:
    """Return whether something came lower after a part of the rows than in it."""
    then = min((getattr(row, field) for row in before), default=math.inf)
    return min(getattr(row, field) for row in rows) < (1 - _FLAT) * then
