r"""Kill a run at random moments, and see that it ends as one that was not killed.

    python -m benchmarks restart --kills 20
    python -m benchmarks restart --kills 6 --script notebooks/checkpointing.py

A process trains; it is killed by SIGKILL, again and again, half of the time as soon as
a half-written checkpoint is on disk, and started again by the same command. In the end
parameters, the optimizer's whole state after every update, the order of the data and
the history, but for its seconds, must be those of a process that ran undisturbed. Of a
script, the last line that it prints must be the same.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import Console
from rich.table import Table

from benchmarks import options, restart_run
from benchmarks.checkpoint import digest
from benchmarks.history import Row, Run

_UPDATES = 10
"""For each kill; more than come between two of them."""

_LIFE = 0.5
"""Of its share of the training that a process is given, on average."""

_WRITING = ".orbax-checkpoint-tmp"
_POLL = 0.001
_PATIENCE = 120.0


class Kills(NamedTuple):
    """How a run was killed.

    Attributes:
      kills: all.
      mid_write: with a half-written checkpoint on disk.
      redone: updates that were done again.
      last_line: that it printed.
    """

    kills: int
    mid_write: int
    redone: int
    last_line: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--kills", type=options.count, default=20, help="default: 20")
    add("--seed", type=int, default=0, help="of the moments; default: 0")
    add(
        "--script",
        help="Python script to kill instead; its checkpoints are in the folder "
        "$CHECKPOINT_FOLDER, and it prints lines as `update 12`",
    )


def run(args: argparse.Namespace) -> int:
    """Let one process run, kill another, and compare.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 1 if the two runs differ, or there were too few kills; 2 if a
      process failed.
    """
    console, begun = Console(highlight=False), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")

        def start(folder: Path) -> subprocess.Popen[str]:
            return _launch(args, folder, Path(scratch, "compiled"))

        try:
            # The first fills the cache of compiled programs, and goes undisturbed. A
            # script may compile while it trains: another shows what training takes.
            seconds, last_line = _undisturbed(start(whole))
            if args.script:
                seconds, _ = _undisturbed(start(Path(scratch, "again")))
            console.print(f"Undisturbed: {seconds:.1f} s of training")
            kills = kill_often(
                lambda: start(killed),
                killed,
                kills=args.kills,
                mean_life=_LIFE * seconds / args.kills,
                seed=args.seed,
            )
            if args.script:
                differing = [] if kills.last_line == last_line else ["the last line"]
            else:
                differing = differences(*map(restart_run.read_end, (whole, killed)))
        except (RuntimeError, ValueError) as error:
            return options.refuse("restart", error)
    # A script may train several times: its numbers start again.
    redone = "not known" if args.script else str(kills.redone)
    console.print(_table(kills, redone, differing))
    console.print(f"{time.monotonic() - begun:.0f} s in all")
    if kills.kills < args.kills:
        console.print(f"It came to its end before it was killed {args.kills} times.")
    return 1 if differing or kills.kills < args.kills else 0


def _launch(
    args: argparse.Namespace, folder: Path, cache: Path
) -> subprocess.Popen[str]:
    """Start the program, which keeps what it compiles: so it starts again soon."""
    updates = str(_UPDATES * args.kills)
    module = ["-m", "benchmarks.restart_run", str(folder), updates]
    environment = {
        **os.environ,
        "CHECKPOINT_FOLDER": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "MPLBACKEND": "agg",
    }
    return subprocess.Popen(
        [sys.executable, "-u", *([args.script] if args.script else module)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def kill_often(
    start: Callable[[], subprocess.Popen[str]],
    folder: Path,
    *,
    kills: int,
    mean_life: float,
    seed: int,
) -> Kills:
    """Kill a run so many times, and then let it come to its end.

    Every other kill waits for a half-written checkpoint. A random time goes before,
    which begins when the process trains.

    Args:
      start: starts the process, which prints a line `update N` after each.
      folder: of its checkpoints.
      kills: how many; fewer if the run comes to its end before.
      mean_life: seconds of training that a process is given, on average.
      seed: of the moments.

    Returns:
      What was done.
    """
    moments = random.Random(seed)
    done = mid_write = redone = reached = 0
    while True:
        with start() as process:
            lines = _Updates(process)
            try:
                first = next(lines, reached)
                redone += max(0, reached - first)
                if done < kills:
                    time.sleep(moments.uniform(0, 2 * mean_life))
                    if done % 2:
                        _await_write(process, folder)
                        time.sleep(moments.uniform(0, 0.03))
                    process.kill()
                reached = max([first, *lines])
            finally:
                process.kill()
        if process.returncode != -signal.SIGKILL:
            _check(process)
            return Kills(done, mid_write, redone, lines.last_line)
        done += 1
        mid_write += _writing(folder)


def differences(one: Run[Row], other: Run[Row]) -> list[str]:
    """Compare two runs, bit for bit.

    Args:
      one: run.
      other: run.

    Returns:
      What differs; seconds may.
    """
    pairs: dict[str, Callable[[Run[Row]], Any]] = {
        "parameters": lambda run: digest(run.params),
        "state after every update": lambda run: [s["all"] for s in run.scalars],
        "order of the data": lambda run: [s["cases"] for s in run.scalars],
        "history": lambda run: (
            [row._replace(seconds=0.0) for row in run.rows],
            run.scalars,
        ),
    }
    return [name for name, of in pairs.items() if of(one) != of(other)]


class _Updates:
    """The updates that a process says it has done; an iterator."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.last_line = ""
        self._lines = iter(process.stdout or ())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        for line in self._lines:
            self.last_line = line
            words = line.replace(":", " ").split()
            if words[:1] == ["update"] and words[1:] and words[1].isdecimal():
                return int(words[1])
        raise StopIteration


def _undisturbed(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Let it come to its end; return the seconds it trained, and its last line."""
    with process:
        lines = _Updates(process)
        next(lines, None)
        begun = time.monotonic()
        for _ in lines:
            pass
    _check(process)
    return time.monotonic() - begun, lines.last_line


def _check(process: subprocess.Popen[str]) -> None:
    if process.returncode:
        msg = f"The process that trains failed with status {process.returncode}"
        raise RuntimeError(msg)


def _await_write(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until a half-written checkpoint is on disk, or the process has ended."""
    end = time.monotonic() + _PATIENCE
    while not _writing(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(_POLL)


def _writing(folder: Path) -> bool:
    folders = (name for _, names, _ in os.walk(folder) for name in names)
    return any(_WRITING in name for name in folders)


def _table(kills: Kills, redone: str, differing: list[str]) -> Table:
    table = Table("kills", "mid-write", "updates redone", "identical")
    identical = f"no: {', '.join(differing)}" if differing else "yes"
    table.add_row(str(kills.kills), str(kills.mid_write), redone, identical)
    return table
