"""What a race leaves: rows of measurements, kept in a file as they come."""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

_MOMENT = 2.0
"""Seconds of work that a kill may cost."""


class Moment(NamedTuple):
    """A moment of a run, before anything is measured.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for who has none.
    """

    seconds: float
    updates: int
    cg_iterations: int


class Measured(Protocol):
    """What every row has; each benchmark adds what it measures."""

    @property
    def seconds(self) -> float:
        """Of training; compiling and measuring do not count."""
        ...

    @property
    def updates(self) -> int:
        """Of the parameters so far."""
        ...

    @property
    def loss(self) -> float:
        """What is minimised."""
        ...

    @property
    def error(self) -> float:
        """What a run may be told to go on until."""
        ...

    def words(self) -> str:
        """Put the measurements into a few words."""
        ...

    def _asdict(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Measured)


class Row(NamedTuple):
    """Measurements of an autoencoder at one moment of a run.

    Attributes:
      seconds: of training; compiling and measuring do not count.
      updates: of the parameters so far.
      cg_iterations: so far; 0 for who has none.
      loss: f on all training images, weight decay included.
      train_error: squared error of an image, summed over pixels, mean over cases.
      test_error: the same on the test images.
    """

    seconds: float
    updates: int
    cg_iterations: int
    loss: float
    train_error: float
    test_error: float

    @property
    def error(self) -> float:
        """The error on the training images."""
        return self.train_error

    def words(self) -> str:
        """Put the measurements into a few words."""
        return f"f {self.loss:<7.3f} error {self.train_error:<6.3f}"


@dataclasses.dataclass
class Run(Generic[R]):
    """One racer's run.

    Attributes:
      name: of the racer.
      family: `"hf"`, `"adam"` or `"lbfgs"`.
      compile_seconds: what compiling it took.
      rows: measurements, the first before the first update.
      scalars: what each update did, if the racer says.
      params: the parameters that it has come to.
      seconds: of training so far; the last row may be of a moment before.
    """

    name: str
    family: str
    compile_seconds: float
    rows: list[R] = dataclasses.field(default_factory=list)
    scalars: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    params: Any = None
    seconds: float = 0.0

    @property
    def last(self) -> R:
        """The latest measurements."""
        return self.rows[-1]

    @property
    def cg_iterations(self) -> int:
        """Iterations of conjugate gradients so far."""
        return sum(scalars["cg_iterations"] for scalars in self.scalars)


@dataclasses.dataclass
class History(Generic[R]):
    """All runs of a race.

    Attributes:
      path: of the JSON file.
      settings: of the race, for the record.
      runs: as they started.
    """

    path: Path
    settings: dict[str, Any]
    runs: list[Run[R]] = dataclasses.field(default_factory=list)
    _saved: float = -math.inf

    def started(self) -> list[Run[R]]:
        """Return the runs that have been measured at all."""
        return [run for run in self.runs if run.rows]

    def best(self) -> list[Run[R]]:
        """Return of each family the run of the least final loss."""
        best: dict[str, Run[R]] = {}
        for run in self.started():
            other = best.get(run.family)
            if other is None or _rank(run) < _rank(other):
                best[run.family] = run
        return list(best.values())

    def keep(self) -> None:
        """Save, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= _MOMENT:
            self.save()

    def save(self) -> None:
        """Write the file: whole or not at all, whenever the process may be killed."""
        write_json(self.path, self.document())
        self._saved = time.monotonic()

    def document(self) -> dict[str, Any]:
        """Describe settings and runs in JSON's types."""
        return {
            "settings": self.settings,
            "runs": [
                {
                    "name": run.name,
                    "family": run.family,
                    "compile_seconds": run.compile_seconds,
                    "rows": [row._asdict() for row in run.rows],
                    "updates": run.scalars,
                }
                for run in self.runs
            ],
        }


@dataclasses.dataclass
class ImageHistory(History[Row]):
    """All runs of a race of autoencoders.

    Attributes:
      entropy_floor: below which no training loss can be.
    """

    entropy_floor: float = 0.0

    def document(self) -> dict[str, Any]:
        """Describe floor, settings and runs in JSON's types."""
        return {"entropy_floor": self.entropy_floor, **super().document()}


def write_json(path: Path, document: Any) -> None:
    """Write a document, replacing the file in one stroke.

    Args:
      path: of the file; its folder must exist.
      document: of JSON's types; NaN and infinity, which JSON lacks, become null.
    """
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _finite(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_finite(value) for value in document]
    if isinstance(document, float) and not math.isfinite(document):
        return None
    return document


def _rank(run: Run) -> float:
    return run.last.loss if math.isfinite(run.last.loss) else math.inf
