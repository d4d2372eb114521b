"""Follow a training run: numbers for any logger, a progress line, tables and figures.

    history = hfjax.diagnostics.History()
    bar = tqdm.tqdm(range(50))
    for _ in bar:
        params, state = train_step(params, state, batch)
        row = history.record(state)          # numbers, also for a logger
        bar.set_postfix_str(hfjax.diagnostics.line(row))
    print(hfjax.diagnostics.table(history))
    hfjax.diagnostics.plot(history).savefig("run.png")

| figure | shows |
|---|---|
| `plot` | f, λ, ρ, CG iterations and α against the update |
| `plot_progress` | f, and an error that you recorded, against time and CG iterations |
| `live_plot` | f, λ and the step while `hfjax.fit` runs, in a notebook or a file |
| `plot_cg_run` | f and M along one run of conjugate gradients, from `cg_run` |
| `plot_spectrum` | Ritz values of a run, or any eigenvalues |

Figures need matplotlib (`pip install hfjax[plot]`). A notebook displays them once
`matplotlib.pyplot.show()` has been called in it.

How to read them: if ρ is near 1 and λ falls, the quadratic model predicts f well. If λ
climbs for long, or ρ is often below ¼, `grads` is probably not the gradient of the
objective (see `hfjax.verify.check`), or the curvature batch is too small. If conjugate
gradients reach `max_iterations` in every update, allow more or use a better
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
from hfjax.inspection.live import live_plot as live_plot
from hfjax.inspection.live import numbers as numbers
from hfjax.solvers.cg import Reason
from hfjax.update.state import HessianFreeInfo, Rejection


def scalars(state: optax.OptState) -> dict[str, float | int | bool | str]:
    """Read from an optimizer state what the last update did.

    This waits for the update to finish and copies a few numbers from the device.

    Args:
      state: a `HessianFreeState`, alone or inside the state of a chain or wrapper.

    Returns:
      Python numbers by name: `count` (updates so far), `damping` (λ for the next update),
      and the fields of `HessianFreeInfo`, with `cg_reason` and `rejection` as words.

    Raises:
      KeyError: if `state` does not contain exactly one `HessianFreeState`.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> state = hfjax.hessian_free(objective).init(jnp.zeros(1))
      >>> scalars(state)["cg_reason"]
      'running'
    """
    found = [*filter(_is_state, jax.tree.leaves(state, is_leaf=_is_state))]
    if len(found) != 1:
        msg = f"Expected one HessianFreeState in `state`, found {len(found)}."
        raise KeyError(msg)
    last = found[0]
    count, damping, info = jax.device_get((last.count, last.damping, last.info))
    values = {name: value.item() for name, value in info._asdict().items()}
    values["cg_reason"] = _word(Reason, values["cg_reason"])
    values["rejection"] = _word(Rejection, values["rejection"])
    return {"count": count.item(), "damping": damping.item(), **values}


def line(row: Scalars | optax.OptState) -> str:
    """Summarise the last update in one line, for a progress bar or a log.

    With rich, write `bar.update(task, advance=1, description=line(state))`.

    Args:
      row: what `scalars` returned, or an optimizer state.

    Returns:
      f, λ, ρ, CG iterations (chosen / total), α, and why the update was rejected.

    Raises:
      KeyError: as `scalars`, for a state.

    Example:
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
    """A list of rows, one per update: what it did, and when.

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
        """Wait for the last update and append a row for it.

        Args:
          state: as for `scalars`.
          **measured: your own numbers for this update; `plot_progress` draws `error`.

        Returns:
          The row: `scalars(state)`, `seconds` since the history was created (including
          compilation), and `measured`.

        Raises:
          KeyError: as `scalars`.
        """
        row = scalars(state)
        seconds = time.perf_counter() - self._start
        self.append({**row, "seconds": seconds, **measured})
        return self[-1]


def table(history: Sequence[Scalars]) -> str:
    """Format a run as a text table with one line per update.

    Args:
      history: what `scalars` returned after each update.

    Returns:
      The table: update, f after it, λ, ρ, CG iterations (chosen / total), α, and remarks
      on a rejected update or an unusual end of CG.

    Example:
      >>> row = dict(count=1, value_after=2.5, damping=30.0, reduction_ratio=0.82)
      >>> row |= dict(chosen_iteration=11, cg_iterations=13, step_size=1.0)
      >>> row |= dict(cg_reason="stopping rule", rejection="none")
      >>> print(table([row]))
      update            f         λ        ρ       CG     α  remarks
           1          2.5        30    0.820    11/13  1.00
    """
    lines = ["update            f         λ        ρ       CG     α  remarks"]
    for row in history:
        iterations = f"{row['chosen_iteration']}/{row['cg_iterations']}"
        # CG also ends for reasons worth a remark, such as negative curvature.
        usual = {"stopping rule", "max iterations", "residual zero"}
        remarks = [f"rejected: {row['rejection']}"] * (row["rejection"] != "none")
        remarks += [str(row["cg_reason"])] * (row["cg_reason"] not in usual)
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
