r"""Optimizers beside each other: seconds to milestones, by problem and seed.

    python -m benchmarks compare --list
    python -m benchmarks compare --suite images --seeds 0,1,2
    python -m benchmarks compare --suite equations --problem 09,15 --optimizers hfjax,adam

All have the same starts and the same data, and take turns of a few seconds, with a
probe of the machine before each turn. Every run has a file in the folder `--out`, and the
same command goes on where it was killed. `benchmarks/README.md` says how to read it.
"""

import argparse
import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from benchmarks import cli
from benchmarks.harness import checkpoint, history, machine
from benchmarks.harness.checkpoint import NotWholeError
from benchmarks.harness.history import Plan
from benchmarks.harness.machine import Taken
from benchmarks.harness.race import Course, Racer, go
from benchmarks.harness.report import Report
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.suites import (
    classifier,
    equations,
    images,
    minibatch,
    mnist,
    sequences,
    transformers,
)
from benchmarks.suites.problem import Measure, Problem, Suite

SUITES: dict[str, Suite] = {
    module.SUITE.name: module.SUITE
    for module in (images, sequences, equations, classifier, transformers, minibatch)
}

TURN = 10.0
_PAUSE = 0.25  # seconds of training between measurements
_MEASURING = 5  # or so many times what a measurement takes
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--suite", choices=tuple(SUITES), help="of problems; --list has them")
    add("--problem", "--problems", help="one or more of the suite's, or all")
    add(
        "--optimizers",
        type=lambda word: cli.among(OPTIMIZERS, word),
        help=f"among {','.join(OPTIMIZERS)}; default: the suite's",
    )
    add(
        "--seconds",
        type=cli.positive,
        help="of training for each run; default: the suite's",
    )
    add(
        "--seeds",
        type=lambda word: cli.listed(cli.seed, word),
        default=(0,),
        help="of the starts, with commas; default: 0",
    )
    add("--out", help="folder; default: runs/SUITE")
    add(
        "--turn",
        type=cli.positive,
        default=TURN,
        help=f"seconds of training before it is the next run's turn; default: {TURN:g}",
    )
    add(
        "--clock",
        choices=tuple(machine.CLOCKS),
        default="wall",
        help="what the seconds are: of the clock on the wall, or of processor time, all "
        "threads together; default: wall",
    )
    add(
        "--precision",
        choices=("float32", "float64"),
        help="of everything; default: the suite's",
    )
    add("--data-dir", default="data", help="of mnist.npz; default: data")
    add("--download", action="store_true", help="fetch mnist.npz if it is missing")
    add("--show", action="store_true", help="open the picture at the end")
    add("--list", action="store_true", help="say what there is, and what is skipped")


class Comparison(NamedTuple):
    """What is compared.

    Attributes:
      suite: of the problems.
      problems: names of those that run.
      optimizers: names of those that run.
      seeds: of the starts.
      seconds: of training for each run.
      turn: seconds of training in a turn.
      clock: a name of `machine.CLOCKS`.
      float64: whether everything is in float64.
      data_dir: the folder of mnist.npz.
      folder: for the files.
      startup: from the start of Python until all is imported.
    """

    suite: Suite
    problems: list[str]
    optimizers: list[str]
    seeds: tuple[int, ...]
    seconds: float
    turn: float
    clock: str
    float64: bool
    data_dir: str
    folder: Path
    startup: Taken

    @property
    def settings(self) -> dict[str, Any]:
        """What a run depends on, besides its plan."""
        return {
            "suite": self.suite.name,
            "seconds": self.seconds,
            "clock": self.clock,
            "float64": self.float64,
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """Settings and what the numbers are measured on, in JSON's types."""
        packages = {OPTIMIZERS[name].package for name in self.optimizers}
        versions = {name: importlib.metadata.version(name) for name in sorted(packages)}
        return {**self.settings, "turn": self.turn, **machine.describe(), **versions}

    def plans(self, problem: str, optimizers: Sequence[str]) -> list[Plan]:
        """List the runs on a problem: all with one start before those with another."""
        return [
            Plan(problem, seed, name, rate)
            for seed in self.seeds
            for name in optimizers
            for rate in OPTIMIZERS[name].rates or (None,)
        ]


def run(args: argparse.Namespace) -> int:
    """Do the runs that are not done, and report on all."""
    startup = machine.since_python_started()
    console = Console(highlight=False, soft_wrap=True)
    if args.list:
        _list(args, console)
        return 0
    try:
        comparison, skipped = _comparison(args, startup)
        _check(comparison)
        comparison.folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise cli.RefusedError(error) from error
    titles = {name: OPTIMIZERS[name].title for name in comparison.optimizers}
    folder, status = comparison.folder, 0
    report = Report(comparison.recorded, folder, titles, skipped, console)
    try:
        with jax.enable_x64(comparison.float64):
            for name in comparison.problems:
                _solve(comparison, name, report)
    except NotWholeError as error:
        raise cli.RefusedError(error) from error
    except KeyboardInterrupt:
        status = _INTERRUPTED
        console.print("Interrupted: the same command goes on from here.")
    report.end(show=args.show)
    return status


def _comparison(
    args: argparse.Namespace, startup: Taken
) -> tuple[Comparison, dict[str, str]]:
    """Find what can be run, and why the rest is skipped."""
    if args.suite is None:
        msg = f"--suite must be one of {', '.join(SUITES)}"
        raise ValueError(msg)
    suite, skipped = SUITES[args.suite], {}
    asked = args.optimizers or suite.optimizers
    problems = suite.named(args.problem)
    if args.download and any(_missing(suite, name, args.data_dir) for name in problems):
        mnist.fetch(args.data_dir)
    for name in problems:
        skipped[name] = _missing(suite, name, args.data_dir)
    for name in asked:
        skipped[name] = OPTIMIZERS[name].missing()
    skipped = {name: why for name, why in skipped.items() if why}
    comparison = Comparison(
        suite=suite,
        problems=[name for name in problems if name not in skipped],
        optimizers=[name for name in asked if name not in skipped],
        seeds=args.seeds,
        seconds=args.seconds or suite.seconds,
        turn=args.turn,
        clock=args.clock,
        float64=suite.float64
        if args.precision is None
        else args.precision == "float64",
        data_dir=args.data_dir,
        folder=Path(args.out or f"runs/{suite.name}"),
        startup=startup,
    )
    if not comparison.problems or not comparison.optimizers:
        words = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        msg = f"nothing is left to run: {words}"
        raise ValueError(msg)
    return comparison, skipped


def _missing(suite: Suite, name: str, data_dir: str) -> str | None:
    """Say why a problem cannot be built, if it cannot."""
    return mnist.missing(data_dir) if suite.problems[name].needs_mnist else None


def _check(comparison: Comparison) -> None:
    """Refuse to go on with runs of other settings, before anything runs."""
    settings, folder = comparison.settings, comparison.folder
    for name in comparison.problems:
        for plan in comparison.plans(name, comparison.optimizers):
            checkpoint.check(plan.checkpoints(folder), settings)
            found = history.read(plan.file(folder))
            for setting, value in settings.items():
                if found and found.settings.get(setting) != value:
                    msg = (
                        f"{plan.file(folder)} is of a run with {setting} "
                        f"{found.settings.get(setting)}, not {value}: choose another "
                        "--out"
                    )
                    raise ValueError(msg)


def _solve(comparison: Comparison, name: str, report: Report) -> None:
    """Do the runs on one problem, those of one seed in turns."""
    try:
        build = comparison.suite.problems[name].build
        problem, building = machine.timed(lambda: build(comparison.data_dir))
    except (OSError, ValueError) as error:
        report.skip(name, str(error))
        return
    fitting = []
    for optimizer in comparison.optimizers:
        why = OPTIMIZERS[optimizer].unfit(problem)
        if why:
            report.skip(f"{optimizer} on {name}", why)
        else:
            fitting.append(optimizer)
    plans = comparison.plans(name, fitting)
    report.begin(name, problem.summary, plans)
    for seed, left in _left(comparison.folder, plans):
        course = _course(comparison, problem, seed, building)
        go(_builders(left, problem, course.params), course, report.turn)
        report.save()


def _course(
    comparison: Comparison, problem: Problem, seed: int, building: Taken
) -> Course:
    """Make the start, and what measures."""
    key = jax.random.key(seed)
    params, starting = machine.timed(lambda: jax.jit(problem.start)(key))
    measure = problem.measurer(params, seed)
    parts = zip(comparison.startup, building, starting, strict=True)
    return Course(
        params=params,
        measure=measure,
        pause=_pause(measure, params),
        seconds=comparison.seconds,
        turn=comparison.turn,
        clock=comparison.clock,
        startup=Taken(*map(sum, parts)),
        goal=problem.summary.goal,
        settings=comparison.settings,
        recorded=comparison.recorded,
        folder=comparison.folder,
    )


def _left(folder: Path, plans: Sequence[Plan]) -> Iterator[tuple[int, list[Plan]]]:
    """List the runs that are not finished, by the seed of their start."""
    for seed, its in itertools.groupby(plans, key=lambda plan: plan.seed):
        unfinished = []
        for plan in its:
            found = history.read(plan.file(folder))
            if found is not None and found.finished:
                # It may have been killed between its end and the removal of these.
                checkpoint.remove(plan.checkpoints(folder))
            else:
                unfinished.append(plan)
        if unfinished:
            yield seed, unfinished


def _builders(
    plans: Sequence[Plan], problem: Problem, params: Any
) -> list[tuple[Plan, Callable[[], Racer]]]:
    """List what compiles each run; runs that differ in their rate share a program."""
    listed = []
    for name, its in itertools.groupby(plans, key=lambda plan: plan.optimizer):
        together = list(its)
        seed = together[0].seed
        build = functools.cache(partial(OPTIMIZERS[name].build, problem, params, seed))
        for plan in together:
            rate = plan.rate
            at_rate = build if rate is None else partial(_at_rate, build, rate)
            listed.append((plan, at_rate))
    return listed


def _at_rate(build: Callable[[], Callable[[float], Racer]], rate: float) -> Racer:
    return build()(rate)


def _pause(measure: Measure, params: Any) -> float:
    """Return the seconds of training between measurements, by what one takes."""
    measure(params, 0)
    start = time.perf_counter()
    measure(params, 0)
    return max(_PAUSE, _MEASURING * (time.perf_counter() - start))


def _list(args: argparse.Namespace, console: Console) -> None:
    """Say what there is, and what would be skipped and why."""
    names = SUITES if args.suite is None else [args.suite]
    for suite in (SUITES[name] for name in names):
        console.print(f"--suite {suite.name}: {suite.title}", markup=False)
        for name, kind in suite.problems.items():
            missing = _missing(suite, name, args.data_dir)
            note = f"  (skipped: {missing})" if missing else ""
            console.print(f"  {name:<22} {kind.title}{note}", markup=False)
    console.print("Optimizers")
    for name, optimizer in OPTIMIZERS.items():
        rates = ", ".join(f"{rate:g}" for rate in optimizer.rates)
        missing = optimizer.missing()
        note = f"  (skipped: {missing})" if missing else ""
        title = optimizer.title + (f"; rates {rates}" if rates else "")
        console.print(f"  {name:<22} {title}{note}", markup=False)
