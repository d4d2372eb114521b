r"""A race on a deep autoencoder: Hessian-free, Adam and L-BFGS.

    python -m benchmarks autoencoder
    python -m benchmarks autoencoder --recipe martens2010 --cases 20000 \
        --curvature-batches 4 --optimizers hf --updates 100
    python -m benchmarks autoencoder --data mnist --data-dir data --seconds 3600

Writes `history.json` into the folder `--out` as it goes, and pictures at the end. The
same command goes on where it was killed, or interrupted, from its checkpoints there.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from benchmarks import checkpoint, milestones, options, problem, racers, report
from benchmarks.checkpoint import Checkpoints, NotWholeError
from benchmarks.history import ImageHistory, Row, Run, write_json
from benchmarks.live import Live
from benchmarks.problem import Problem, machine
from benchmarks.race import Limits, measurer, race_on
from benchmarks.racers import Racer

SECONDS = 34.0
"""For each run of the demo: its five stay under four minutes, compiling included."""

_INTERRUPTED = 130
_CHECKPOINTS = "checkpoints"
"""Their folder: there as long as the race is unfinished."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    problem.add_arguments(parser)
    add = parser.add_argument
    add(
        "--seconds",
        type=options.positive,
        help=f"training time of each run; default: {SECONDS:g}; if --updates or "
        "--until-error is given, no limit for HF, and for the others what HF took",
    )
    add(
        "--optimizers",
        type=options.optimizers,
        default=options.OPTIMIZERS,
        help=f"default: {','.join(options.OPTIMIZERS)}",
    )
    add(
        "--recipe",
        choices=racers.RECIPES,
        default=racers.RECIPES[0],
        help=f"of hfjax.recipes, for HF; default: {racers.RECIPES[0]}",
    )
    add("--updates", type=options.count, help="stop HF after so many")
    add("--until-error", type=options.positive, help="stop below this squared error")
    add(
        "--max-iterations",
        type=options.count,
        help="of conjugate gradients in an update of HF; default: the recipe's",
    )
    add("--out", help="folder for history and pictures; default: runs/DATA")


def run(args: argparse.Namespace) -> int:
    """Run the race, and report.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 2 if there is no such race; 130 if it was interrupted.
    """
    console = Console()
    folder = Path(args.out or f"runs/{args.data}")
    try:
        limits = _limits(args)
        given = problem.build(args)
        history = _history(args, given, folder)
    except (OSError, ValueError) as error:
        return options.refuse("autoencoder", error)
    console.print(given.title, highlight=False)
    status = 0
    try:
        with Live(console) as live:
            _race_all(args, given, limits, history, live)
    except NotWholeError as error:
        return options.refuse("autoencoder", error)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        console.print(
            "Interrupted: this is what there is. The same command goes on from here."
        )
    _report(history, given, folder, console)
    if not status:
        checkpoint.remove(folder / _CHECKPOINTS)
    return status


def _limits(args: argparse.Namespace) -> Limits:
    """Find when HF ends."""
    if args.updates is not None and "hf" not in args.optimizers:
        msg = "--updates is for HF, which is not among --optimizers"
        raise ValueError(msg)
    free = args.updates is None and args.until_error is None
    seconds = SECONDS if args.seconds is None and free else args.seconds
    return Limits(seconds, args.updates, args.until_error)


def _history(args: argparse.Namespace, given: Problem, folder: Path) -> ImageHistory:
    """Begin the history, on disk too: better to fail now than after the race."""
    settings = {
        **given.document(),
        "optimizers": list(args.optimizers),
        "seconds": args.seconds,
        "updates": args.updates,
        "until_error": args.until_error,
        "recipe": args.recipe,
        "max_iterations": args.max_iterations,
        "seed": args.seed,
    }
    floor = given.images.entropy_floor()
    path = folder / "history.json"
    history = ImageHistory(path, settings, entropy_floor=floor)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = list((folder / _CHECKPOINTS).glob("*"))
    for checkpoints in unfinished:
        checkpoint.check(checkpoints, _lasting(settings))
    if not unfinished:  # Else the runs so far are in the file.
        history.save()
    return history


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out the machine: a run may go on on another."""
    return {name: settings[name] for name in settings.keys() - machine().keys()}


def _race_all(
    args: argparse.Namespace,
    given: Problem,
    limits: Limits,
    history: ImageHistory,
    live: Live,
) -> None:
    """Race one after another: HF first, as the others may get the time it took."""
    train, test = jnp.asarray(given.images.train), jnp.asarray(given.images.test)
    measure = measurer(given.objective, train, test, given.params)
    settings = _lasting(history.settings)
    for name, build in _builders(args, given, train):
        live.begin(name, limits)
        run = Run[Row](name, name.split()[0], 0.0)
        folder = history.path.parent / _CHECKPOINTS / name.replace(" ", "-")
        history.runs.append(run)

        def watch(seconds: float, run: Run[Row] = run) -> None:
            live.show(run, seconds)
            history.keep()

        with Checkpoints(folder, settings, Row) as checkpoints:
            race_on(build, given.params, measure, limits, run, watch, checkpoints)
        live.show(run, run.last.seconds, last=True)
        history.save()
        if run.family == "hf":
            seconds = limits.seconds or run.last.seconds
            limits = Limits(seconds, updates=None, error=limits.error)


def _builders(
    args: argparse.Namespace, given: Problem, train: jax.Array
) -> Iterator[tuple[str, Callable[[], Racer]]]:
    """List the racers by name; each is compiled when its turn comes."""
    common = (given.objective, (train, train), given.params)
    if "hf" in args.optimizers:
        yield (
            "hf",
            lambda: racers.hf(
                *common,
                recipe=args.recipe,
                curvature_batches=given.curvature_batches,
                max_iterations=args.max_iterations,
            ),
        )
    if "adam" in args.optimizers:
        adam = functools.cache(
            lambda: racers.first_order("adam", optax.adam, *common, seed=args.seed)
        )
        for rate in racers.ADAM_RATES:
            yield f"adam {rate:g}", lambda rate=rate: adam()(rate)
    if "lbfgs" in args.optimizers:
        yield "lbfgs", lambda: racers.lbfgs(*common)


def _report(
    history: ImageHistory, given: Problem, folder: Path, console: Console
) -> None:
    """Print the tables, draw the pictures, write everything down."""
    history.save()
    console.print(report.table(history))
    written = [history.path]
    for run in history.started():
        if run.family == "hf" and given.images.name == "curves":
            console.print(milestones.table(run.rows))
            written.append(folder / "milestones.json")
            write_json(written[-1], milestones.document(run.rows))
    written += report.draw(history, given.network, given.images.test, folder)
    names = ", ".join(path.name for path in written)
    console.print(f"Written to {folder}: {names}", highlight=False, soft_wrap=True)
