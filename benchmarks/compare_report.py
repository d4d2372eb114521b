"""What a comparison says and leaves: tables, pictures, and one file with everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import compare_figure, compare_history, compare_table
from benchmarks.compare_history import Ended, Plan
from benchmarks.compare_optimizers import OPTIMIZERS
from benchmarks.compare_problems import Problem
from benchmarks.compare_table import Line
from benchmarks.compare_turns import Entrant, run_file
from benchmarks.history import write_json
from benchmarks.live import describe

_WIDE = 160
"""Columns of a table where there is no terminal: it goes to a file then."""


class Report:
    """Gathers what the runs leave, and writes it down.

    Attributes:
      console: where it is shown.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        folder: Path,
        skipped: dict[str, str],
        console: Console,
    ) -> None:
        self.console, self._folder = console, folder
        self._settings, self._skipped = settings, dict[str, str]()
        self._plans: list[Plan] = []
        self._problems: dict[str, Problem] = {}
        for name, why in skipped.items():
            self.skip(name, why)

    def begin(self, name: str, problem: Problem, plans: Sequence[Plan]) -> None:
        """Note, and say, what will be run on a problem.

        Args:
          name: of the problem.
          problem: to be solved.
          plans: of the runs.
        """
        self._problems[name] = problem._replace(batch=None)  # Memory is for others.
        self._plans += plans
        self.console.print(problem.title)

    def skip(self, name: str, why: str) -> None:
        """Note, and say, that something is left out.

        Args:
          name: a problem, an optimizer, or one on the other.
          why: in words.
        """
        self._skipped[name] = why
        self.console.print(f"Skipped {name}: {why}", markup=False)

    def turn(self, entrant: Entrant) -> None:
        """Say where a run is after its turn.

        Args:
          entrant: whose turn it was.
        """
        plan, run = entrant.plan, entrant.run
        self.console.print(
            f"{plan.problem} {plan.seed} {plan.racer:<17} {run.seconds:6.1f} s  "
            f"{describe(run)}",
            markup=False,
        )

    def end(self) -> None:
        """Print the tables, and write everything down."""
        for name, problem in self._problems.items():
            lines = compare_table.lines(self._ended(name), problem.milestones)
            if lines:
                self._show(problem, lines)
        names = ", ".join(path.name for path in self.save())
        self.console.print(f"Written to {self._folder}: {names}")

    def save(self) -> list[Path]:
        """Write everything down: numbers, tables and pictures.

        Returns:
          The paths of the files.
        """
        documents, texts, pictures = [], [], []
        for name, problem in self._problems.items():
            ended, milestones = self._ended(name), problem.milestones
            lines = compare_table.lines(ended, milestones)
            if not lines:
                continue
            texts.append(
                compare_table.markdown(problem.title, *_laid_out(lines, milestones))
            )
            pictures.append(self._folder / f"compare-{name}.png")
            compare_figure.draw(problem.title, lines, milestones, pictures[-1])
            documents.append(_document(name, problem, ended, lines))
        document = {
            "settings": self._settings,
            "optimizers": {name: o.title for name, o in OPTIMIZERS.items()},
            "skipped": self._skipped,
            "problems": documents,
        }
        written = [self._folder / "compare.json", self._folder / "compare.md"]
        write_json(written[0], document)
        written[1].write_text("\n".join(texts))
        return written + pictures

    def _ended(self, problem: str) -> list[Ended]:
        plans = [plan for plan in self._plans if plan.problem == problem]
        return compare_history.read_all(run_file(self._folder, plan) for plan in plans)

    def _show(self, problem: Problem, lines: Sequence[Line]) -> None:
        width = self.console.width if self.console.is_terminal else _WIDE
        wide = Console(width=width, file=self.console.file)
        wide.print(problem.title, highlight=False)
        wide.print(compare_table.table(*_laid_out(lines, problem.milestones)))


def _laid_out(
    lines: Sequence[Line], milestones: Sequence[float]
) -> tuple[list[list[str]], str]:
    """Return the cells of a table, and its caption."""
    return compare_table.cells(lines, milestones), compare_table.caption(lines)


def _document(
    name: str, problem: Problem, ended: Sequence[Ended], lines: Sequence[Line]
) -> dict[str, Any]:
    """Describe what came of a problem in JSON's types."""
    return {
        "name": name,
        "title": problem.title,
        "floor": problem.floor,
        "milestones": list(problem.milestones),
        "lines": [line.document() for line in lines],
        "runs": [
            {
                **one.plan._asdict(),
                "finished": one.finished,
                "compile_seconds": one.run.compile_seconds,
                "rows": [row._asdict() for row in one.run.rows],
            }
            for one in ended
        ],
    }
