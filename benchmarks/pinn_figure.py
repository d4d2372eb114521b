"""The picture of a differential equation: error and f, against seconds and updates."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare_table import Line
from benchmarks.pinn_problem import Problem

_COLUMNS = {"seconds": "training time in seconds", "updates": "updates"}
_ROWS = {"error": "error of u, root of the mean square", "loss": "f"}


def draw(problem: Problem, found: Sequence[Line], path: Path) -> None:
    """Draw four panels: a colour an optimizer, a line a seed, and the logs' levels.

    Args:
      problem: with its levels.
      found: a line for each optimizer.
      path: of the picture.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for cells, (field, words) in zip(panels, _ROWS.items(), strict=True):
        for axes, by in zip(cells, _COLUMNS, strict=True):
            _panel(axes, found, by, field)
        cells[0].set_ylabel(words)
    for axes, words in zip(panels[1], _COLUMNS.values(), strict=True):
        axes.set_xlabel(words)
    for axes in panels[0]:
        _levels(axes, problem)
    panels[0, 0].legend(frameon=False, fontsize="small")
    figure.suptitle(problem.title)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, found: Sequence[Line], by: str, field: str) -> None:
    for index, line in enumerate(found):
        for number, ended in enumerate(line.runs):
            rows = [row for row in ended.run.rows if row.updates]
            axes.plot(
                [getattr(row, by) for row in rows],
                [getattr(row, field) for row in rows],
                color=colormaps["tab10"](index % 10),
                lw=1.2,
                alpha=0.8,
                label=None if number else line.name,
            )
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _levels(axes: Axes, problem: Problem) -> None:
    """Draw the lowest errors in the logs, each with its name at the right.

    Neighbours' names are beside one another.
    """
    known = sorted(problem.levels.known().items(), key=lambda item: item[1])
    for index, (name, level) in enumerate(known):
        axes.axhline(level, color="0.6", lw=0.6, ls=":", zorder=0)
        axes.annotate(
            name,
            xy=(1 - 0.08 * (index % 3), level),
            xycoords=axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize="x-small",
            color="0.5",
        )
