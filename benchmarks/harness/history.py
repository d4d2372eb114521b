"""What a comparison keeps: a plan and rows of measurements, in a file for each run."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """Measurements at one moment of a run.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for optimizers without conjugate gradients.
      loss: f.
      value: what the suite judges by: excess, fraction of wrong answers, or error.
      probe: seconds that the fixed matrix product took before this turn.
    """

    seconds: float
    updates: int
    cg_iterations: int
    loss: float
    value: float
    probe: float


class Plan(NamedTuple):
    """One run: which optimizer solves which problem, from which start.

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
    def name(self) -> str:
        """The optimizer with its learning rate, for people."""
        if self.rate is None:
            return self.optimizer
        return f"{self.optimizer} {self.rate:g}"

    def file(self, folder: Path) -> Path:
        """Return the path of the run's file."""
        return folder / "runs" / f"{self._stem}.json"

    def checkpoints(self, folder: Path) -> Path:
        """Return the folder of the run's checkpoints."""
        return folder / "checkpoints" / self._stem

    @property
    def _stem(self) -> str:
        return f"{self.problem}-{self.seed}-{self.name}".replace(" ", "-")


@dataclasses.dataclass
class Run:
    """What a run has measured.

    Attributes:
      rows: measurements, the first before the first update.
      scalars: what each update did, if the optimizer reports it.
      seconds: of training so far; the last row may be from a moment before.
      startup_seconds: from the start of Python until this run could be compiled, as if
        it were the only one: imports, data and start.
      compile_seconds: of tracing and compiling.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    scalars: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    startup_seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def last(self) -> Row:
        """The latest measurements."""
        return self.rows[-1]

    @property
    def before_training(self) -> float:
        """Seconds from the start of Python to the first update."""
        return self.startup_seconds + self.compile_seconds

    def words(self) -> str:
        """Put the latest measurements into a few words."""
        row = self.last
        text = f"update {row.updates:<5} f {row.loss:<9.4g} value {row.value:<9.4g}"
        if self.scalars:
            now = self.scalars[-1]
            ratio = max(now["reduction_ratio"], -99)
            text += f" λ {now['damping']:.0e} ρ {ratio:.2f} CG {now['cg_iterations']}"
        return text

    def document(self) -> dict[str, Any]:
        """Describe the run in JSON's types."""
        return {**vars(self), "rows": [row._asdict() for row in self.rows]}

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Run":
        """Make a run again of what `document` returned."""
        numbers = {
            **document,
            "rows": [Row(**_numbers(row)) for row in document["rows"]],
            "scalars": [_numbers(scalars) for scalars in document["scalars"]],
        }
        return cls(**numbers)


class RunFile(NamedTuple):
    """One run with its plan and settings, as its file has them.

    Attributes:
      plan: of the run.
      settings: under which it runs.
      finished: whether it has ended: then it is not run again.
      run: its measurements.
    """

    plan: Plan
    settings: dict[str, Any]
    finished: bool
    run: Run

    def save(self, folder: Path) -> None:
        """Write the file."""
        path = self.plan.file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.document())

    def document(self) -> dict[str, Any]:
        """Describe the file in JSON's types."""
        return {
            "plan": self.plan._asdict(),
            "settings": self.settings,
            "finished": self.finished,
            "run": self.run.document(),
        }


def read(path: Path) -> RunFile | None:
    """Read a run's file.

    Returns:
      What it holds, or `None` if there is no file, or no measurement in it.

    Raises:
      ValueError: if it holds something else.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        plan, run = Plan(**document["plan"]), Run.of(document["run"])
        found = RunFile(plan, dict(document["settings"]), document["finished"], run)
    except (KeyError, TypeError, ValueError) as error:
        msg = f"{path} does not hold a run: {error!r}. Remove it."
        raise ValueError(msg) from error
    return found if run.rows else None


def write_json(path: Path, document: Any) -> None:
    """Write a document, replacing the file in one stroke."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _finite(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _finite(value) for name, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    if isinstance(document, float) and not math.isfinite(document):
        return None
    return document


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Read null as NaN."""
    return {name: math.nan if x is None else x for name, x in fields.items()}
