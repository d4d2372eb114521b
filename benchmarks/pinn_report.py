"""What the benchmark of differential equations says and leaves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import pinn_figure, pinn_table
from benchmarks.compare_history import Ended
from benchmarks.compare_report import Report
from benchmarks.compare_table import Line
from benchmarks.pinn_optimizers import OPTIMIZERS
from benchmarks.pinn_problem import Problem


class PinnReport(Report):
    """Gathers what the runs leave, and writes it down."""

    stem = "pinn"
    optimizers = OPTIMIZERS
    row = pinn_table.Row
    wide = 200

    def _kept(self, problem: Problem) -> Problem:
        return problem

    def _lines(self, problem: Problem, ended: Sequence[Ended]) -> list[Line]:
        return pinn_table.lines(ended, problem)

    def _laid_out(
        self, problem: Problem, lines: Sequence[Line]
    ) -> tuple[list[list[str]], str]:
        return pinn_table.cells(lines, problem), pinn_table.caption(lines, problem)

    def _draw(self, problem: Problem, lines: Sequence[Line], path: Path) -> None:
        pinn_figure.draw(problem, lines, path)

    def _document(
        self, problem: Problem, ended: Sequence[Ended], lines: Sequence[Line]
    ) -> dict[str, Any]:
        return {
            "parameters": problem.parameters,
            "points": [problem.interior, problem.boundary],
            "redrawn": problem.redrawn,
            "evaluation": problem.evaluation,
            "published": {"seconds": problem.budget, **problem.levels._asdict()},
            "milestones": pinn_table.milestones(problem),
            "lines": [
                {"name": line.name, "reached": line.reached, "searched": line.searched}
                for line in lines
            ],
            "runs": [pinn_table.document(one) for one in ended],
        }
