"""What a race has come to: a table, and three pictures."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

import hfjax
from benchmarks.data import SIDE
from benchmarks.history import ImageHistory, Row, Run
from benchmarks.network import Autoencoder

_COLOURS = {"hf": "tab:blue", "adam": "tab:orange", "lbfgs": "tab:green"}
_PICTURED = 10
"""Test images in the picture of reconstructions."""


def table(history: ImageHistory) -> Table:
    """Lay out where each run ended.

    Args:
      history: of the race.

    Returns:
      A rich table.
    """
    result = Table(
        caption=f"Floor: {history.entropy_floor:.3f} nats, the entropy of the pixels. "
        "Error: squared, of an image. Dim: a learning rate that lost.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("optimizer", no_wrap=True)
    for name in ("compile", "training", "updates", "f", "f − floor"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ("train\nerror", "test\nerror"):
        result.add_column(name, justify="right", no_wrap=True)
    best = {run.name for run in history.best()}
    for run in history.started():
        row = run.last
        result.add_row(
            run.name,
            f"{run.compile_seconds:.1f} s",
            f"{row.seconds:.1f} s",
            f"{row.updates:,}",
            f"{row.loss:.3f}",
            f"{row.loss - history.entropy_floor:.3f}",
            f"{row.train_error:.3f}",
            f"{row.test_error:.3f}",
            style=None if run.name in best else "dim",
        )
    return result


def draw(
    history: ImageHistory, network: Autoencoder, test: np.ndarray, folder: Path
) -> list[Path]:
    """Draw what there is to draw.

    Args:
      history: of the race.
      network: the model.
      test: test images.
      folder: that gets the pictures.

    Returns:
      Their paths: `loss.png`, `reconstructions.png` and, of HF, `updates.png`.
    """
    figures = {}
    if history.started():
        figures["loss.png"] = draw_loss(history)
        figures["reconstructions.png"] = draw_reconstructions(
            history.best(), network, test[:_PICTURED]
        )
    for run in history.runs:
        if run.scalars:
            figures["updates.png"] = hfjax.diagnostics.plot(run.scalars)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def draw_loss(history: ImageHistory) -> Figure:
    """Draw the excess of the loss over its floor against the training time.

    Args:
      history: of the race, with a run that has been measured.

    Returns:
      A matplotlib figure that no window shows.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    best = {run.name for run in history.best()}
    for run in history.started():
        leads = run.name in best
        axes.plot(
            [row.seconds for row in run.rows],
            [row.loss - history.entropy_floor for row in run.rows],
            color=_COLOURS[run.family] if leads else "0.6",
            lw=1.8 if leads else 0.8,
            zorder=3 if leads else 2,
        )
    axes.set(
        xlabel="training time in seconds, without compiling and measuring",
        ylabel="f − entropy floor, in nats",
        yscale="log",
        title=history.settings.get("title", ""),
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, history)
    return figure


def draw_reconstructions(
    runs: Sequence[Run[Row]], network: Autoencoder, images: np.ndarray
) -> Figure:
    """Draw images above what each run makes of them.

    Args:
      runs: a row of pictures each.
      network: the model.
      images: `[cases, pixels]`.

    Returns:
      A matplotlib figure that no window shows.
    """
    rows = {"test image": images}
    for run in runs:
        if run.params is not None:
            outputs = jax.nn.sigmoid(network.model_fn(run.params, jnp.asarray(images)))
            error = f"{run.last.test_error:.3g}"
            rows[f"{run.name}\nerror {error}"] = np.asarray(outputs)
    size = (1.5 + 0.85 * len(images), 0.9 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for cells, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(cells, pictures, strict=True):
            axes.imshow(picture.reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.8")
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def _label_ends(axes: Axes, history: ImageHistory) -> None:
    """Name each line at its end, apart from one another."""
    runs = [run for run in history.started() if math.isfinite(run.last.loss)]
    runs.sort(key=lambda run: run.last.loss)
    best = {run.name for run in history.best()}
    place, gap = -math.inf, 0.05  # as fractions of the axis' height
    to_axes = axes.transData + axes.transAxes.inverted()
    for run in runs:
        end = (run.last.seconds, run.last.loss - history.entropy_floor)
        place = max(place + gap, to_axes.transform(end)[1])
        axes.annotate(
            run.name,
            xy=end,
            xytext=(1.02, place),
            textcoords="axes fraction",
            va="center",
            color=_COLOURS[run.family] if run.name in best else "0.5",
            arrowprops={"arrowstyle": "-", "color": "0.8", "lw": 0.6},
        )
