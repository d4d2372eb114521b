"""What training a recurrent network leaves: a file for each run, kept as it goes."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.history import History


class Row(NamedTuple):
    """Measurements at one moment of a run.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for who has none.
      sequences: drawn for training so far.
      loss: of a test sequence, summed over its targets; no weight decay.
      wrong: fraction of the test sequences answered wrongly.
    """

    seconds: float
    updates: int
    cg_iterations: int
    sequences: int
    loss: float
    wrong: float

    @property
    def error(self) -> float:
        """The fraction answered wrongly."""
        return self.wrong

    def words(self) -> str:
        """Put the measurements into a few words."""
        return f"f {self.loss:<8.4g} wrong {self.wrong:<6.2%}"


class Plan(NamedTuple):
    """One run: who learns what, from which start.

    Attributes:
      task: its name.
      length: fewest steps of a sequence.
      seed: of start and sequences.
      family: `"hf"` or `"adam"`.
      setting: μ of structural damping, or the learning rate.
    """

    task: str
    length: int
    seed: int
    family: str
    setting: float

    @property
    def racer(self) -> str:
        """Who runs, for people."""
        if self.family == "hf":
            return f"hf μ {self.setting:g}" if self.setting else "hf"
        return f"{self.family} {self.setting:g}"

    @property
    def file(self) -> str:
        """The name of the run's file."""
        words = (self.task, self.length, self.family, f"{self.setting:g}", self.seed)
        return "-".join(map(str, words)) + ".json"


@dataclasses.dataclass
class RunFile(History[Row]):
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
      rows: measurements.
      solved: whether so few answers were wrong in the end as were asked for.
    """

    plan: Plan
    settings: dict[str, Any]
    finished: bool
    rows: list[Row]
    solved: bool


def read(path: Path) -> Ended | None:
    """Read a run's file.

    Args:
      path: of the file.

    Returns:
      What it holds, or `None` where there is no file, or no measurement in it.

    Raises:
      ValueError: if it holds something else.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        plan, settings = Plan(**document["plan"]), document["settings"]
        rows = [Row(**row) for run in document["runs"] for row in run["rows"]]
        finished = document["finished"]
        solved = bool(rows) and rows[-1].wrong < settings["stop"]
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path} does not hold a run: {error!r}. Remove it."
        raise ValueError(msg) from error
    return Ended(plan, settings, finished, rows, solved) if rows else None


def read_all(folder: Path) -> list[Ended]:
    """Read the runs that there are.

    Args:
      folder: with a file for each; it may be missing.

    Returns:
      The runs.

    Raises:
      ValueError: if one of its `.json` files holds something else.
    """
    files = sorted(folder.glob("*.json"))
    return [run for run in map(read, files) if run is not None]
