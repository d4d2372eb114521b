"""Seeing a run: scalars for any logger, a live line, tables, pictures.

    history = hfjax.diagnostics.History()
    bar = tqdm.tqdm(range(50))               # tqdm.auto: a notebook's, with ipywidgets
    for _ in bar:
        params, state = train_step(params, state, batch)
        row = history.record(state)          # numbers, for a logger as well
        bar.set_postfix_str(hfjax.diagnostics.line(row))
    print(hfjax.diagnostics.table(history))
    hfjax.diagnostics.plot(history).savefig("run.png")

| picture | shows |
|---|---|
| `plot` | f, λ, ρ, CG iterations and α, by update |
| `plot_progress` | f, and an error of yours, against time and CG iterations |
| `plot_cg_run` | f and M along one run of conjugate gradients, by `cg_run` |
| `plot_spectrum` | Ritz values of a run, or any eigenvalues |

In a notebook they are shown once `matplotlib.pyplot.show()` has been called there.

How to read them: ρ near 1 and λ falling is a model that predicts well; λ that
climbs for long, or ρ below ¼ again and again, is a gradient of something else
than the objective, or curvature from too few cases; conjugate gradients that end
by their limit in every update would use more iterations or a better
preconditioner.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import optax

from hfjax.inspection._cg_run import CGRun as CGRun
from hfjax.inspection._cg_run import cg_run as cg_run
from hfjax.inspection._figures import Scalars as Scalars
from hfjax.inspection._figures import plot as plot
from hfjax.inspection._figures import plot_cg_run as plot_cg_run
from hfjax.inspection._figures import plot_progress as plot_progress
from hfjax.inspection._figures import plot_spectrum as plot_spectrum
from hfjax.solvers.cg import Reason
from hfjax.update.state import HessianFreeInfo, Rejection


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


def line(row: Scalars | optax.OptState) -> str:
    """Say in one line what the last update did, for a bar or a log.

    Args:
      row: what `scalars` returned, or an optimizer state.

    Returns:
      f after it, λ, ρ, CG iterations (chosen / run), α, and why it was rejected.

    Raises:
      KeyError: as `scalars`, of a state.

    Example:
      With `rich`, `bar.update(task, advance=1, description=line(state))`; with tqdm,
      `bar.set_postfix_str(line(state))`.

      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> line(hfjax.hessian_free(objective).init(jnp.zeros(1)))
      'f 0  λ 1  ρ 0.00  CG 0/0  α 0'
    """
    is_row = isinstance(row, Mapping) and "value_after" in row
    row = cast("Scalars", row) if is_row else scalars(cast("Any", row))
    rejected = row["rejection"] != "none"
    return (
        f"f {row['value_after']:.5g}  λ {row['damping']:.2g}  "
        f"ρ {max(float(row['reduction_ratio']), -99):.2f}  "
        f"CG {row['chosen_iteration']}/{row['cg_iterations']}  "
        f"α {row['step_size']:.2g}" + rejected * f"  rejected: {row['rejection']}"
    )


class History(list[dict[str, Any]]):
    """A list of what each update did, and when.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> history = History()
      >>> _ = history.record(
      ...     hfjax.hessian_free(objective).init(jnp.zeros(1)), error=0.5
      ... )
      >>> history[0]["count"], history[0]["error"], history[0]["seconds"] < 60
      (0, 0.5, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self._start = time.perf_counter()

    def record(self, state: optax.OptState, **measured: float) -> dict[str, Any]:
        """Append what the last update did, once it is computed.

        Args:
          state: as for `scalars`.
          **measured: your own numbers of this update, as `error`, which
            `plot_progress` draws.

        Returns:
          The row: `scalars(state)`, `seconds` since the history was made (compiling
          counts), and what was measured.

        Raises:
          KeyError: as `scalars`.
        """
        row = scalars(state)
        seconds = time.perf_counter() - self._start
        self.append({**row, "seconds": seconds, **measured})
        return self[-1]


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


def _is_state(part: object) -> bool:
    return isinstance(getattr(part, "info", None), HessianFreeInfo)


def _word(kind: type[Reason] | type[Rejection], code: int) -> str:
    return kind(code).name.lower().replace("_", " ")
