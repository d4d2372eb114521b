"""How many updates, and how many CG iterations, to reach an error: HF and Martens.

His numbers are from the log published with his program: CURVES, a curvature batch
of 5,000 of the 20,000 images, weight decay 2e-5, a random start.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.history import Row

R = TypeVar("R")

MARTENS_SOURCE = "the log published with his program"


class Milestone(NamedTuple):
    """Where a squared error was first passed.

    Attributes:
      error: the threshold, on the training images.
      updates: after which the error was below it.
      cg_iterations: until then, all updates together.
    """

    error: float
    updates: int
    cg_iterations: int


MARTENS = (
    Milestone(20.0, 4, 51),
    Milestone(10.0, 58, 1611),
    Milestone(5.0, 68, 2859),
    Milestone(2.0, 75, 4043),
    Milestone(1.0, 81, 5471),
    Milestone(0.5, 94, 8721),
)


def first_below(
    rows: Sequence[R], value: Callable[[R], float], threshold: float
) -> R | None:
    """Find where something was first below a threshold.

    Args:
      rows: of a run, as they were measured.
      value: of a row.
      threshold: to come below.

    Returns:
      The row, or `None` if there is none.
    """
    return next((row for row in rows if value(row) < threshold), None)


def passed(rows: Sequence[Row]) -> list[Milestone]:
    """Find where a run passed the errors of `MARTENS`.

    Args:
      rows: of the run, one after every update.

    Returns:
      The milestones reached.
    """
    found = []
    for error, *_ in MARTENS:
        row = first_below(rows, lambda row: row.train_error, error)
        if row is not None:
            found.append(Milestone(error, row.updates, row.cg_iterations))
    return found


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Describe both runs' milestones in JSON's types.

    Args:
      rows: of the run, one after every update.

    Returns:
      The milestones of the run, Martens' own, and where those are from.
    """
    return {
        "run": [milestone._asdict() for milestone in passed(rows)],
        "martens": [milestone._asdict() for milestone in MARTENS],
        "martens_source": MARTENS_SOURCE,
    }


def table(rows: Sequence[Row]) -> Table:
    """Lay out both runs' milestones side by side.

    Args:
      rows: of the run, one after every update.

    Returns:
      A rich table.
    """
    ours = {milestone.error: milestone for milestone in passed(rows)}
    result = Table(
        caption=f"Martens: {MARTENS_SOURCE}; the true CURVES, 20,000 images.",
        box=SIMPLE_HEAD,
    )
    for name in ("train error below", "hf: updates / CG", "Martens: updates / CG"):
        result.add_column(name, justify="right", no_wrap=True)
    for his in MARTENS:
        own = ours.get(his.error)
        result.add_row(f"{his.error:g}", _pair(own), _pair(his))
    return result


def _pair(milestone: Milestone | None) -> str:
    if milestone is None:
        return "–"
    return f"{milestone.updates} / {milestone.cg_iterations:,}"
