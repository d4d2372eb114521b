"""What a race shows while it runs: bars on a terminal, else a line now and then."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from benchmarks.history import Run
from benchmarks.race import Limits

_LINE_SECONDS = 5.0
"""Between lines, where there is no terminal."""


class Live:
    """Shows run after run; a context manager, which leaves the terminal as it was.

    Attributes:
      console: where it shows them.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(bar_width=6),
            TextColumn("{task.fields[text]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False, style="cyan"),
            console=console,
            refresh_per_second=4,
        )
        self._task = TaskID(0)
        self._limits = Limits()
        self._name, self._line_at = "", 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, limits: Limits) -> None:
        """Announce a racer, which is being compiled.

        Args:
          name: of the racer.
          limits: of its run.
        """
        self._name, self._limits = name, limits
        self._task = self._bars.add_task(name, total=None, text="compiling", left="")
        if not self.console.is_terminal:
            self._print("compiling")

    def show(self, run: Run, seconds: float, *, last: bool = False) -> None:
        """Show where a run stands.

        Args:
          run: measured at least once.
          seconds: of training.
          last: whether it has ended.
        """
        if not seconds:
            self._line_at = time.monotonic() + _LINE_SECONDS
        left = "" if last else _left(run, seconds, self._limits)
        text = describe(run)
        if self.console.is_terminal:
            done, total = _progress(run, seconds, self._limits)
            if last:
                done = total = 1.0
            self._bars.update(
                self._task, completed=done, total=total, text=text, left=left
            )
        elif last or (time.monotonic() >= self._line_at and left != "0:00"):
            self._line_at = time.monotonic() + _LINE_SECONDS
            self._print(f"{seconds:6.1f} s  {text}  {left and left + ' left'}")

    def _print(self, text: str) -> None:
        line = f"{self._name:<11} {text}".rstrip()
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(run: Run) -> str:
    """Put a run's latest measurements into a few words.

    Args:
      run: measured at least once.

    Returns:
      Update, loss, error; of HF also λ, ρ and the CG iterations.
    """
    text = f"update {run.last.updates:<4} {run.last.words()}"
    if run.scalars:
        now = run.scalars[-1]
        text += (
            f" λ {now['damping']:.0e} ρ {max(now['reduction_ratio'], -99):.2f}"
            f" CG {now['cg_iterations']}"
        )
    return text


def _progress(run: Run, seconds: float, limits: Limits) -> tuple[float, float | None]:
    """Return how far a run is and how far it goes, if that is known."""
    if limits.seconds is not None:
        return seconds, limits.seconds
    if limits.updates is not None:
        return run.last.updates, limits.updates
    return 0, None


def _left(run: Run, seconds: float, limits: Limits) -> str:
    """Estimate the training time that is left."""
    done, total = _progress(run, seconds, limits)
    if total is None or not done:
        return ""
    left = max(0, round(seconds * (total / done - 1)))
    return f"{left // 60}:{left % 60:02d}"
