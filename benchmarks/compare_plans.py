"""Which runs there are to be, which of them are left, and what compiles each."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, compare_history, options
from benchmarks.compare_history import Plan
from benchmarks.compare_optimizers import Optimizer
from benchmarks.compare_turns import checkpoints_of, run_file
from benchmarks.racers import Racer

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
TURN = 10.0
_PAUSE = 0.25  # seconds of training between measurements
_MEASURING = 5  # or so many times what a measurement takes


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Declare the options of all comparisons.

    Args:
      parser: to declare them to.
      folder: for the files, if none is asked for.
    """
    add = parser.add_argument
    add(
        "--seeds",
        type=lambda word: options.listed(_seed, word),
        default=(0,),
        help="of the starts, with commas; default: 0",
    )
    add(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="what the seconds are: of the clock on the wall, or of processor time, all "
        "threads together; default: wall",
    )
    add(
        "--turn",
        type=options.positive,
        default=TURN,
        help=f"seconds of training until the next has its turn; default: {TURN:g}",
    )
    add("--out", default=folder, help=f"folder; default: {folder}")


def plans(
    problem: str, seeds: Sequence[int], optimizers: Mapping[str, Optimizer]
) -> list[Plan]:
    """List the runs on a problem: all with one start before those with another.

    Args:
      problem: its name.
      seeds: of the starts.
      optimizers: by name.
    """
    return [
        Plan(problem, seed, name, rate)
        for seed in seeds
        for name, optimizer in optimizers.items()
        for rate in optimizer.rates or (None,)
    ]


def check(folder: Path, plans: Sequence[Plan], settings: dict[str, Any]) -> None:
    """Refuse to go on with runs of other settings.

    Args:
      folder: of the comparison.
      plans: of the runs.
      settings: what a run depends on, besides its plan.

    Raises:
      ValueError: if there are files or checkpoints of others.
    """
    for plan in plans:
        checkpoint.check(checkpoints_of(folder, plan), settings)
        path = run_file(folder, plan)
        found = compare_history.read(path, dict)
        for name, value in settings.items():
            if found and found.settings.get(name) != value:
                msg = (
                    f"{path} is of a run with {name} {found.settings.get(name)}, not "
                    f"{value}: choose another --out"
                )
                raise ValueError(msg)


def left(folder: Path, plans: Sequence[Plan]) -> Iterator[tuple[int, list[Plan]]]:
    """List the runs that are not finished, by the seed of their start.

    Args:
      folder: of the comparison.
      plans: of the runs, those of a seed together.
    """
    for seed, its in groupby(plans, key=lambda plan: plan.seed):
        unfinished = []
        for plan in its:
            found = compare_history.read(run_file(folder, plan), dict)
            if found is not None and found.finished:
                # It may have been killed right after its end.
                checkpoint.remove(checkpoints_of(folder, plan))
            else:
                unfinished.append(plan)
        if unfinished:
            yield seed, unfinished


def builders(
    plans: Sequence[Plan], build: Callable[[Plan], Any]
) -> list[tuple[Plan, Callable[[], Racer]]]:
    """List what compiles each run; what differs in its rate is compiled once.

    Args:
      plans: of the runs.
      build: compiles one: `plan -> racer`, or `-> (learning_rate -> racer)`.
    """
    listed = []
    for _, its in groupby(plans, key=lambda plan: (plan.seed, plan.optimizer)):
        together = list(its)
        compiled = functools.cache(functools.partial(build, together[0]))
        for plan in together:
            of_plan = compiled
            if plan.rate is not None:
                of_plan = functools.partial(_at_rate, compiled, plan.rate)
            listed.append((plan, of_plan))
    return listed


def pause(measure: Callable[[Any], Any], params: Any) -> float:
    """Return the seconds of training between measurements, by what one takes.

    Args:
      measure: compiled.
      params: to measure.
    """
    measure(params)
    start = time.perf_counter()
    measure(params)
    return max(_PAUSE, _MEASURING * (time.perf_counter() - start))


def _at_rate(compiled: Callable[[], Callable[[float], Racer]], rate: float) -> Racer:
    return compiled()(rate)


def _seed(word: str) -> int:
    if not word.isdecimal():
        msg = f"must be whole numbers of at least 0, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(word)
