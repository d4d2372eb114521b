"""Train: run an optimizer on an objective, with a history, progress and a reason to end.

    fit = hfjax.fit(objective, params, batch, updates=100)     # by hfjax.hessian_free
    fit.params, fit.value, fit.reason.words
    more = hfjax.fit(objective, fit.params, batch, state=fit.state)

It is the usual training loop around one compiled update, with progress, validation,
checkpoints and callbacks. Write that loop yourself (README) if a run needs anything else,
and use `hfjax.least_squares` to fit a curve.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, cast

import jax
import optax

from hfjax._core import options
from hfjax._core.arguments import as_params, describe
from hfjax._core.types import Batch, Params
from hfjax.objectives.plain import Objective, check_objective
from hfjax.training._checkpoint import Checkpoints
from hfjax.training._loop import Loop
from hfjax.training._run import Fit as Fit
from hfjax.training._run import History as History
from hfjax.training._run import Reason as Reason
from hfjax.training._run import Watch
from hfjax.update.transform import hessian_free


def fit(
    objective: Objective,
    params: Params,
    batch: Batch | Iterable[Batch],
    *,
    optimizer: optax.GradientTransformation | None = None,
    updates: int = 100,
    tolerance: float | None = None,
    validation: Batch | None = None,
    patience: int | None = None,
    progress: bool | str | Callable[[str], Any] = True,
    callback: Callable[[dict[str, Any]], Any] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    state: optax.OptState | None = None,
) -> Fit:
    """Minimise an objective by any optimizer, from `params`.

    An update is compiled once for each objective and optimizer: to call this often, pass
    the same ones. It reads what the model closes over at that time.

    Args:
      objective: f, an `hfjax.Objective` or a sum of them.
      params: where to start, a tree of arrays of floats.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`, for all updates; or an
        iterable of batches, such as a generator, for one update each. If it can be
        iterated again, as a data loader can, it is, as often as needed. A tuple or list is always one batch:
        pass `iter(batches)` for a list of them.
      optimizer: from Optax or hfjax; `None` is `hfjax.hessian_free(objective)`. Its
        `update` is given `batch`, `value`, `grad` and `value_fn`, as far as it takes them.
      updates: the maximum number of updates, including those before a checkpoint.
      tolerance: end when f has fallen by at most `tolerance` · |f| over the last 10
        updates; 0 means that it has not fallen at all. `None` never ends a run. It needs a single batch, since
        f is of other data in each of several.
      validation: a batch on which f is computed after each update, for the history.
      patience: end when f of `validation` has had no new minimum for so many updates, and
        return the parameters and state of the minimum. `None` returns the last ones.
      progress: `True` draws a bar: of rich in a terminal, of tqdm in a notebook, if they
        are installed. If the logger `hfjax` is enabled for `INFO`, as after
        `logging.basicConfig(level=logging.INFO)`, it logs lines instead: one each second,
        and one at the end of a run that took so long. In a pipe it is silent.
        "rich", "tqdm" and "lines" choose. A function, such as `print`, is called with the
        lines. `False` shows nothing.
      callback: called after each update with a dictionary: `update`, `seconds`, the
        fields of `History`, `params`, and with a Hessian-free optimizer
        `hfjax.diagnostics.scalars(state)`. If it returns `True`, the run ends. Its method
        `close`, if it has one, is called when the run ends, even after an error. Loggers take
        `hfjax.diagnostics.numbers(row)`; listeners of `jax.monitoring` get the same.
      checkpoint: a folder. Parameters, state and history are saved there by Orbax, at most
        every 30 seconds and at the end. The same call goes on from them, and does the
        same updates as a run that was not interrupted. It passes over the batches of an
        iterable that were used before.
      state: `state` of an earlier fit, to go on from its `params` with the same optimizer.

    Returns:
      A `Fit`. Its `value` is f at the end on the last batch.

    Raises:
      ImportError: if `checkpoint` or a bar needs a package that is not installed.
      TypeError: if an argument has the wrong type.
      ValueError: if f is not finite at the start, if there is no batch, if an option is
        out of range, if there is a `tolerance` with several batches or `patience` without
        `validation`, or if `checkpoint` holds another problem.

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
    if patience is not None:
        options.check_count("patience", patience, low=1)
        if validation is None:
            msg = "`patience` needs a `validation` batch."
            raise ValueError(msg)
    tx = _default(objective) if optimizer is None else optimizer
    if not isinstance(tx, optax.GradientTransformation):
        msg = (
            f"`optimizer` must be a gradient transformation, got {describe(optimizer)}."
        )
        raise TypeError(msg)
    # Without weak types, as an update returns them, or it would be compiled twice.
    params = jax.tree.map(lambda x: x.astype(x.dtype), as_params(params))
    now: Any = tx.init(params) if state is None else state
    run = Loop(objective, tx, params, now, validation, tolerance, patience)
    draws = itertools.repeat(cast("Batch", batch)) if batches is None else batches
    with contextlib.ExitStack() as stack:
        kept = None
        if checkpoint is not None:
            kept = stack.enter_context(Checkpoints(checkpoint))
        seconds = 0.0 if kept is None else run.go_on(kept, draws)
        stack.enter_context(watch.over(updates, len(run.rows), seconds))
        reason = run.go(draws, updates, watch, kept)
        watch.end(reason.words)
    return run.result(reason)


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


@functools.lru_cache(maxsize=64)
def _default(objective: Objective) -> optax.GradientTransformationExtraArgs:
    return hessian_free(objective)
