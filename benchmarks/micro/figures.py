"""Draw the pictures of results/ from the tables on the same pages.

The pictures show numbers that are on the page already, so nothing is measured again. Run
this after changing a table of `costs.md`, `least_squares.md` or `transformers.md`.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "results"

_COLORS = "#4477aa", "#ee9944", "#888888"
_NUMBER = re.compile(r"(-?\d[\d,]*\.?\d*(?:e-?\d+)?)(?: of \d+| m?s| %)?")
"""One number with its unit. A cell with two of them is not drawn."""


class Bars(NamedTuple):
    """One colour of bars.

    Attributes:
      table: the first cell of the table's heading.
      column: the number of its column.
      label: what the bars show, "" if the panel has no others.
    """

    table: str
    column: int
    label: str = ""


class Panel(NamedTuple):
    """One diagram of bars, with a row for each row of a table.

    Attributes:
      title: stands above it.
      unit: stands below its axis.
      bars: the tables of all have the same rows.
      stacked: whether the bars of a row add up, or stand below one another.
      limit: the end of the axis, if it is not the longest bar. Longer bars are cut, with
        their number.
    """

    title: str
    unit: str
    bars: tuple[Bars, ...]
    stacked: bool = False
    limit: float | None = None


_COMPILE, _MEMORY = "update, with its gradient", "set-up"
_TO_M = "to the M of the defaults, update (λ)"
PICTURES = {
    "costs": (
        Panel(
            "Seconds before an update runs",
            "seconds of the processor",
            (Bars(_COMPILE, 1, "trace"), Bars(_COMPILE, 2, "XLA")),
            stacked=True,
        ),
        Panel(
            "Memory of an update",
            "vectors of the parameters' size",
            (Bars(_MEMORY, 1),),
            limit=65,
        ),
    ),
    "least_squares": (
        Panel("Fits that are right", "of NIST's 54", (Bars("solver", 1),)),
        Panel("Digits of a right fit", "median", (Bars("solver", 2),)),
        Panel("First fit, with compiling", "seconds", (Bars("solver", 5),)),
        Panel("Another fit", "milliseconds", (Bars("solver", 6),)),
    ),
    "transformers": (
        Panel(
            "To where Martens' rule stops",
            "CG iterations, mean over systems",
            (
                Bars("attention, update (λ)", 5, "attention"),
                Bars("experts, update (λ)", 3, "experts"),
            ),
        ),
        Panel(
            "To where the defaults stop",
            "CG iterations, mean over systems",
            (Bars(_TO_M, 4, "attention"), Bars(_TO_M, 7, "experts")),
        ),
    ),
}


def tables(page: str) -> dict[str, list[list[str]]]:
    """Return the rows of each table of a page, by the first cell of its heading."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", page, flags=re.MULTILINE):
        rows = [
            [re.sub(r"[*`]", "", cell).strip() for cell in line[1:-1].split("|")]
            for line in block.splitlines()
        ]
        found.setdefault(rows[0][0], rows[2:])
    return found


def values(page: str, bars: Sequence[Bars]) -> dict[str, list[float]]:
    """Return what to draw: for each row of the tables, the number of each of the bars.

    Args:
      page: the text with the tables.
      bars: of one panel.

    Returns:
      The numbers by the first cell of the row. A row is left out if one of its cells is
      not a single number.
    """
    known = tables(page)
    found: dict[str, list[float]] = {}
    for number, row in enumerate(known[bars[0].table]):
        cells = [known[each.table][number][each.column] for each in bars]
        matches = [_NUMBER.fullmatch(cell) for cell in cells]
        if all(matches):
            # Equal names, such as "… without preconditioner", are rows of their own.
            name = row[0] + "\u200b" * sum(row[0] == n.rstrip("\u200b") for n in found)
            found[name] = [float(m[1].replace(",", "")) for m in matches if m]
    return found


def draw(page: str, panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels of one page beside one another.

    Args:
      page: the text with the tables.
      panels: from left to right. The second and later ones repeat the names of the rows
        only if they are others.
      path: of the picture.
    """
    found = [values(page, panel.bars) for panel in panels]
    shared = all(list(rows) == list(found[0]) for rows in found)
    height = 1.4 + 0.36 * max(map(len, found))
    figure = Figure(figsize=(12, height), layout="constrained", facecolor="white")
    places = figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0]
    for axes, panel, rows in zip(places, panels, found, strict=True):
        _panel(axes, panel, rows)
    labels = [[each.label for each in panel.bars] for panel in panels]
    for number, axes in enumerate(places):
        # Neighbours with the same labels share the legend of the last one.
        if any(labels[number]) and labels[number] not in labels[number + 1 :]:
            axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, panel: Panel, rows: dict[str, list[float]]) -> None:
    count = 1 if panel.stacked else len(panel.bars)
    for index, each in enumerate(panel.bars):
        lengths = [numbers[index] for numbers in rows.values()]
        shift = 0.0 if panel.stacked else 0.8 * ((index + 0.5) / count - 0.5)
        start = [sum(numbers[:index]) * panel.stacked for numbers in rows.values()]
        places = [row + shift for row in range(len(rows))]
        axes.barh(
            places,
            lengths,
            height=0.8 / count,
            left=start,
            color=_COLORS[index],
            label=each.label,
        )
        if not panel.stacked:
            _write(axes, places, lengths, panel.limit)
    if panel.stacked:
        _write(axes, range(len(rows)), [sum(n) for n in rows.values()], panel.limit)
    axes.set_yticks(range(len(rows)), [name.strip("\u200b") for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # From the top, as in the table.
    axes.set(title=panel.title, xlabel=panel.unit)
    axes.margins(x=0.15)
    if panel.limit is not None:
        axes.set_xlim(0, panel.limit)
    axes.spines[["top", "right"]].set_visible(False)


def _write(
    axes: Axes, places: Sequence[float], lengths: Sequence[float], limit: float | None
) -> None:
    """Write numbers beside the ends of bars, or within a bar that is cut."""
    for place, length in zip(places, lengths, strict=True):
        cut = limit is not None and length > limit
        axes.annotate(
            f"{length:.3g} →" if cut else f"{length:.3g}",
            xy=(limit if cut else length, place),
            xytext=(-4 if cut else 3, 0),
            textcoords="offset points",
            ha="right" if cut else "left",
            va="center",
            color="white" if cut else "black",
            fontsize=9,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of pictures")


def run(args: argparse.Namespace) -> int:
    """Draw all pictures."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name, panels in PICTURES.items():
        path = args.out / f"{name}.png"
        draw((RESULTS / f"{name}.md").read_text(), panels, path)
        print(path)
    return 0
