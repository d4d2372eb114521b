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
    from matplotlib.figure import Figure

    update = [row["count"] for row in history]
    rejected = [row["count"] for row in history if not row["accepted"]]

    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True)
    axes[0].plot(update, _column(history, "value_after"), color="black")
    axes[0].set(ylabel="objective f", yscale="log")
    axes[1].plot(update, _column(history, "damping"), color="tab:red")
    axes[1].set(ylabel="damping λ", yscale="log")
    axes[2].plot(
        update,
        [max(min(r, 2), -1) for r in _column(history, "reduction_ratio")],
        ".-",
        color="tab:blue",
        ms=3,
        lw=0.8,
    )
    axes[2].set(ylabel="reduction ratio ρ\n(clipped to −1…2)", ylim=(-1.1, 2.1))
    # The default thresholds of `damping.levenberg_marquardt`.
    for threshold in (0.25, 0.75):
        axes[2].axhline(threshold, color="gray", lw=0.6, ls="--")
    axes[3].plot(
        update, _column(history, "cg_iterations"), color="tab:gray", lw=2.5, label="run"
    )
    axes[3].plot(
        update, _column(history, "chosen_iteration"), color="tab:green", label="chosen"
    )
    axes[3].set(ylabel="CG iterations")
    axes[3].set_ylim(bottom=0)
    axes[3].legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, borderpad=0
    )
    axes[4].plot(
        update, _column(history, "step_size"), ".-", color="tab:purple", ms=3, lw=0.8
    )
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
    from matplotlib.figure import Figure

    axes_of = {
        "seconds": _column(history, "seconds"),
        "CG iterations": np.cumsum(_column(history, "cg_iterations")),
    }
    rows = [("objective f" + (f" − {floor:g}" if floor else ""), "value_after", floor)]
    if "error" in history[0]:
        rows.append(("error", "error", 0.0))
    figure = Figure(figsize=(8, 1 + 2.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, sharex="col", sharey="row", squeeze=False)
    for row, (axes, (label, name, low)) in enumerate(zip(grid, rows, strict=True)):
        heights = np.subtract(_column(history, name), low)
        for axis, (unit, places) in zip(axes, axes_of.items(), strict=True):
            axis.plot(places, heights, ".-", color="black", ms=3, lw=1)
            axis.set_yscale("log" if np.all(heights > 0) else "linear")
            axis.grid(alpha=0.25)
            if row == len(rows) - 1:
                axis.set_xlabel(unit)
        axes[0].set_ylabel(label)
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
    from matplotlib.figure import Figure

    length = int(run.num_iterations)
    models = np.asarray(run.model_values, np.float64)[: length + 1]
    seen = np.asarray(run.iterations) >= 0
    places = np.asarray(run.iterations)[seen]
    changes = np.asarray(run.objective_changes, np.float64)[seen]
    order = np.argsort(places)
    places, changes = places[order], changes[order]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.arange(length + 1), models, color="tab:blue", label="M, the model")
    axis.plot(places, changes, ".-", color="tab:red", ms=3, label="f, as it is")
    finite = np.isfinite(changes)
    if np.any(finite):
        best = int(np.argmin(np.where(finite, changes, np.inf)))
        axis.plot(places[best], changes[best], "o", color="tab:red", mfc="none", ms=9)
        axis.annotate(
            f"least f: iterate {places[best]}",
            (places[best], changes[best]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
            fontsize="small",
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
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ordered = np.sort(np.asarray(values, np.float64).ravel())[::-1]
    ranks = np.arange(1, len(ordered) + 1)
    if not np.any(ordered):
        msg = f"`values` must hold some that are not zero, got {len(ordered)} value(s)."
        raise ValueError(msg)
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for sign, colour, label in (
        (1, "tab:blue", "positive"),
        (-1, "tab:red", "negative"),
    ):
        chosen = sign * ordered > 0
        if np.any(chosen):
            axis.plot(
                ranks[chosen],
                sign * ordered[chosen],
                "o",
                color=colour,
                ms=4,
                label=label,
            )
    if damping is not None:
        axis.axhline(damping, color="gray", ls="--", lw=1, label=f"λ = {damping:.2g}")
    axis.set(xlabel="rank", ylabel="eigenvalue", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25, which="both")
    if damping is not None or np.any(ordered < 0):
        axis.legend(frameon=False)
    return figure


def _check(history: Sequence[Scalars]) -> None:
    if not history:
        msg = "`history` is empty: append `scalars(state)` after each update."
        raise ValueError(msg)


def _column(history: Sequence[Scalars], name: str) -> list[float]:
    return [float(row[name]) for row in history]
