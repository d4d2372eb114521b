"""How a run shows its progress: by a bar of rich or tqdm, or by lines in a log.

The packages draw the bars. Both are optional, and are imported when a run begins.
"""

import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from hfjax._core import options
from hfjax._core.arguments import check_function
from hfjax.inspection.live import in_notebook

LOGGER = logging.getLogger("hfjax")
"""Where lines of progress go."""

Progress: TypeAlias = bool | str | Callable[[str], Any]
"""What users choose from; see `hfjax.fit`."""

_EVERY = 1.0
"""Seconds from one line of progress to the next."""


class Display(Protocol):
    """Shows a run while it goes on."""

    def start(self, total: int | None, done: int) -> None:
        """Begin with so many updates done, out of `total` if that is known."""
        ...

    def tell(self, update: int, seconds: float, row: Mapping[str, float]) -> None:
        """Show an update."""
        ...

    def end(self, words: str) -> None:
        """End with a sentence, which is empty after an error."""
        ...


def display(progress: Progress) -> Display | None:
    """Return what shows a run, or `None` for silence.

    Raises:
      ImportError: if a bar is asked for whose package is not installed.
      TypeError: if `progress` is neither a boolean, a string nor a function.
      ValueError: if it is another string.
    """
    if isinstance(progress, bool):
        kind = _automatic() if progress else ""
    elif isinstance(progress, str):
        options.check_choice("progress", progress, ("rich", "tqdm", "lines"))
        if progress != "lines" and not _is_installed(progress):
            msg = (
                f'`progress="{progress}"` needs {progress}: pip install hfjax[progress]'
            )
            raise ImportError(msg)
        kind = progress
    else:
        check_function("progress", progress, "line -> None")
        return Lines(progress)
    if kind == "lines":
        return Lines(LOGGER.info) if LOGGER.isEnabledFor(logging.INFO) else None
    return {"rich": Rich, "tqdm": Tqdm}[kind]() if kind else None


def _automatic() -> str:
    """Choose by where the output goes: a log that is heard, a notebook, a terminal."""
    if LOGGER.isEnabledFor(logging.INFO):
        return "lines"
    if in_notebook():
        return "tqdm" if _is_installed("tqdm") else ""
    if not getattr(sys.stdout, "isatty", bool)():  # Some have none.
        return ""
    return next(filter(_is_installed, ("rich", "tqdm")), "")


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _words(row: Mapping[str, float], *names: str) -> str:
    """Format f and the other numbers of the run, without those that are NaN."""
    parts = [f"f {row['value']:.6g}"]
    for name in names:
        label = "λ" if name == "damping" else name
        parts += [f"{label} {row[name]:.3g}"] * (row[name] == row[name])
    return "  ".join(parts)


class Lines:
    """Calls a function with a line once a second, and at the end if there was a line."""

    def __init__(self, show: Callable[[str], Any]) -> None:
        self.show, self.last, self.line = show, 0.0, ""

    def start(self, total: int | None, done: int) -> None:
        """Say nothing: a short run is silent."""
        del total, done

    def tell(self, update: int, seconds: float, row: Mapping[str, float]) -> None:
        """Make a line, and show it if it is time."""
        words = _words(row, "validation", "gradient", "damping", "step")
        self.line = f"update {update}  {seconds:.1f} s  {words}"
        if seconds - self.last >= _EVERY:
            self.last = seconds
            self.show(self.line)

    def end(self, words: str) -> None:
        """Show the last line once more, with the reason."""
        if words and self.last:
            self.show(f"{self.line}  {words}")


class Rich:
    """A bar of rich, on its global console."""

    def start(self, total: int | None, done: int) -> None:
        """Draw the bar, which moves to and fro if `total` is not known."""
        from rich import progress

        self.bar = progress.Progress(
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.description}", markup=False),
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("compiling", total=total, completed=done)
        self.words = ""
        self.bar.start()

    def tell(self, update: int, seconds: float, row: Mapping[str, float]) -> None:
        """Move the bar; rich decides when to draw it."""
        del seconds
        self.words = _words(row, "validation", "damping")
        self.bar.update(self.task, completed=update, description=self.words)

    def end(self, words: str) -> None:
        """Leave the bar where it is, and the reason beside it."""
        if words:
            self.bar.update(self.task, description=f"{self.words}  {words}".strip())
        self.bar.stop()


class Tqdm:
    """A bar of tqdm: the one for notebooks where it works."""

    def start(self, total: int | None, done: int) -> None:
        """Draw the bar."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Without ipywidgets it draws in text.
            from tqdm.auto import tqdm

        self.words = ""
        self.bar = tqdm(total=total, initial=done, desc="compiling", unit=" updates")

    def tell(self, update: int, seconds: float, row: Mapping[str, float]) -> None:
        """Move the bar; tqdm decides when to draw it."""
        del seconds
        self.bar.set_description_str("", refresh=False)
        self.words = _words(row, "validation", "damping")
        self.bar.set_postfix_str(self.words, refresh=False)
        self.bar.update(update - self.bar.n)

    def end(self, words: str) -> None:
        """Leave the bar where it is, and the reason beside it."""
        if words:
            self.bar.set_description_str("", refresh=False)
            self.bar.set_postfix_str(f"{self.words}  {words}".strip())
        self.bar.close()
