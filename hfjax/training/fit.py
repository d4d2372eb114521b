"""Train: run an optimizer on an objective, with a history, progress and a reason to end.

    fit = hfjax.fit(objective, params, batch, updates=100)     # by hfjax.hessian_free
    fit.params, fit.value, fit.reason.words
    more = hfjax.fit(objective, fit.params, batch, state=fit.state)

It is the usual training loop around one compiled update, no more. Write that loop yourself
(README) if a run needs anything else, and use `hfjax.least_squares` to fit a curve.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, describe
from hfjax._core.types import Batch, Params
from hfjax._tracing import compiled
from hfjax.objectives.plain import Objective, check_objective
from hfjax.training._run import Fit as Fit
from hfjax.training._run import History as History
from hfjax.training._run import Reason as Reason
from hfjax.training._run import Watch
from hfjax.update.transform import hessian_free

_WINDOW = 10
"""f is compared with its lowest value so many updates ago."""


def fit(
    objective: Objective,
    params: Params,
    batch: Batch | Iterable[Batch],
    *,
    optimizer: optax.GradientTransformation | None = None,
    updates: int = 100,
    tolerance: float | None = None,
    progress: bool | Callable[[str], Any] = True,
    callback: Callable[[dict], Any] | None = None,
    state: optax.OptState | None = None,
) -> Fit:
    """Minimise an objective by any optimizer, from `params`.

    An update is compiled once for each objective and optimizer: to call this often, pass
    the same ones. It reads what the model closes over at that time.

    Args:
      objective: f, an `hfjax.Objective` or a sum of them.
      params: where to start, a tree of arrays of floats.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`, for all updates; or an
        iterable of batches, such as a generator, for one update each. One that can be
        iterated again, such as a data loader, is. A tuple or list is always one batch:
        pass `iter(batches)` for a list of them.
      optimizer: from Optax or hfjax; `None` is `hfjax.hessian_free(objective)`. Its
        `update` is given `batch`, `value`, `grad` and `value_fn`, as far as it takes them.
      updates: the most updates.
      tolerance: end when f has fallen by at most `tolerance` · |f| over the last 10
        updates; 0 is not at all. `None` never ends a run. It needs a single batch, since
        f is of other data in each of several.
      progress: log a line once a second, and one at the end of a run that took so long,
        with the level `INFO` of the logger `hfjax`. Python shows these lines after
        `logging.basicConfig(level=logging.INFO)`. A function is called with the lines
        instead, such as `print`. `False` writes nothing.
      callback: called after each update with a dictionary: `update`, `seconds`, the
        fields of `History`, and `params`. If it returns `True`, the run ends.
      state: `state` of an earlier fit, to go on from its `params` with the same optimizer.

    Returns:
      A `Fit`. Its `value` is f at the end on the last batch.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if f is not finite at the start, if there is no batch, if an option is
        out of range, or if there is a `tolerance` with several batches.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> x = jnp.array([[1.0, 2.0], [3.0, 5.0]])
      >>> batch = (x, x @ jnp.array([1.0, -1.0]))
      >>> run = fit(objective, jnp.zeros(2), batch, updates=20)
      >>> print(run.params.round(4), run.reason.words, len(run.history.value))
      [ 1. -1.] All updates were made. 20
    """
    check_objective(objective)
    options.check_count("updates", updates, low=1)
    options.check_range("tolerance", tolerance, low=0.0)
    watch, batches = Watch(progress, callback), _batches(batch)
    if tolerance is not None and batches is not None:
        msg = "`tolerance` compares values of f on one batch, and `batch` has several."
        raise ValueError(msg)
    tx = _default(objective) if optimizer is None else optimizer
    if not isinstance(tx, optax.GradientTransformation):
        msg = (
            f"`optimizer` must be a gradient transformation, got {describe(optimizer)}."
        )
        raise TypeError(msg)
    # Of no weak type, as those that an update returns: it is compiled once.
    params = jax.tree.map(lambda x: x.astype(x.dtype), as_params(params))
    now: Any = tx.init(params) if state is None else state
    step, rows, reason = _kept(objective, tx), [], Reason.UPDATES
    last: Batch = ()
    for count in range(updates):
        own = batch if batches is None else next(batches, None)
        if own is None:
            break
        last = cast("Batch", own)
        params, now, row = step(params, now, last, jnp.asarray(count))
        rows.append(jax.device_get(row))
        reason = _ended(rows, tolerance)
        if watch.tell(count + 1, rows[-1], params) and reason == Reason.RUNNING:
            reason = Reason.CALLBACK
        if reason != Reason.RUNNING:
            break
    reason = Reason.UPDATES if reason == Reason.RUNNING else reason
    if not rows:
        msg = "`batch` has no batches."
        raise ValueError(msg)
    watch.end(len(rows), rows[-1], reason.words)
    columns = [jnp.asarray(np.array(column)) for column in zip(*rows, strict=True)]
    value = _at(objective, now, len(rows)).value(params, last)
    return Fit(params, now, value, History(*columns), reason)


def _batches(batch: Any) -> Iterator[Batch] | None:
    """Return an iterator of batches, or `None` if there is only one batch."""
    # A batch is a tuple or a list, and so is that of a weighted sum.
    if isinstance(batch, tuple | list):
        return None
    if not isinstance(batch, Iterable) or hasattr(batch, "shape"):
        msg = (
            "`batch` must be (inputs, targets), (inputs, targets, weights), or an "
            f"iterable of such batches, got {describe(batch)}."
        )
        raise TypeError(msg)
    return _again(batch)


def _again(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Iterate for as long as there are batches."""
    some = True
    while some:
        some = False
        for batch in batches:
            some = True
            yield batch


def _ended(rows: list[History], tolerance: float | None) -> Reason:
    """Return why a run ends after these updates, or `RUNNING`."""
    values = [row.value for row in rows]
    if not np.isfinite(values[-1]):
        if len(values) == 1:
            msg = (
                f"f is not finite at the start: {values[0]}. Start from other `params`."
            )
            raise ValueError(msg)
        return Reason.NONFINITE
    if tolerance is None or len(values) <= _WINDOW:
        return Reason.RUNNING
    before, now = min(values[:-_WINDOW]), min(values)
    return Reason.VALUE if before - now <= tolerance * abs(now) else Reason.RUNNING


@functools.lru_cache(maxsize=64)
def _default(objective: Objective) -> optax.GradientTransformationExtraArgs:
    return hessian_free(objective)


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
    row = History(value, trees.norm(grads), damping, trees.norm(changes))
    return optax.apply_updates(params, changes), state, row


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
