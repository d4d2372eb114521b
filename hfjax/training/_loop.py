"""The loop of `hfjax.fit` around one compiled update: what has been done, and when it ends."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hfjax._core import trees
from hfjax._core.types import Batch, Params
from hfjax._tracing import compiled
from hfjax.inspection import diagnostics
from hfjax.objectives.plain import Objective
from hfjax.training._checkpoint import Checkpoints, Saved, other
from hfjax.training._run import Fit, History, Reason, Watch

_WINDOW = 10
"""f is compared with its lowest value so many updates ago."""


@dataclasses.dataclass
class Loop:
    """A run: its problem, and its progress so far."""

    objective: Objective
    tx: optax.GradientTransformation
    params: Params
    state: Any
    validation: Batch | None
    tolerance: float | None
    patience: int | None
    rows: list[History] = dataclasses.field(default_factory=list)
    lows: list[float] = dataclasses.field(default_factory=list)  # f so far
    lowest: float = math.inf  # of the validation batch
    lowest_at: int = 1
    best: tuple[Params, Any] | None = None
    last: Batch = ()

    def __post_init__(self) -> None:
        if self.patience is not None:
            self.best = self.params, self.state

    def go(
        self,
        draws: Iterator[Batch],
        updates: int,
        watch: Watch,
        kept: Checkpoints | None,
    ) -> Reason:
        """Update until the run ends, and return why."""
        step = _kept(self.objective, self.tx)
        is_reporting = bool(_report(self.state))
        reason, is_told = self._reason(), False
        while reason == Reason.RUNNING and len(self.rows) < updates and not is_told:
            batch = next(draws, None)
            if batch is None:
                break
            self._update(step, batch)
            reason, count = self._reason(), len(self.rows)
            report = _report(self.state) if is_reporting else {}
            is_told = watch.tell(count, self.rows[-1], self.params, report)
            if kept is not None and kept.is_due and reason != Reason.NONFINITE:
                kept.save(count, self._saved(watch.seconds))
        if not self.rows:
            msg = "`batch` has no batches."
            raise ValueError(msg)
        if kept is not None and reason != Reason.NONFINITE:
            kept.save(len(self.rows), self._saved(watch.seconds))
        if reason == Reason.RUNNING:
            reason = Reason.CALLBACK if is_told else Reason.UPDATES
        return reason

    def _update(self, step: Callable[..., Any], batch: Batch) -> None:
        count = jnp.asarray(len(self.rows))
        self.params, self.state, row = step(
            self.params, self.state, batch, self.validation, count
        )
        self._append(jax.device_get(row))
        self.last = batch
        if self.patience is not None and self.lowest_at == len(self.rows):
            self.best = self.params, self.state

    def _append(self, row: History) -> None:
        """Keep a row, and the lowest values so far: nothing looks at all rows again."""
        self.rows.append(row)
        self.lows.append(min([*self.lows[-1:], float(row.value)]))
        if row.validation < self.lowest:
            self.lowest, self.lowest_at = float(row.validation), len(self.rows)

    def _reason(self) -> Reason:
        """Return why the run ends after these updates, or `RUNNING`."""
        if not self.rows:
            return Reason.RUNNING
        value = self.rows[-1].value
        if not np.isfinite(value):
            if len(self.rows) == 1:
                msg = (
                    f"f is not finite at the start: {value}. Start from other `params`."
                )
                raise ValueError(msg)
            return Reason.NONFINITE
        if self.tolerance is not None and len(self.rows) > _WINDOW:
            before, now = self.lows[-_WINDOW - 1], self.lows[-1]
            if before - now <= self.tolerance * abs(now):
                return Reason.VALUE
        if self.patience is None:
            return Reason.RUNNING
        late = len(self.rows) - self.lowest_at >= self.patience
        return Reason.VALIDATION if late else Reason.RUNNING

    def result(self, reason: Reason) -> Fit:
        """Return what the run has found."""
        params, state = self.best or (self.params, self.state)
        value = _at(self.objective, state, len(self.rows)).value(params, self.last)
        return Fit(
            params, state, value, History(*map(jnp.asarray, self._columns())), reason
        )

    def _columns(self) -> list[np.ndarray]:
        return [np.array(column) for column in zip(*self.rows, strict=True)]

    def _saved(self, seconds: float) -> Saved:
        columns = dict(zip(History._fields, self._columns(), strict=True))
        return Saved((self.params, self.state, self.best), columns, seconds)

    def go_on(self, kept: Checkpoints, draws: Iterator[Batch]) -> float:
        """Go on from a checkpoint if there is one; return the seconds it had taken."""
        saved = kept.restore((self.params, self.state, self.best))
        if saved is None:
            return 0.0
        rows = [History(*row) for row in zip(*saved.columns.values(), strict=True)]
        for _ in rows:
            batch = next(draws, None)
            if batch is None:
                words = "`batch` has fewer batches than it has used"
                raise other(kept.folder, words)
            self.last = batch
        if isinstance(draws, itertools.repeat):  # A data loader may shuffle anew.
            # One number knows the model, the loss, the data and the parameters.
            here = _at(self.objective, self.state, 0).value(self.params, self.last)
            there = rows[0].value
            gap = float(jnp.finfo(here.dtype).eps) ** 0.5 * abs(float(here))
            if not abs(float(here) - float(there)) <= gap:
                words = f"f at the start was {there:.6g}, and is {here:.6g}"
                raise other(kept.folder, words)
        self.params, self.state, self.best = saved.tree
        for row in rows:
            self._append(row)
        return saved.seconds


def _report(state: optax.OptState) -> dict[str, Any]:
    """Return what a Hessian-free optimizer says of an update."""
    try:
        return diagnostics.scalars(state)
    except KeyError:
        return {}


@functools.lru_cache(maxsize=64)
def _kept(objective: Objective, tx: optax.GradientTransformation) -> Callable:
    """Return the step, the same function for the same objective and optimizer."""
    return compiled.once(functools.partial(_step, objective, tx))


def _step(
    objective: Objective,
    tx: optax.GradientTransformation,
    params: Params,
    state: optax.OptState,
    batch: Batch,
    validation: Batch | None,
    count: jax.Array,
) -> tuple[Params, optax.OptState, History]:
    """Do one update."""
    now = _at(objective, state, count)
    value, grads = now.value_and_grad(params, batch)
    changes, state = optax.with_extra_args_support(tx).update(
        grads, state, params, batch=batch, value=value, grad=grads, value_fn=now.value
    )
    damping = _fields(state, "damping")
    damping = damping[0] if damping else jnp.full((), jnp.nan)
    params = optax.apply_updates(params, changes)
    checked = jnp.full_like(value, jnp.nan)
    if validation is not None:
        checked = _at(objective, state, count + 1).value(params, validation)
    step = trees.norm(changes)
    return params, state, History(value, trees.norm(grads), damping, step, checked)


def _at(objective: Objective, state: optax.OptState, count: Any) -> Objective:
    """Return f with its schedules and scales at what the optimizer keeps, if it does."""
    known, scales = _fields(state, "count"), _fields(state, "scales")
    return objective.at(known[0] if known else count, scales[0] if scales else None)


def _fields(state: optax.OptState, name: str) -> list[Any]:
    """Return the fields of a name in a state, and no parameters that are called so."""
    found = optax.tree.get_all_with_path(state, name)
    return [
        x for path, x in found if isinstance(path[-1], optax.tree_utils.NamedTupleKey)
    ]
