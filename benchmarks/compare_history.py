"""What a comparison leaves: a file for each run, and one with everything."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.history import History, Run


class Row(NamedTuple):
    """Measurements at one moment of a run.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for who has none.
      loss: f on all training cases.
      excess: of that over its floor.
      probe: seconds that the fixed matrix product took before this turn.
    """

    seconds: float
    updates: int
    cg_iterations: int
    loss: float
    excess: float
    probe: float

    @property
    def error(self) -> float:
        """The excess."""
        return self.excess

    def words(self) -> str:
        """Put the measurements into a few words."""
        return f"f − floor {self.excess:<8.4g}"


class Plan(NamedTuple):
    """One run: who solves what, from which start.

    Attributes:
      problem: its name.
      seed: of the start.
      optimizer: its name.
      rate: its learning rate, if it needs one.
    """

    problem: str
    seed: int
    optimizer: str
    rate: float | None

    @property
    def racer(self) -> str:
        """Who runs, for people."""
        if self.rate is None:
            return self.optimizer
        return f"{self.optimizer} {self.rate:g}"

    @property
    def stem(self) -> str:
        """The name of the run's file, without suffix."""
        return f"{self.problem}-{self.seed}-{self.racer}".replace(" ", "-")


@dataclasses.dataclass
class RunFile(History[Any]):
    """One run in a file of its own.

    Attributes:
      plan: of the run.
      finished: whether it has come to its end: it is not run again then.
    """

    plan: Plan | None = None
    finished: bool = False

    def document(self) -> dict[str, Any]:
        """Describe plan, settings and the run in JSON's types."""
        plan = self.plan and self.plan._asdict()
        return {"plan": plan, "finished": self.finished, **super().document()}


class Ended(NamedTuple):
    """Where a run has come to.

    Attributes:
      plan: of the run.
      settings: under which it ran.
      finished: whether to its end.
      run: its rows, what its updates did, and what compiling took.
    """

    plan: Plan
    settings: dict[str, Any]
    finished: bool
    run: Run[Any]


def read(path: Path, row: Callable[..., Any] = Row) -> Ended | None:
    """Read a run's file.

    Args:
      path: of the file.
      row: kind of the run's rows, made again by `row(**fields)`.

    Returns:
      What it holds, or `None` where there is no file, or no measurement in it.

    Raises:
      ValueError: if it holds something else.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        plan, (found,) = Plan(**document["plan"]), document["runs"]
        rows = [row(**_numbers(fields)) for fields in found["rows"]]
        run = Run(found["name"], found["family"], found["compile_seconds"], rows)
        run.scalars = [_numbers(scalars) for scalars in found["updates"]]
        ended = Ended(plan, document["settings"], document["finished"], run)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path} does not hold a run: {error!r}. Remove it."
        raise ValueError(msg) from error
    return ended if rows else None


def read_all(paths: Iterable[Path], row: Callable[..., Any] = Row) -> list[Ended]:
    """Read those of the runs that there are.

    Args:
      paths: of their files.
      row: kind of the runs' rows.

    Returns:
      The runs.

    Raises:
      ValueError: if one of the files holds something else.
    """
    found = (read(path, row) for path in paths)
    return [ended for ended in found if ended is not None]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Read null, which stands for what JSON lacks, as NaN."""
    return {name: float("nan") if x is None else x for name, x in row.items()}
