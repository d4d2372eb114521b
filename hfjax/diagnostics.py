"""Reading `info`: scalars for any logger, a table of updates, a picture of a run.

    history = []
    ...
    history.append(hfjax.diagnostics.scalars(state))   # after each update
    print(hfjax.diagnostics.table(history))
    hfjax.diagnostics.plot(history).savefig("run.png")

How to read them: ρ near 1 and λ falling is a model that predicts well; λ that
climbs for long, or ρ below ¼ again and again, is a gradient of something else
than the objective, or curvature from too few cases; conjugate gradients that end
by their limit in every update would use more iterations or a better
preconditioner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import optax

from hfjax.cg import Reason
from hfjax.state import HessianFreeInfo, Rejection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalars = Mapping[str, float | int | bool | str]


def scalars(state: optax.OptState) -> dict[str, float | int | bool | str]:
    """Read what the last update did out of an optimizer state.

    Waits for the update to be computed and copies a few numbers from the device.

    Args:
      state: a `HessianFreeState`, alone or inside the state of a chain or wrapper.

    Returns:
      Python numbers by name: `count` (updates so far), `damping` (λ for the next
      update), the fields of `HessianFreeInfo`, with `cg_reason` and `rejection` as
      words.

    Raises:
      KeyError: if no `HessianFreeState` is in it, or more than one.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> state = hfjax.hessian_free(objective).init(jnp.zeros(1))
      >>> scalars(state)["cg_reason"]
      'running'
    """
    found = [
        part for part in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(part)
    ]
    if len(found) != 1:
        msg = f"Expected one HessianFreeState in `state`, found {len(found)}."
        raise KeyError(msg)
    count, damping, info = jax.device_get(
        (found[0].count, found[0].damping, found[0].info)
    )
    values = {name: value.item() for name, value in info._asdict().items()}
    values["cg_reason"] = _word(Reason, values["cg_reason"])
    values["rejection"] = _word(Rejection, values["rejection"])
    return {"count": count.item(), "damping": damping.item(), **values}


def table(history: Sequence[Scalars]) -> str:
    """Lay out a run as text, one line per update.

    Args:
      history: what `scalars` returned after each update.

    Returns:
      The table: update, f after it, λ, ρ, CG iterations (chosen / run), α, remarks.

    Example:
      >>> row = dict(
      ...     count=1,
      ...     value_after=2.5,
      ...     damping=30.0,
      ...     reduction_ratio=0.82,
      ...     chosen_iteration=11,
      ...     cg_iterations=13,
      ...     step_size=1.0,
      ...     cg_reason="stopping rule",
      ...     rejection="none",
      ... )
      >>> print(table([row]))
      update            f         λ        ρ       CG     α  remarks
           1          2.5        30    0.820    11/13  1.00
    """
    lines = ["update            f         λ        ρ       CG     α  remarks"]
    for row in history:
        iterations = f"{row['chosen_iteration']}/{row['cg_iterations']}"
        usual = {"stopping rule", "max iterations", "residual zero"}
        remarks = [
            *([f"rejected: {row['rejection']}"] if row["rejection"] != "none" else []),
            *([str(row["cg_reason"])] if row["cg_reason"] not in usual else []),
        ]
        lines.append(
            f"{row['count']:6d} {row['value_after']:12.7g} {row['damping']:9.3g} "
            f"{row['reduction_ratio']:8.3f} {iterations:>8} {row['step_size']:5.2f}  "
            + ", ".join(remarks)
        )
    return "\n".join(lines)


def plot(history: Sequence[Scalars]) -> Figure:
    """Draw a run: f, λ, ρ, CG iterations and α by update; rejected updates marked.

    Needs matplotlib (`pip install hfjax[plot]`).

    Args:
      history: what `scalars` returned after each update.

    Returns:
      A matplotlib figure that no window shows.

    Raises:
      ValueError: if `history` is empty.
    """
    if not history:
        msg = "`history` is empty: append `scalars(state)` after each update."
        raise ValueError(msg)
    from matplotlib.figure import Figure

    update = [row["count"] for row in history]
    rejected = [row["count"] for row in history if not row["accepted"]]

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in history]

    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True)
    axes[0].plot(update, column("value_after"), color="black")
    axes[0].set(ylabel="objective f", yscale="log")
    axes[1].plot(update, column("damping"), color="tab:red")
    axes[1].set(ylabel="damping λ", yscale="log")
    axes[2].plot(
        update,
        [max(min(r, 2), -1) for r in column("reduction_ratio")],
        ".-",
        color="tab:blue",
        ms=3,
        lw=0.8,
    )
    axes[2].set(ylabel="reduction ratio ρ\n(clipped to −1…2)", ylim=(-1.1, 2.1))
    for threshold in (0.25, 0.75):
        axes[2].axhline(threshold, color="gray", lw=0.6, ls="--")
    axes[3].plot(update, column("cg_iterations"), color="tab:gray", lw=2.5, label="run")
    axes[3].plot(update, column("chosen_iteration"), color="tab:green", label="chosen")
    axes[3].set(ylabel="CG iterations")
    axes[3].set_ylim(bottom=0)
    axes[3].legend(
        loc="lower right", bbox_to_anchor=(1, 1), frameon=False, ncols=2, borderpad=0
    )
    axes[4].plot(update, column("step_size"), ".-", color="tab:purple", ms=3, lw=0.8)
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


def _is_state(part: object) -> bool:
    return isinstance(getattr(part, "info", None), HessianFreeInfo)


def _word(kind: type[Reason] | type[Rejection], code: int) -> str:
    return kind(code).name.lower().replace("_", " ")
