r"""Optimizers beside each other: seconds to milestones, several problems and seeds.

    python -m benchmarks compare --list
    python -m benchmarks compare --problem curves2000 \
        --optimizers default,martens2010,adam,lbfgs,kfac --seconds 180 --seeds 0,1,2

All have the same starts and the same data, and take turns of a few seconds, with a
probe of the machine before each. Every run has a file in the folder `--out`; the same
command goes on where it was killed. `benchmarks/README.md` says how to read it.
"""

import argparse
import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks import checkpoint, compare_history, options
from benchmarks.checkpoint import NotWholeError
from benchmarks.compare_history import Plan
from benchmarks.compare_optimizers import OPTIMIZERS
from benchmarks.compare_problems import PROBLEMS, Problem
from benchmarks.compare_report import Report
from benchmarks.compare_turns import Course, checkpoints_of, go, run_file
from benchmarks.problem import machine
from benchmarks.racers import Racer, compile_ahead

SECONDS = 180.0
TURN = 10.0
_CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_INTERRUPTED = 130
_PAUSE = 0.25  # seconds of training between measurements
_MEASURING = 5  # or so many times what a measurement takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add(
        "--problem",
        "--problems",
        dest="problems",
        type=lambda word: options.among(PROBLEMS, word),
        help=f"one or more of {','.join(PROBLEMS)}; default: all that there is data "
        "for",
    )
    add(
        "--optimizers",
        type=lambda word: options.among(OPTIMIZERS, word),
        default=tuple(OPTIMIZERS),
        help=f"default: {','.join(OPTIMIZERS)}, as far as they are installed",
    )
    add(
        "--seconds",
        type=options.positive,
        default=SECONDS,
        help=f"training time of each run; default: {SECONDS:g}",
    )
    add(
        "--seeds",
        type=lambda word: options.listed(_seed, word),
        default=(0,),
        help="of the starts, with commas; default: 0",
    )
    add(
        "--clock",
        choices=tuple(_CLOCKS),
        default="wall",
        help="what --seconds are: of the clock on the wall, or of processor time, all "
        "threads together; default: wall",
    )
    add(
        "--turn",
        type=options.positive,
        default=TURN,
        help=f"seconds of training until the next has its turn; default: {TURN:g}",
    )
    add("--data-dir", default="data", help="of mnist.npz; default: data")
    add("--list", action="store_true", help="say what there is, and what is skipped")
    add("--out", default="runs/compare", help="folder; default: runs/compare")


def run(args: argparse.Namespace) -> int:
    """Do the runs that are not done, and report on all.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 2 if there are no such runs; 130 if it was interrupted.
    """
    console, folder = Console(highlight=False, soft_wrap=True), Path(args.out)
    if args.list:
        _list(args, console)
        return 0
    try:
        skipped = _skipped(args)
        names = [name for name in args.problems or PROBLEMS if name not in skipped]
        present = [name for name in args.optimizers if name not in skipped]
        _check(args, names, present, skipped, folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return options.refuse("compare", error)
    status, report = 0, Report(_recorded(args), folder, skipped, console)
    try:
        for name in names:
            _solve(args, name, present, folder, report)
    except NotWholeError as error:
        return options.refuse("compare", error)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        console.print("Interrupted: the same command goes on from here.")
    report.end()
    return status


def _solve(
    args: argparse.Namespace,
    name: str,
    present: Sequence[str],
    folder: Path,
    report: Report,
) -> None:
    """Do the runs on one problem, those of one seed in turns."""
    try:
        problem = PROBLEMS[name].build(args.data_dir)
    except (OSError, ValueError) as error:
        report.skip(name, str(error))
        return
    fitting = []
    for optimizer in present:
        why = OPTIMIZERS[optimizer].unfit(problem)
        if why:
            report.skip(f"{optimizer} on {name}", why)
        else:
            fitting.append(optimizer)
    plans = _plans(args, name, fitting)
    report.begin(name, problem, plans)
    for seed, its in groupby(plans, key=lambda plan: plan.seed):
        left = []
        for plan in its:
            if _finished(folder, plan):  # It may have been killed right after its end.
                checkpoint.remove(checkpoints_of(folder, plan))
            else:
                left.append(plan)
        if left:
            course = _course(args, problem, seed, folder)
            go(_builders(problem, course.params, left), course, report.turn)
            report.save()


def _plans(args: argparse.Namespace, name: str, names: Sequence[str]) -> list[Plan]:
    """List the runs on a problem: all with one start before those with another."""
    return [
        Plan(name, seed, optimizer, rate)
        for seed in args.seeds
        for optimizer in names
        for rate in OPTIMIZERS[optimizer].rates or (None,)
    ]


def _builders(
    problem: Problem, params: Any, plans: Sequence[Plan]
) -> list[tuple[Plan, Callable[[], Racer]]]:
    """List what compiles each run; what differs in its rate is compiled once."""
    builders = []
    for (seed, optimizer), its in groupby(plans, key=lambda p: (p.seed, p.optimizer)):
        compiled = functools.cache(
            functools.partial(OPTIMIZERS[optimizer].build, problem, params, seed)
        )
        for plan in its:
            rate = plan.rate
            build = compiled
            if rate is not None:
                build = functools.partial(_at_rate, compiled, rate)
            builders.append((plan, build))
    return builders


def _at_rate(compiled: Callable[[], Callable[[float], Racer]], rate: float) -> Racer:
    return compiled()(rate)


def _course(
    args: argparse.Namespace, problem: Problem, seed: int, folder: Path
) -> Course:
    """Make the start, and what measures."""
    params = jax.jit(problem.start)(jax.random.key(seed))
    compiled, _ = compile_ahead(problem.objective.value, params, problem.batch)

    def excess(params: Any) -> tuple[float, float]:
        value = float(compiled(params, problem.batch))
        return value, value - problem.floor

    excess(params)
    start = time.perf_counter()
    excess(params)
    pause = max(_PAUSE, _MEASURING * (time.perf_counter() - start))
    return Course(
        params=params,
        excess=excess,
        pause=pause,
        seconds=args.seconds,
        turn=args.turn,
        clock=_CLOCKS[args.clock],
        settings=_settings(args),
        recorded=_recorded(args),
        folder=folder,
    )


def _skipped(args: argparse.Namespace) -> dict[str, str]:
    """Find what cannot be run, and why."""
    found = {}
    for name in args.problems or PROBLEMS:
        found[name] = PROBLEMS[name].missing(args.data_dir)
    for name in args.optimizers:
        found[name] = OPTIMIZERS[name].missing()
    return {name: why for name, why in found.items() if why}


def _check(
    args: argparse.Namespace,
    names: Sequence[str],
    present: Sequence[str],
    skipped: dict[str, str],
    folder: Path,
) -> None:
    """Refuse what cannot be, before anything runs."""
    if not names or not present:
        words = "; ".join(f"{name}: {why}" for name, why in skipped.items())
        msg = f"nothing is left to run: {words}"
        raise ValueError(msg)
    for plan in (plan for name in names for plan in _plans(args, name, present)):
        checkpoint.check(checkpoints_of(folder, plan), _settings(args))
        path = run_file(folder, plan)
        found = compare_history.read(path)
        for name, value in _settings(args).items():
            if found and found.settings.get(name) != value:
                msg = (
                    f"{path} is of a run with {name} {found.settings.get(name)}, not "
                    f"{value}: choose another --out"
                )
                raise ValueError(msg)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Describe what a run depends on, besides its plan."""
    return {"seconds": args.seconds, "clock": args.clock}


def _recorded(args: argparse.Namespace) -> dict[str, Any]:
    """Describe settings and what the numbers are measured on, in JSON's types."""
    versions = {}
    for optimizer in OPTIMIZERS.values():
        if optimizer.missing() is None:
            version = importlib.metadata.version(optimizer.package)
            versions[optimizer.package] = version
    return {**_settings(args), "turn": args.turn, **machine(), **versions}


def _finished(folder: Path, plan: Plan) -> bool:
    found = compare_history.read(run_file(folder, plan))
    return found is not None and found.finished


def _list(args: argparse.Namespace, console: Console) -> None:
    """Say what there is, and what would be skipped and why."""
    found = {"Problems": {}, "Optimizers": {}}
    for name, kind in PROBLEMS.items():
        found["Problems"][name] = kind.title, kind.missing(args.data_dir)
    for name, optimizer in OPTIMIZERS.items():
        rates = ", ".join(f"{rate:g}" for rate in optimizer.rates)
        title = optimizer.title + (f"; rates {rates}" if rates else "")
        found["Optimizers"][name] = title, optimizer.missing()
    for heading, entries in found.items():
        console.print(heading)
        for name, (title, missing) in entries.items():
            note = f"  (skipped: {missing})" if missing else ""
            console.print(f"  {name:<18} {title}{note}", markup=False)


def _seed(word: str) -> int:
    if not word.isdecimal():
        msg = f"must be whole numbers of at least 0, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(word)
