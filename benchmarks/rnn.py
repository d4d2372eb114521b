r"""Recurrent networks on sequences that ask for a long memory: Hessian-free and Adam.

    python -m benchmarks rnn --task addition --length 50
    python -m benchmarks rnn --tasks all --lengths 30,50 --structural 0.03,0 \
        --seeds 3 --seconds 120

Every run has a file in the folder `--out`, kept as it goes. The same command goes on
where it was killed, or interrupted, from its checkpoints there: what is finished is not
run again.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import checkpoint, options, rnn_history, rnn_report, sequences
from benchmarks import rnn_training as training
from benchmarks.checkpoint import Checkpoints, NotWholeError
from benchmarks.history import Run
from benchmarks.live import Live
from benchmarks.problem import machine
from benchmarks.race import Limits, race_on
from benchmarks.racers import Racer
from benchmarks.rnn_history import Plan, Row, RunFile
from benchmarks.rnn_tasks import TASKS
from benchmarks.rnn_training import Sizes

SECONDS = 240.0
_OPTIMIZERS = ("hf", "adam")
_CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add(
        "--task",
        "--tasks",
        dest="tasks",
        type=lambda word: options.among(
            TASKS, ",".join(TASKS) if word == "all" else word
        ),
        default=("addition",),
        help=f"one or more of {','.join(TASKS)}, or all; default: addition",
    )
    add(
        "--length",
        "--lengths",
        dest="lengths",
        type=lambda word: options.listed(options.count, word),
        default=(50,),
        help=f"fewest steps of a sequence, at least {sequences.SHORTEST}; default: 50",
    )
    add(
        "--optimizers",
        type=lambda word: options.among(_OPTIMIZERS, word),
        default=_OPTIMIZERS,
        help=f"default: {','.join(_OPTIMIZERS)}",
    )
    add(
        "--structural",
        type=lambda word: options.listed(options.not_negative, word),
        default=(0.03,),
        help="μ of structural damping, tied to λ, for HF; 0 is none; default: 0.03 "
        "(Sutskever)",
    )
    add(
        "--rates",
        type=lambda word: options.listed(options.positive, word),
        default=(1e-3, 3e-4),
        help="learning rates of Adam; default: 0.001,0.0003",
    )
    add(
        "--seconds",
        type=options.positive,
        help=f"training time of each run; default: {SECONDS:g}; if --updates is given, "
        "no limit for HF, and for Adam what HF took",
    )
    add(
        "--clock",
        choices=tuple(_CLOCKS),
        default="wall",
        help="what --seconds are: of the clock on the wall, or of processor time, all "
        "threads together, which other work on the machine moves little; default: wall",
    )
    add("--updates", type=options.count, help="stop HF after so many")
    add(
        "--stop",
        type=options.positive,
        default=0.01,
        help="stop when a smaller fraction of the test sequences is answered wrongly; "
        "default: 0.01",
    )
    add("--seed", type=int, default=0, help="of start and sequences; default: 0")
    add("--seeds", type=options.count, default=1, help="how many, in turn; default: 1")
    add(
        "--cases",
        type=options.count,
        default=500,
        help="sequences that HF takes the curvature on; Sutskever: 1000; default: 500",
    )
    add(
        "--gradient-cases",
        type=options.count,
        default=2000,
        help="sequences that HF takes the gradient on; Sutskever: 10000; default: 2000",
    )
    add(
        "--max-iterations",
        type=options.count,
        default=100,
        help="of conjugate gradients in an update; Sutskever: 300; default: 100",
    )
    add("--out", default="runs/rnn", help="folder for the runs; default: runs/rnn")


def run(args: argparse.Namespace) -> int:
    """Do the runs that are not done, and report on all.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 2 if there are no such runs; 130 if it was interrupted.
    """
    console = Console()
    folder = Path(args.out)
    if args.seconds is None and args.updates is None:
        args.seconds = SECONDS
    try:
        plans = list(_plans(args))
        _check(args, plans, folder)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        return options.refuse("rnn", error)
    status = 0
    try:
        for _, group in groupby(plans, key=lambda plan: plan[:3]):
            _run_group(args, list(group), folder, console)
    except NotWholeError as error:
        return options.refuse("rnn", error)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        console.print("Interrupted: the same command goes on from here.")
    _report(folder, console)
    return status


def _plans(args: argparse.Namespace) -> Iterator[Plan]:
    """List the runs: all with one start before those with another."""
    for seed in range(args.seed, args.seed + args.seeds):
        for length in args.lengths:
            for task in args.tasks:
                if "hf" in args.optimizers:
                    for structural in args.structural:
                        yield Plan(task, length, seed, "hf", structural)
                if "adam" in args.optimizers:
                    for rate in args.rates:
                        yield Plan(task, length, seed, "adam", rate)


def _check(args: argparse.Namespace, plans: Sequence[Plan], folder: Path) -> None:
    """Refuse what cannot be, before anything runs."""
    if args.updates is not None and "hf" not in args.optimizers:
        msg = "--updates is for HF, which is not among --optimizers"
        raise ValueError(msg)
    if min(args.lengths) < sequences.SHORTEST:
        msg = f"--length must be at least {sequences.SHORTEST}, got {min(args.lengths)}"
        raise ValueError(msg)
    if args.gradient_cases < 2 * args.cases:
        msg = (
            f"--gradient-cases must be at least twice --cases, got "
            f"{args.gradient_cases} and {args.cases}"
        )
        raise ValueError(msg)
    for plan in plans:
        checkpoint.check(_checkpoints(folder, plan), _settings(args, plan))
    lines = {plan._replace(seed=0) for plan in plans}
    for found in rnn_history.read_all(folder):
        if found.plan._replace(seed=0) not in lines:
            continue
        for name, value in _settings(args, found.plan).items():
            if found.settings.get(name) != value:
                msg = (
                    f"{folder / found.plan.file} is of a run with {name} "
                    f"{found.settings.get(name)}, not {value}: choose another --out"
                )
                raise ValueError(msg)


def _settings(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Describe what a run depends on, besides its plan."""
    settings = {"seconds": args.seconds, "updates": args.updates, "stop": args.stop}
    settings["clock"] = args.clock
    if plan.family == "hf":
        settings["cases"] = args.cases
        settings["gradient_cases"] = args.gradient_cases
        settings["max_iterations"] = args.max_iterations
    return settings


def _run_group(
    args: argparse.Namespace, plans: list[Plan], folder: Path, console: Console
) -> None:
    """Do the runs on one problem: HF first, as Adam may get the time it took."""
    left = [plan for plan in plans if not _finished(folder / plan.file)]
    for plan in set(plans) - set(left):  # Killed between its end and this.
        checkpoint.remove(_checkpoints(folder, plan))
    if not left:
        return
    task, length, seed = plans[0][:3]
    console.print(f"{TASKS[task].title}, {length} steps, seed {seed}", highlight=False)
    problem = training.build(task, length, seed)
    measure = training.measurer(problem, problem.params)
    sizes = problem.sizes(Sizes(args.gradient_cases, args.cases))
    adam = functools.cache(lambda: training.adam(problem))
    with Live(console) as live:
        for plan in left:
            limits = _limits(args, plan, folder / plans[0].file)
            live.begin(plan.racer, limits)
            build = functools.partial(_racer, args, plan, problem, sizes, adam)
            its = Run[Row](plan.racer, plan.family, 0.0)
            settings = _settings(args, plan)
            file = RunFile(folder / plan.file, settings | machine(), [its], plan=plan)

            def watch(seconds: float, file: RunFile = file) -> None:
                live.show(file.runs[0], seconds)
                file.keep()

            its_measure = measure(training.sequences_of(problem, plan.family, sizes))
            place = _checkpoints(folder, plan)
            with Checkpoints(place, settings, Row) as checkpoints:
                race_on(
                    build,
                    problem.params,
                    its_measure,
                    limits,
                    its,
                    watch,
                    checkpoints,
                    _CLOCKS[args.clock],
                )
            live.show(its, its.last.seconds, last=True)
            file.finished = True
            file.save()
            checkpoint.remove(place)


def _racer(
    args: argparse.Namespace,
    plan: Plan,
    problem: training.Problem,
    sizes: Sizes,
    adam: Callable[[], Callable[[float], Racer]],
) -> Racer:
    """Compile who runs; Adam for all its rates at once."""
    if plan.family != "hf":
        return adam()(plan.setting)
    return training.hf(
        problem,
        sizes=sizes,
        structural=plan.setting,
        max_iterations=args.max_iterations,
    )


def _checkpoints(folder: Path, plan: Plan) -> Path:
    return folder / "checkpoints" / Path(plan.file).stem


def _finished(path: Path) -> bool:
    found = rnn_history.read(path)
    return found is not None and found.finished


def _limits(args: argparse.Namespace, plan: Plan, first: Path) -> Limits:
    """Find when a run ends; `first` is the file of the first run on its problem."""
    if plan.family == "hf":
        return Limits(args.seconds, args.updates, args.stop)
    hf = rnn_history.read(first)
    return Limits(args.seconds or (hf and hf.rows[-1].seconds), error=args.stop)


def _report(folder: Path, console: Console) -> None:
    """Print a table of all runs in the folder, and draw the pictures."""
    ended = rnn_history.read_all(folder)
    if ended:
        console.print(rnn_report.table(ended))
        written = rnn_report.draw(ended, folder)
        names = ", ".join(path.name for path in written)
        console.print(f"Written to {folder}: {names}", highlight=False, soft_wrap=True)
