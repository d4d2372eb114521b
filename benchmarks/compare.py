r"""Optimizers beside each other: seconds to milestones, several problems and seeds.

    python -m benchmarks compare --list
    python -m benchmarks compare --problem curves2000 \
        --optimizers default,martens2010,adam,lbfgs,kfac --seconds 180 --seeds 0,1,2

All have the same starts and the same data, and take turns of a few seconds, with a
probe of the machine before each. Every run has a file in the folder `--out`; the same
command goes on where it was killed. `benchmarks/README.md` says how to read it.
"""

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks import compare_plans, options
from benchmarks.checkpoint import NotWholeError
from benchmarks.compare_history import Plan
from benchmarks.compare_optimizers import OPTIMIZERS
from benchmarks.compare_problems import PROBLEMS, Problem
from benchmarks.compare_report import Report
from benchmarks.compare_turns import Course, go
from benchmarks.problem import machine
from benchmarks.racers import compile_ahead

SECONDS = 180.0
_INTERRUPTED = 130


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
    add("--data-dir", default="data", help="of mnist.npz; default: data")
    add("--list", action="store_true", help="say what there is, and what is skipped")
    compare_plans.add_arguments(parser, "runs/compare")


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
    for seed, left in compare_plans.left(folder, plans):
        course = _course(args, problem, seed, folder)

        def build(plan: Plan, course: Course = course) -> Any:
            optimizer = OPTIMIZERS[plan.optimizer]
            return optimizer.build(problem, course.params, plan.seed)

        go(compare_plans.builders(left, build), course, report.turn)
        report.save()


def _plans(args: argparse.Namespace, name: str, names: Sequence[str]) -> list[Plan]:
    """List the runs on a problem."""
    optimizers = {name: OPTIMIZERS[name] for name in names}
    return compare_plans.plans(name, args.seeds, optimizers)


def _course(
    args: argparse.Namespace, problem: Problem, seed: int, folder: Path
) -> Course:
    """Make the start, and what measures."""
    params = jax.jit(problem.start)(jax.random.key(seed))
    compiled, _ = compile_ahead(problem.objective.value, params, problem.batch)

    def measure(params: Any) -> tuple[float, float]:
        value = float(compiled(params, problem.batch))
        return value, value - problem.floor

    return Course(
        params=params,
        measure=measure,
        pause=compare_plans.pause(measure, params),
        seconds=args.seconds,
        turn=args.turn,
        clock=compare_plans.CLOCKS[args.clock],
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
    plans = [plan for name in names for plan in _plans(args, name, present)]
    compare_plans.check(folder, plans, _settings(args))


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
