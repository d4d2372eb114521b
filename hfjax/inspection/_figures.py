"""Figures of `hfjax.diagnostics`; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalars = Mapping[str, float | int | bool | str]
"""What `hfjax.diagnostics.scalars` returns."""


def plot(history: Sequence[Scalars]) -> Figure:
    """Draw f, λ, ρ, CG iterations and α against the update, and mark rejected updates.

    Args:
      history: what `scalars` returned after each update, for example a `History`.

    Returns:
      A matplotlib figure, which is not shown.

    Raises:
      ValueError: if `history` is empty.
    """
    _check(history)
    update = [row["count"] for row in history]
    rejected = [row["count"] for row in history if not row["accepted"]]
    ratios = np.clip(_column(history, "reduction_ratio"), -1, 2)
    dots: dict[str, Any] = {"marker": ".", "ms": 3, "lw": 0.8}

    def draw(axis: Any, name: str, color: str, **style: Any) -> None:
        axis.plot(update, _column(history, name), color=color, **style)

    figure, axes = _new((8, 9), 5, 1, sharex=True)
    draw(axes[0], "value_after", "black")
    axes[0].set(ylabel="objective f", yscale="log")
    draw(axes[1], "damping", "tab:red")
    axes[1].set(ylabel="damping λ", yscale="log")
    axes[2].plot(update, ratios, color="tab:blue", **dots)
    axes[2].set(ylabel="reduction ratio ρ\n(clipped to −1…2)", ylim=(-1.1, 2.1))
    # The default thresholds of `damping.levenberg_marquardt`.
    for threshold in (0.25, 0.75):
        axes[2].axhline(threshold, color="gray", lw=0.6, ls="--")
    draw(axes[3], "cg_iterations", "tab:gray", lw=2.5, label="run")
    draw(axes[3], "chosen_iteration", "tab:green", label="chosen")
    axes[3].set(ylabel="CG iterations")
    axes[3].set_ylim(bottom=0)
    axes[3].legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, borderpad=0
    )
    draw(axes[4], "step_size", "tab:purple", **dots)
    axes[4].set(ylabel="step size α", ylim=(-0.05, 1.1), xlabel="update")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        for count in rejected:
            axis.axvline(count, color="tab:red", alpha=0.25, lw=1)
    if rejected:
        figure.suptitle(
            "red lines: rejected updates", fontsize="small", color="tab:red"
        )
    return figure


def plot_progress(history: Sequence[Scalars], *, floor: float = 0.0) -> Figure:
    """Draw f, and a recorded `error`, against wall time and CG iterations.

    Args:
      history: a `History`; or rows of `scalars` with `seconds` and, optionally, `error`.
      floor: a lower bound of f, in the same units; f − `floor` is drawn.

    Returns:
      A matplotlib figure, which is not shown: f in the first row, then the error.

    Raises:
      ValueError: if `history` is empty, or its rows have no `seconds`.
    """
    _check(history)
    if "seconds" not in history[0]:
        msg = (
            "Rows of `history` must have `seconds`: record them by "
            "`hfjax.diagnostics.History`."
        )
        raise ValueError(msg)
    axes_of = {
        "seconds": _column(history, "seconds"),
        "CG iterations": np.cumsum(_column(history, "cg_iterations")),
    }
    rows = [("objective f" + (f" − {floor:g}" if floor else ""), "value_after", floor)]
    if "error" in history[0]:
        rows.append(("error", "error", 0.0))
    shared: dict[str, Any] = {"sharex": "col", "sharey": "row", "squeeze": False}
    figure, grid = _new((8, 1 + 2.5 * len(rows)), len(rows), 2, **shared)
    for axes, (label, name, low) in zip(grid, rows, strict=True):
        heights = np.subtract(_column(history, name), low)
        for axis, places in zip(axes, axes_of.values(), strict=True):
            axis.plot(places, heights, ".-", color="black", ms=3, lw=1)
            axis.set_yscale("log" if np.all(heights > 0) else "linear")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel(label)
    for axis, unit in zip(grid[-1], axes_of, strict=True):
        axis.set_xlabel(unit)
    return figure


def plot_live(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw f, λ and the step against the update, as far as the rows have them.

    Args:
      rows: numbers of at least one update, with `update`.

    Returns:
      A matplotlib figure, which is not shown.
    """
    labels = {"value": "objective f", "damping": "damping λ", "step": "step"}
    shown = [name for name in labels if any(name in row for row in rows)]
    figure, grid = _new(
        (6.5, 0.8 + 1.7 * len(shown)), len(shown), 1, sharex=True, squeeze=False
    )

    def draw(axis: Any, name: str, color: str, label: str) -> None:
        before = name == "value"  # The other numbers are those after the update.
        some = [(row["update"] - before, row[name]) for row in rows if name in row]
        if not some:
            return
        places, heights = zip(*some, strict=True)
        axis.plot(places, heights, ".-", color=color, ms=3, lw=1, label=label)

    for axis, name in zip(grid[:, 0], shown, strict=True):
        draw(axis, name, "black", "training")
        axis.set_ylabel(labels[name])
        axis.grid(alpha=0.25)
        if name == "value" and any("validation" in row for row in rows):
            draw(axis, "validation", "tab:orange", "validation")
            axis.legend(frameon=False)
        heights = [height for line in axis.lines for height in line.get_ydata()]
        # A step of 0 is one that was rejected: a gap in the line.
        if min(heights) >= 0 and max(heights) > 0:
            axis.set_yscale("log", nonpositive="mask")
    grid[-1, 0].set_xlabel("updates")
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_cg_run(run: Any) -> Figure:
    """Draw the changes of f and of the model M along one run of conjugate gradients.

    A circle marks the iterate with the lowest f, which backtracking would choose.

    Args:
      run: the result of `hfjax.diagnostics.cg_run`.

    Returns:
      A matplotlib figure, which is not shown.

    References:
      Martens & Sutskever (2012), figure 4.
    """
    length = int(run.num_iterations)
    models = np.asarray(run.model_values, np.float64)[: length + 1]
    seen = np.asarray(run.iterations) >= 0
    places = np.asarray(run.iterations)[seen]
    changes = np.asarray(run.objective_changes, np.float64)[seen]
    figure, axis = _new((6.5, 4))
    axis.plot(np.arange(length + 1), models, color="tab:blue", label="M, the model")
    axis.plot(places, changes, ".-", color="tab:red", ms=3, label="f, as it is")
    finite = np.isfinite(changes)
    if np.any(finite):
        best = int(np.argmin(np.where(finite, changes, np.inf)))
        at = places[best], changes[best]
        axis.plot(*at, "o", color="tab:red", mfc="none", ms=9)
        words = f"least f: iterate {places[best]}"
        axis.annotate(
            words, at, (0, -16), textcoords="offset points", ha="center", size="small"
        )
    # Limit the axis: if f explodes, M would look like a flat line.
    low = min(np.min(models), np.min(changes[finite], initial=0.0))
    axis.set_ylim(1.15 * low, max(0.15 * -low, np.max(models)))
    axis.axhline(0, color="gray", lw=0.6)
    axis.set(xlabel="CG iteration", ylabel="change from the start of the update")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


def plot_spectrum(values: ArrayLike, *, damping: float | None = None) -> Figure:
    """Draw eigenvalues or Ritz values against their rank, on a logarithmic axis.

    Negative values are drawn by magnitude, in another colour; zeros are left out.

    Args:
      values: eigenvalues, shape `[values]`, for example of `hfjax.spectrum.ritz_values`.
      damping: λ, in the same units, drawn as a horizontal line.

    Returns:
      A matplotlib figure, which is not shown.

    Raises:
      ValueError: if there is no nonzero value.
    """
    ordered = np.sort(np.asarray(values, np.float64).ravel())[::-1]
    ranks = np.arange(1, len(ordered) + 1)
    if not np.any(ordered):
        msg = f"`values` must hold some that are not zero, got {len(ordered)} value(s)."
        raise ValueError(msg)
    figure, axis = _new((6.5, 4))
    signs = {"positive": (1, "tab:blue"), "negative": (-1, "tab:red")}
    for label, (sign, color) in signs.items():
        chosen = sign * ordered > 0
        if np.any(chosen):
            at = ranks[chosen], sign * ordered[chosen]
            axis.plot(*at, "o", color=color, ms=4, label=label)
    if damping is not None:
        axis.axhline(damping, color="gray", ls="--", lw=1, label=f"λ = {damping:.2g}")
    axis.set(xlabel="rank", ylabel="eigenvalue", yscale="log")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25, which="both")
    if damping is not None or np.any(ordered < 0):
        axis.legend(frameon=False)
    return figure


def _new(size: tuple[float, float], *grid: int, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def _check(history: Sequence[Scalars]) -> None:
    if not history:
        msg = "`history` is empty: append `scalars(state)` after each update."
        raise ValueError(msg)


def _column(history: Sequence[Scalars], name: str) -> list[float]:
    return [float(row[name]) for row in history]
