r"""Differential equations by networks: errors beside those that were published.

    python -m benchmarks pinn --list
    python -m benchmarks pinn --problem poisson2d --budget 300
    python -m benchmarks pinn --problem 09,15 --optimizers hfjax,adam --seeds 0,1

In float64. All have the same starts and the same points, and take turns of a few seconds,
with a probe of the machine before each. Every run has a file in the folder `--out`; the
same command goes on where it was killed. `benchmarks/README.md` says how to read it.
"""

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from benchmarks import compare_plans, options, pinn_problems
from benchmarks.checkpoint import NotWholeError
from benchmarks.compare_history import Plan
from benchmarks.compare_turns import Course, go
from benchmarks.pinn_optimizers import DEFAULT, OPTIMIZERS, drawer, points
from benchmarks.pinn_problem import Problem
from benchmarks.pinn_problems import PROBLEMS
from benchmarks.pinn_report import PinnReport
from benchmarks.pinn_table import Row
from benchmarks.problem import machine
from benchmarks.racers import compile_ahead

BUDGET = 300.0
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
        type=pinn_problems.named,
        default=("poisson2d",),
        help="names or numbers, or all; --list has them; default: poisson2d",
    )
    add(
        "--optimizers",
        type=lambda word: options.among(OPTIMIZERS, word),
        default=DEFAULT,
        help=f"among {','.join(OPTIMIZERS)}; default: {','.join(DEFAULT)}",
    )
    add(
        "--budget",
        type=options.positive,
        default=BUDGET,
        help=f"seconds of training of each run; default: {BUDGET:g}",
    )
    add(
        "--size-limit",
        type=options.count,
        help="leave out problems of more parameters; default: no limit",
    )
    add("--list", action="store_true", help="say what there is")
    compare_plans.add_arguments(parser, "runs/pinn")


def run(args: argparse.Namespace) -> int:
    """Do the runs that are not done, and report on all.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 2 if there are no such runs; 130 if it was interrupted.
    """
    console, folder = Console(highlight=False, soft_wrap=True), Path(args.out)
    if args.list:
        _list(console)
        return 0
    skipped = {
        name: f"it has more than {args.size_limit:,} parameters"
        for name in args.problems
        if args.size_limit and PROBLEMS[name].parameters > args.size_limit
    }
    names = [name for name in args.problems if name not in skipped]
    plans = {name: _plans(args, name) for name in names}
    try:
        _check(args, plans, folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return options.refuse("pinn", error)
    status, report = 0, PinnReport(_recorded(args), folder, skipped, console)
    try:
        with jax.enable_x64(True):
            for name, its in plans.items():
                _solve(args, name, its, folder, report)
    except NotWholeError as error:
        return options.refuse("pinn", error)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        console.print("Interrupted: the same command goes on from here.")
    report.end()
    return status


def _solve(
    args: argparse.Namespace,
    name: str,
    plans: Sequence[Plan],
    folder: Path,
    report: PinnReport,
) -> None:
    """Do the runs on one problem, those of one seed in turns."""
    problem = PROBLEMS[name]
    for optimizer in dict.fromkeys(plan.optimizer for plan in plans):
        why = OPTIMIZERS[optimizer].unfit(problem)
        if why:
            report.skip(f"{optimizer} on {name}", why)
            plans = [plan for plan in plans if plan.optimizer != optimizer]
    report.begin(name, problem, plans)
    for seed, left in compare_plans.left(folder, plans):
        course = _course(args, problem, seed, folder)

        def build(plan: Plan, course: Course = course) -> Any:
            optimizer = OPTIMIZERS[plan.optimizer]
            return optimizer.build(problem, course.params, plan.seed)

        go(compare_plans.builders(left, build), course, report.turn)
        report.save()


def _check(
    args: argparse.Namespace, plans: dict[str, list[Plan]], folder: Path
) -> None:
    """Refuse what cannot be, before anything runs."""
    if not plans:
        msg = f"nothing is left to run with at most {args.size_limit:,} parameters"
        raise ValueError(msg)
    every = [plan for its in plans.values() for plan in its]
    compare_plans.check(folder, every, _settings(args))


def _course(
    args: argparse.Namespace, problem: Problem, seed: int, folder: Path
) -> Course:
    """Make the start, and what measures: on the points of training, unless they change.

    Where they do, f is measured on a draw that no update learns from. Errors are on points
    that are the same for all seeds.
    """
    params = jax.jit(problem.init)(jax.random.key(seed))
    # Of minus one: updates are counted from 0.
    batch = jax.jit(drawer(problem))(points(problem, seed), -1)
    where = problem.equation.inside(jax.random.key(0), problem.evaluation)

    def both(params: Any, batch: Any, where: jax.Array) -> tuple[jax.Array, jax.Array]:
        return problem.objective.value(params, batch), problem.error(params, where)

    compiled, _ = compile_ahead(both, params, batch, where)

    def measure(params: Any) -> tuple[float, ...]:
        return tuple(map(float, jax.device_get(compiled(params, batch, where))))

    return Course(
        params=params,
        measure=measure,
        pause=compare_plans.pause(measure, params),
        seconds=args.budget,
        turn=args.turn,
        clock=compare_plans.CLOCKS[args.clock],
        settings=_settings(args),
        recorded=_recorded(args),
        folder=folder,
        row=Row,
    )


def _plans(args: argparse.Namespace, name: str) -> list[Plan]:
    optimizers = {name: OPTIMIZERS[name] for name in args.optimizers}
    return compare_plans.plans(name, args.seeds, optimizers)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Describe what a run depends on, besides its plan."""
    return {"budget": args.budget, "clock": args.clock}


def _recorded(args: argparse.Namespace) -> dict[str, Any]:
    """Describe settings and what the numbers are measured on, in JSON's types."""
    optax = importlib.metadata.version("optax")
    return {**_settings(args), "turn": args.turn, **machine(), "optax": optax}


def _list(console: Console) -> None:
    """Say what there is."""
    console.print("Problems")
    for name, problem in PROBLEMS.items():
        console.print(f"  {name:<21} {problem.title}", markup=False)
    console.print("Optimizers")
    for name, optimizer in OPTIMIZERS.items():
        rates = ", ".join(f"{rate:g}" for rate in optimizer.rates)
        title = optimizer.title + (f"; rates {rates}" if rates else "")
        console.print(f"  {name:<21} {title}", markup=False)
