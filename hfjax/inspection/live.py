"""What callbacks of `hfjax.fit` need: numbers for a logger, and a figure while it runs."""

import io
import sys
import time
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hfjax._core import options
from hfjax.inspection._figures import plot_live

_SHARE = 0.1
"""The largest share of the time that drawing may take."""


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row: what TensorBoard, W&B and MLflow take.

    Args:
      row: what the callback of `hfjax.fit` is called with, or `scalars(state)`.

    Returns:
      Floats by name. Parameters, words and NaN, as of an unused field, are left out.

    Example:
      >>> numbers(
      ...     {"value": 0.5, "accepted": True, "damping": float("nan"), "params": {}}
      ... )
      {'value': 0.5, 'accepted': 1.0}
    """
    found = {name: x for name, x in row.items() if isinstance(x, int | float)}
    return {name: float(x) for name, x in found.items() if x == x}  # Without NaN.


def live_plot(
    path: str | PathLike[str] | None = None, *, seconds: float = 1.0
) -> Callable[[Mapping[str, Any]], None]:
    """Return a callback that draws f, λ and the step while a run goes on.

    In a notebook, it replaces one figure below the cell. It needs matplotlib.

    Args:
      path: also save the figure here, as a PNG file; it works outside of notebooks too.
      seconds: the least time between two drawings. It is longer if drawing takes more
        than a tenth of the time.

    Returns:
      A `callback` for `hfjax.fit` and `hfjax.least_squares`. They call its `close` at the
      end, which draws the last update.

    Raises:
      TypeError: if `seconds` is not a number.
      ValueError: if `seconds` is negative.

    Example:
      `hfjax.fit(…, callback=live_plot("run.png"))` calls it with a row for each update:

      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "run.png")
      >>> callback = live_plot(path)
      >>> callback({"update": 1, "value": 0.5, "damping": 1.0, "step": 0.1})
      >>> path.exists()
      True
    """
    options.check_range("seconds", seconds, low=0.0)
    return _LivePlot(None if path is None else Path(path), seconds)


class _LivePlot:
    """A figure that is drawn anew from time to time."""

    def __init__(self, path: Path | None, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.rows: list[dict[str, float]] = []
        self.handle: Any = None
        self.due, self.drawn = 0.0, 0

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Keep the numbers of an update, and draw if it is time."""
        if self.rows and row["update"] <= self.rows[-1]["update"]:  # Another run.
            self.rows, self.handle, self.drawn, self.due = [], None, 0, 0.0
        self.rows.append(numbers(row))
        if time.perf_counter() >= self.due:
            self._draw()

    def close(self) -> None:
        """Draw what has come since the last drawing."""
        if self.drawn < len(self.rows):
            self._draw()

    def _draw(self) -> None:
        display = _display()
        self.drawn = len(self.rows)
        if display is None and self.path is None:
            return
        begun, file = time.perf_counter(), io.BytesIO()
        plot_live(self.rows).savefig(file, dpi=80)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(file.getvalue())
        if display is not None and self.handle is None:
            self.handle = display(_image(file), display_id=True)
        elif display is not None:
            self.handle.update(_image(file))
        now = time.perf_counter()
        self.due = now + max(self.seconds, (now - begun) / _SHARE)


def in_notebook() -> bool:
    """Return whether this is a kernel of IPython, which has then been imported."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _display() -> Callable[..., Any] | None:
    """Return what shows something below a cell; `None` outside of a notebook."""
    if not in_notebook():
        return None
    from IPython.display import display

    return display


def _image(file: io.BytesIO) -> Any:
    from IPython.display import Image

    return Image(data=file.getvalue(), format="png")
