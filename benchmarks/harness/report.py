"""What a comparison says and leaves: tables, pictures, and one file with everything."""

import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import hfjax
from benchmarks.harness import figure, table
from benchmarks.harness.history import Plan, RunFile, read, write_json
from benchmarks.harness.race import Entrant
from benchmarks.harness.table import Line
from benchmarks.suites.problem import Summary

_WIDE = 200
"""Columns of a table that does not go to a terminal."""


class Report:
    """Gathers what the runs leave, and writes it down.

    Attributes:
      console: for messages and tables.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        folder: Path,
        titles: Mapping[str, str],
        skipped: Mapping[str, str],
        console: Console,
    ) -> None:
        self.console, self._folder = console, folder
        self._settings, self._titles = settings, dict(titles)
        self._skipped, self._plans = dict[str, str](), list[Plan]()
        self._problems: dict[str, Summary] = {}
        for name, why in skipped.items():
            self.skip(name, why)

    def begin(self, name: str, summary: Summary, plans: Sequence[Plan]) -> None:
        """Note, and say, what will be run on a problem."""
        self._problems[name] = summary
        self._plans += plans
        self.console.print(summary.title, markup=False)

    def skip(self, name: str, why: str) -> None:
        """Note, and say, that something is left out."""
        self._skipped[name] = why
        self.console.print(f"Skipped {name}: {why}", markup=False)

    def turn(self, entrant: Entrant) -> None:
        """Say where a run is after its turn."""
        plan, run = entrant.plan, entrant.run
        self.console.print(
            f"{plan.problem} {plan.seed} {plan.name:<17} {run.seconds:6.1f} s  "
            f"{run.words()}",
            markup=False,
        )

    def end(self, *, show: bool = False) -> None:
        """Print the tables, write everything down, and show the first picture."""
        width = self.console.width if self.console.is_terminal else _WIDE
        wide = Console(width=width, file=self.console.file, highlight=False)
        for name, summary in self._problems.items():
            lines = table.lines(self._ended(name), summary)
            if lines:
                laid_out = table.cells(lines, summary), table.caption(lines, summary)
                wide.print(summary.title, markup=False)
                wide.print(table.rich_table(*laid_out))
        files = self.save()
        names = ", ".join(path.name for path in files)
        self.console.print(f"Written to {self._folder}: {names}")
        pictures = [path for path in files if path.name.endswith("-from-start.png")]
        if show and pictures:
            where = pictures[0].resolve()
            self.console.print(f"The picture: {where}", markup=False)
            webbrowser.open(where.as_uri())

    def save(self) -> list[Path]:
        """Write everything down: numbers, tables and pictures."""
        documents, texts, pictures = [], [], []
        for name, summary in self._problems.items():
            ended = self._ended(name)
            lines = table.lines(ended, summary)
            if not lines:
                continue
            laid_out = table.cells(lines, summary), table.caption(lines, summary)
            texts.append(table.markdown(summary.title, *laid_out))
            pictures += self._draw(name, summary, lines)
            document = _document(summary, ended, lines)
            documents.append({"name": name, **document})
        document = {
            "settings": self._settings,
            "optimizers": self._titles,
            "skipped": self._skipped,
            "problems": documents,
        }
        written = [self._folder / f"compare{end}" for end in (".json", ".md")]
        write_json(written[0], document)
        written[1].write_text("\n".join(texts))
        return written + pictures

    def _draw(self, name: str, summary: Summary, lines: Sequence[Line]) -> list[Path]:
        """Draw the comparison, and what the updates of our first optimizer did."""
        pictures = [self._folder / f"{name}{end}.png" for end in ("", "-from-start")]
        figure.draw(summary, lines, pictures[0])
        clock = self._settings["clock"]
        figure.draw_from_start(summary, lines, clock, pictures[1])
        ours = [line.runs[0] for line in lines if line.runs[0].run.scalars]
        if ours:
            pictures.append(self._folder / f"{name}-{ours[0].plan.optimizer}.png")
            updates = hfjax.diagnostics.plot(ours[0].run.scalars)
            updates.savefig(pictures[-1], dpi=150)
        return pictures

    def _ended(self, problem: str) -> list[RunFile]:
        plans = [plan for plan in self._plans if plan.problem == problem]
        found = (read(plan.file(self._folder)) for plan in plans)
        return [one for one in found if one is not None]


def _document(
    summary: Summary, ended: Sequence[RunFile], lines: Sequence[Line]
) -> dict[str, Any]:
    """Describe what came of a problem in JSON's types."""
    runs = [
        {
            **one.plan._asdict(),
            "finished": one.finished,
            "limited_by": table.limited(one.run, summary.goal),
            "value": table.judged(one.run, summary),
            "compile_seconds": one.run.compile_seconds,
            "startup_seconds": one.run.startup_seconds,
            "rows": [row._asdict() for row in one.run.rows],
        }
        for one in ended
    ]
    return {
        **summary._asdict(),
        "milestones": dict(summary.milestones),
        "lines": [line.document() for line in lines],
        "runs": runs,
    }
