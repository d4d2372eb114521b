"""Pictures of a comparison: how far each optimizer has come, and when."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.harness.table import Line
from benchmarks.suites.problem import Summary

_COLUMNS = {
    "seconds": "training time in seconds, without compiling and measuring",
    "updates": "updates",
}
_NAMES = {"adam": "Adam", "lbfgs": "L-BFGS", "kfac": "K-FAC", "muon": "Muon"}
"""Of optimizers, for people who do not know the command."""


def draw(summary: Summary, found: Sequence[Line], path: Path) -> None:
    """Draw the value against seconds and updates, and the milestones as thin lines.

    A value of 0 is drawn below the lowest milestone.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (by, words) in zip(panels, _COLUMNS.items(), strict=True):
        _panel(axes, found, by, least=min(summary.milestones.values()) / 2)
        for level in summary.milestones.values():
            axes.axhline(level, color="0.6", lw=0.6, ls=":", zorder=0)
        # A run that diverges at its start leaves nothing to draw.
        has_some = math.isfinite(axes.dataLim.minposx)
        axes.set(xlabel=words, xscale="log" if has_some else "linear", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(summary.value)
    panels[0].legend(frameon=False, fontsize="small")
    _name_levels(panels[1], summary.milestones)
    figure.suptitle(summary.title)
    figure.savefig(path, dpi=150)


def draw_from_start(
    summary: Summary, found: Sequence[Line], clock: str, path: Path
) -> None:
    """Draw the value against all seconds, for people who see nothing but this picture.

    Seconds count from the start of Python: imports, data and compiling included.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, line in enumerate(found):
        for number, one in enumerate(line.runs):
            rows = [row for row in one.run.rows if row.value > 0]
            axes.plot(
                [one.run.before_training + row.seconds for row in rows],
                [row.value for row in rows],
                color=colormaps["tab10"](index % 10),
                lw=2.2 if index == 0 else 1.4,
                label=None if number else _NAMES.get(line.optimizer, line.optimizer),
            )
    # Levels that are only numbers are on the axis already.
    named = {
        f"published: {name}": level
        for name, level in summary.milestones.items()
        if not name.replace(".", "", 1).isdecimal()
    }
    for level in named.values():
        axes.axhline(level, color="0.6", lw=0.8, ls=":", zorder=0)
    _name_levels(axes, named, start=0.01, shift=0.2, ha="left")
    words = {"wall": "seconds", "processor": "processor seconds"}[clock]
    axes.set(
        xlabel=f"{words} from the start of Python, compiling included",
        ylabel=summary.value,
        yscale="log",
    )
    axes.set_xlim(left=0)
    axes.set_title(summary.title, fontsize="medium", wrap=True)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, found: Sequence[Line], by: str, least: float) -> None:
    for index, line in enumerate(found):
        for number, one in enumerate(line.runs):
            rows = [row for row in one.run.rows if row.updates]
            axes.plot(
                [getattr(row, by) for row in rows],
                # Nothing left, as no wrong answer, has no logarithm.
                [row.value if row.value > 0 else least for row in rows],
                color=colormaps["tab10"](index % 10),
                lw=1.2,
                alpha=0.8,
                label=None if number else line.name,
            )


def _name_levels(
    axes: Axes,
    levels: Mapping[str, float],
    start: float = 1.0,
    shift: float = -0.1,
    ha: str = "right",
) -> None:
    """Write each level's name above it, neighbours beside one another."""
    falling = sorted(levels.items(), key=lambda item: item[1])
    for index, (name, level) in enumerate(falling):
        axes.annotate(
            name,
            xy=(start + shift * (index % 3), level),
            xycoords=axes.get_yaxis_transform(),
            ha=ha,
            va="bottom",
            fontsize="x-small",
            color="0.5",
        )
