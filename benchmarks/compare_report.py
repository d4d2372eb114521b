"""What a comparison says and leaves: tables, pictures, and one file with everything."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import compare_figure, compare_history, compare_table
from benchmarks.compare_history import Ended, Plan, Row
from benchmarks.compare_optimizers import OPTIMIZERS
from benchmarks.compare_table import Line
from benchmarks.compare_turns import Entrant, run_file
from benchmarks.history import write_json
from benchmarks.live import describe


class Report:
    """Gathers what the runs leave, and writes it down.

    Another comparison has one of its own class: what it overrides is at the end.

    Attributes:
      console: where it is shown.
      stem: of the files' names.
      optimizers: by name.
      row: kind of the runs' rows.
      wide: columns of a table where there is no terminal: it goes to a file then.
    """

    stem = "compare"
    wide = 160
    optimizers = OPTIMIZERS
    row: Callable[..., Any] = Row

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
        self._problems: dict[str, Any] = {}
        for name, why in skipped.items():
            self.skip(name, why)

    def begin(self, name: str, problem: Any, plans: Sequence[Plan]) -> None:
        """Note, and say, what will be run on a problem.

        Args:
          name: of the problem.
          problem: to be solved.
          plans: of the runs.
        """
        self._problems[name] = self._kept(problem)
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
            lines = self._lines(problem, self._ended(name))
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
            ended = self._ended(name)
            lines = self._lines(problem, ended)
            if not lines:
                continue
            laid_out = self._laid_out(problem, lines)
            texts.append(compare_table.markdown(problem.title, *laid_out))
            pictures.append(self._folder / f"{self.stem}-{name}.png")
            self._draw(problem, lines, pictures[-1])
            document = self._document(problem, ended, lines)
            documents.append({"name": name, "title": problem.title, **document})
        document = {
            "settings": self._settings,
            "optimizers": {name: o.title for name, o in self.optimizers.items()},
            "skipped": self._skipped,
            "problems": documents,
        }
        written = [self._folder / f"{self.stem}{end}" for end in (".json", ".md")]
        write_json(written[0], document)
        written[1].write_text("\n".join(texts))
        return written + pictures

    def _ended(self, problem: str) -> list[Ended]:
        plans = [plan for plan in self._plans if plan.problem == problem]
        paths = (run_file(self._folder, plan) for plan in plans)
        return compare_history.read_all(paths, type(self).row)

    def _show(self, problem: Any, lines: Sequence[Line]) -> None:
        width = self.console.width if self.console.is_terminal else self.wide
        wide = Console(width=width, file=self.console.file)
        wide.print(problem.title, highlight=False)
        wide.print(compare_table.table(*self._laid_out(problem, lines)))

    def _kept(self, problem: Any) -> Any:
        """Return what of a problem is needed to the end: memory is for others."""
        return problem._replace(batch=None)

    def _lines(self, problem: Any, ended: Sequence[Ended]) -> list[Line]:
        """Sum up the runs on a problem."""
        return compare_table.lines(ended, problem.milestones)

    def _laid_out(
        self, problem: Any, lines: Sequence[Line]
    ) -> tuple[list[list[str]], str]:
        """Return the cells of a table, and its caption."""
        cells = compare_table.cells(lines, problem.milestones)
        return cells, compare_table.caption(lines)

    def _draw(self, problem: Any, lines: Sequence[Line], path: Path) -> None:
        """Draw the picture of a problem."""
        compare_figure.draw(problem.title, lines, problem.milestones, path)

    def _document(
        self, problem: Any, ended: Sequence[Ended], lines: Sequence[Line]
    ) -> dict[str, Any]:
        """Describe what came of a problem in JSON's types."""
        return {
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
