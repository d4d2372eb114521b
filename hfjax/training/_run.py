"""What all runs share: their results, their history, reasons of ending, and progress."""

import contextlib
import dataclasses
import enum
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hfjax._core.arguments import check_function
from hfjax._core.types import Params, Tree
from hfjax.inspection.live import numbers
from hfjax.training._progress import Progress, display


class _Sentences(enum.IntEnum):
    """Numbers, so that they exist inside of `jit`, each with a sentence."""

    words: str

    def __new__(cls, code: int, words: str) -> Self:
        """Make a number that carries its sentence."""
        self = int.__new__(cls, code)
        self._value_, self.words = code, words
        return self


class Reason(_Sentences):
    """Why a run has ended; `reason.words` is a sentence.

    Under `jax.jit` or `jax.vmap` a fit holds the number, and `Reason(int(number))` is the
    reason.
    """

    RUNNING = 0, "The run has not ended."
    """The run has not ended."""
    GRADIENT = 1, "The gradient is zero to the tolerance `gtol`."
    """The residuals are orthogonal to their derivatives, to the tolerance `gtol`."""
    STEP = 2, "The last step was shorter than the tolerance `xtol`."
    """The last step changed the parameters by no more than `xtol`, relative to them."""
    VALUE = 3, "f has stopped falling, to the tolerance."
    """f fell by no more than the tolerance, relative to f, and was not expected to fall further."""
    ZERO = 4, "The residuals are zero to the rounding of the parameters."
    """Rounding the parameters would change the residuals by as much as is left of them."""
    ROUNDING = 5, "Any further progress is hidden by rounding."
    """The model predicts that f could only fall by less than the rounding of f."""
    STUCK = (
        6,
        "No step lowers f: the derivatives may be wrong, or f may have a kink here.",
    )
    """Many updates in a row have been rejected, although λ grew."""
    UPDATES = 7, "All updates were made."
    """The largest number of updates was reached, or an iterator of batches was empty."""
    NONFINITE = 8, "The residuals, f or a derivative are not finite."
    """The residuals, f or a derivative are NaN or infinite at these parameters."""
    CALLBACK = 9, "The callback ended the run."
    """The callback returned True."""
    VALIDATION = 10, "f of the validation batch has stopped falling."
    """f of the validation batch reached its lowest value `patience` updates ago."""


class History(NamedTuple):
    """What each update did, as arrays of shape `[updates]`.

    Under `jax.jit` they are as long as the largest number of updates, and end in NaN.

    Attributes:
      value: f before the update.
      gradient: how far the gradient was from zero before the update: for `hfjax.fit` its
        norm; for `hfjax.least_squares` the largest cosine of the angle between the
        residuals and their derivative by a parameter, which no unit of a parameter or of
        the residuals changes.
      damping: λ for the next update, or the radius of a trust region; NaN if the
        optimizer has none.
      step: norm of the change of the parameters, 0 if the step was rejected.
      validation: f of the validation batch after the update; NaN if there is none.
    """

    value: jax.Array
    gradient: jax.Array
    damping: jax.Array
    step: jax.Array
    validation: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Fit:
    """The result of a run.

    Attributes:
      params: the parameters at the end, a tree like those at the start.
      state: the state of the optimizer; hand it back as `state=` to go on.
      value: f at `params`.
      history: what each update did.
      reason: why the run has ended.
    """

    params: Params
    state: Any
    value: jax.Array
    history: History
    reason: Any

    def __repr__(self) -> str:
        names = ("params", "value", "reason")  # The others may be long.
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{type(self).__name__}({shown})"


class Watch:
    """Shows a run while it goes on, and tells the callback of each update."""

    def __init__(
        self, progress: Progress, callback: Callable[[dict[str, Any]], Any] | None
    ) -> None:
        if callback is not None:
            check_function("callback", callback, "row -> None")
        self.display, self.call, self.words = display(progress), callback, ""
        self.start, self.before = time.perf_counter(), 0.0

    @property
    def is_needed(self) -> bool:
        """Whether anybody wants to know of single updates."""
        return self.display is not None or self.call is not None

    @contextlib.contextmanager
    def over(
        self, total: int | None, done: int = 0, seconds: float = 0.0
    ) -> Iterator[None]:
        """Show a run of at most `total` updates, of which so many are done already."""
        self.before = seconds
        if self.display is not None:
            self.display.start(total, done)
        try:
            yield
        finally:  # After an error, too: a bar hides the cursor of a terminal.
            if self.display is not None:
                self.display.end(self.words)
            close = getattr(self.call, "close", None)
            if close is not None:
                close()

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, with those before it went on."""
        return self.before + time.perf_counter() - self.start

    def tell(
        self, update: int, row: History, params: Params, report: Mapping[str, Any]
    ) -> bool:
        """Tell of an update, and return whether the callback ends the run."""
        seconds = self.seconds
        columns = {name: float(x) for name, x in row._asdict().items()}
        if self.display is not None:
            self.display.tell(update, seconds - self.before, columns)
        told = {**report, **columns}
        for name, x in numbers(told).items():
            jax.monitoring.record_scalar(f"/hfjax/{name}", x, update=update)
        if self.call is None:
            return False
        told = {"update": update, "seconds": seconds, **told, "params": params}
        found = self.call(told)
        return isinstance(found, bool | np.bool_) and bool(found)

    def end(self, words: str) -> None:
        """Show why the run has ended."""
        self.words = words


def is_traced(*trees: Tree) -> bool:
    """Return whether any array is traced, by `jax.jit` or another transformation."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(trees))


def empty_history(updates: int, dtype: jax.typing.DTypeLike) -> History:
    """Return the history before the first update: NaN, each an array of its own."""
    return History(*(jnp.full(updates, jnp.nan, dtype) for _ in History._fields))
