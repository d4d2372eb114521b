"""What the recurrent networks have come to: a table, and a picture of each problem."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.rnn_history import Ended
from benchmarks.rnn_tasks import TASKS

_NONE = 0.5e-4
"""Where a picture shows that of 10,000 test sequences none was answered wrongly."""


def table(runs: Sequence[Ended]) -> Table:
    """Lay out the runs, those that differ by their seed in one line.

    Args:
      runs: at least one.

    Returns:
      A rich table.
    """
    result = Table(
        caption="Medians over seeds: of the solved runs, if there are any. CG: "
        "iterations; drawn: sequences to learn from; time: of training.",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    result.add_column("task, steps", no_wrap=True)
    result.add_column("optimizer", no_wrap=True)
    for name in ("solved", "wrong", "updates", "CG", "drawn", "time"):
        result.add_column(name, justify="right", no_wrap=True)
    ordered = sorted(runs, key=_line)
    for (task, length, *_), group in groupby(ordered, key=_line):
        seeds = list(group)
        solved = [run for run in seeds if run.solved]
        last = [run.rows[-1] for run in solved or seeds]
        result.add_row(
            f"{task} {length}",
            seeds[0].plan.racer,
            f"{len(solved)}/{len(seeds)}",
            f"{median(row.wrong for row in last):.1%}",
            _count(median(row.updates for row in last)),
            _count(median(row.cg_iterations for row in last)),
            _count(median(row.sequences for row in last)),
            f"{median(row.seconds for row in last):.0f} s",
            style=None if solved else "dim",
        )
    return result


def draw(runs: Sequence[Ended], folder: Path) -> list[Path]:
    """Draw a picture of each problem of which there is a run with an update.

    Args:
      runs: of any problems.
      folder: that gets the pictures.

    Returns:
      Their paths.
    """
    paths = []
    ordered = sorted((run for run in runs if len(run.rows) > 1), key=_line)
    for (task, length), group in groupby(ordered, key=lambda run: _line(run)[:2]):
        paths.append(folder / f"{task}-{length}.png")
        draw_problem(list(group)).savefig(paths[-1], dpi=150)
    return paths


def draw_problem(runs: Sequence[Ended]) -> Figure:
    """Draw wrong answers and loss against the sequences seen; a line for each seed.

    Args:
      runs: of one task and length, with an update at least.

    Returns:
      A matplotlib figure that no window shows.
    """
    plan = runs[0].plan
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    racers = list(dict.fromkeys(run.plan.racer for run in runs))
    for index, racer in enumerate(racers):
        for number, run in enumerate(run for run in runs if run.plan.racer == racer):
            rows = run.rows[1:]
            drawn = [row.sequences for row in rows]
            style = {"color": f"C{index}", "lw": 1.2}
            label = racer if number == 0 else None
            wrong = [max(row.wrong, _NONE) for row in rows]
            axes[0].plot(drawn, wrong, label=label, **style)
            axes[1].plot(drawn, [row.loss for row in rows], **style)
    axes[0].axhline(runs[0].settings["stop"], color="gray", lw=0.8, ls="--")
    axes[0].set(
        ylabel="test sequences answered wrongly",
        yscale="log",
        title=f"{TASKS[plan.task].title}, {plan.length} steps",
    )
    axes[0].legend(frameon=False)
    axes[1].set(
        ylabel="loss of a test sequence",
        yscale="log",
        xlabel="sequences drawn for training",
        xscale="log",
    )
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _count(number: float) -> str:
    """Write a number in at most seven letters: a line has 80."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:,.1f}M"


def _line(run: Ended) -> tuple[str, int, bool, float]:
    """Return what the runs in one line of the table share, in the table's order."""
    plan = run.plan
    return plan.task, plan.length, plan.family == "adam", plan.setting
