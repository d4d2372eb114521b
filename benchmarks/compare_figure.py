"""The picture of a comparison: how far each optimizer has come, and when."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.compare_table import Line


def draw(
    title: str, found: Sequence[Line], milestones: Sequence[float], path: Path
) -> None:
    """Draw the excess against the seconds: a colour an optimizer, a line a seed.

    Args:
      title: of the problem.
      found: a line for each optimizer.
      milestones: excesses, falling.
      path: of the picture.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = [colormaps["tab10"](index % 10) for index in range(len(found))]
    for line, colour in zip(found, colours, strict=True):
        for ended in line.runs:
            rows = [row for row in ended.run.rows if row.excess > 0]
            axes.plot(
                [row.seconds for row in rows],
                [row.excess for row in rows],
                color=colour,
                lw=1.2,
                alpha=0.8,
            )
    for milestone in milestones:
        axes.axhline(milestone, color="0.85", lw=0.8, zorder=0)
    axes.set(
        xlabel="training time in seconds, without compiling and measuring",
        ylabel="f − floor, on the training cases",
        yscale="log",
        title=title,
        xlim=(0, None),
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, found, colours)
    figure.savefig(path, dpi=150)


def _label_ends(axes: Axes, found: Sequence[Line], colours: Sequence[Any]) -> None:
    """Name each optimizer at its lines' end, apart from one another."""
    ends = []
    for line, colour in zip(found, colours, strict=True):
        excess = statistics.median(line.final("excess"))
        if excess > 0 and math.isfinite(excess):
            seconds = statistics.median(line.final("seconds"))
            ends.append((excess, seconds, line.name, colour))
    place, gap = -math.inf, 0.05  # as fractions of the axis' height
    to_axes = axes.transData + axes.transAxes.inverted()
    for excess, seconds, name, colour in sorted(ends, key=lambda end: end[0]):
        place = max(place + gap, to_axes.transform((seconds, excess))[1])
        axes.annotate(
            name,
            xy=(seconds, excess),
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": "0.8", "lw": 0.6},
        )
