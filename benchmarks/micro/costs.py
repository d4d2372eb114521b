"""What an update costs before it runs: compiling, memory and kernels.

    taskset -c 0 python -m benchmarks costs
    python -m benchmarks costs --problem readme --only ''
    python -m benchmarks costs --problem recurrent --only microbatches
    JAX_PLATFORMS=cpu python -m benchmarks costs --gpu DESCRIPTION
    python -m benchmarks costs --shares
    taskset -c 0 python -m benchmarks costs --exact poisson3d

An update is compiled as a user compiles it, with its gradient, and with the data as an
argument. It is never run, because XLA's plan does not depend on numbers. Each set-up is
traced from nothing.

Sizes are in vectors of as many numbers as there are parameters. Temporary memory comes in
addition to arguments and results; `saved` is the part of the results that takes an
argument's place, as parameters and state are donated. Seconds are of the processor, all
its cores together: JAX's own, before XLA is given the program, and XLA's, which grow with
the number of kernels. Kernels are counted outside of loops, and once in each loop. The
model is counted by its exponentials or tanhs.

With `--gpu` the program is compiled for a GPU that need not be there: a file describes it
as XLA's `GpuTargetConfigProto` in text form, and jax[cuda12] is installed. The kernels are
then what an update launches.

With `--shares` updates of the autoencoder do run, and their time is divided among their
parts; with `--exact` those of the exact solver, on a differential equation.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.table import rich_table
from benchmarks.micro import exact_update, programs, shares
from benchmarks.micro.cost_problems import FLOAT64, PROBLEMS, Problem
from benchmarks.suites.equations import EXPERIMENTS
from hfjax import cg, damping, iterates, krylov, preconditioners, recipes, trust_region

Build = Callable[..., Any]
Place = Callable[[Any, Any, Any], tuple[Any, Any, Any]]


class Lowered(NamedTuple):
    """An update that is traced and not compiled.

    Attributes:
      program: what XLA is given.
      state: the shapes of the optimizer's state.
      seconds: of the processor that tracing took.
    """

    program: Any
    state: Any
    seconds: float


class Option(NamedTuple):
    """A set-up to compile.

    Attributes:
      build: `(objective, **options) -> transformation`, with the problem's options.
      microbatches: of the data, in number.
      donated: whether parameters and state are.
      takes_value: whether it takes f and not the batch, as Optax's line searches do.
      checkpointed: whether f is the one with a checkpointed scan.
      linearize_once: whether all microbatches are linearised once, and not in each
        product.
    """

    build: Build
    microbatches: int = 1
    donated: bool = True
    takes_value: bool = False
    checkpointed: bool = False
    linearize_once: bool = False

    def fits(self, problem: Problem) -> bool:
        """Return whether the problem has what this set-up needs."""
        return not self.checkpointed or problem.checkpointed is not None


def usual(**given: Any) -> Build:
    """Return what builds `hessian_free` with these options."""
    return lambda objective, **options: hfjax.hessian_free(
        objective, **{**options, **given}
    )


_ORIGINS = 12
"""So many places in the code are told that most kernels come from."""

_KRONECKER, _BY_RATIO = preconditioners.kronecker, damping.levenberg_marquardt

OPTIONS = {
    "default": Option(usual()),
    "nothing donated": Option(usual(), donated=False),
    "kronecker(decay=0.95)": Option(usual(preconditioner=_KRONECKER(decay=0.95))),
    "kronecker(decay=0.95, interval=5)": Option(
        usual(preconditioner=_KRONECKER(decay=0.95, interval=5))
    ),
    "nystrom()": Option(usual(preconditioner=preconditioners.nystrom())),
    "diagonal()": Option(usual(preconditioner=preconditioners.diagonal())),
    "preconditioner=None": Option(usual(preconditioner=None)),
    "levenberg_marquardt()": Option(usual(damping=_BY_RATIO())),
    "levenberg_marquardt(), keep=best()": Option(
        usual(damping=_BY_RATIO(), solver=cg.conjugate_gradient(keep=iterates.best()))
    ),
    "levenberg_marquardt(), keep=best(), preconditioner=None": Option(
        usual(
            damping=_BY_RATIO(),
            solver=cg.conjugate_gradient(keep=iterates.best()),
            preconditioner=None,
        )
    ),
    "line_search=None": Option(usual(line_search=None)),
    "steihaug_toint()": Option(
        usual(solver=trust_region.steihaug_toint(), damping=trust_region.radius())
    ),
    "subspace_descent()": Option(
        usual(solver=krylov.subspace_descent(), damping=damping.constant(0.0))
    ),
    "ten microbatches": Option(usual(), microbatches=10),
    "ten microbatches, linearised once": Option(
        usual(), microbatches=10, linearize_once=True
    ),
    "√T checkpointed": Option(usual(), checkpointed=True),
    "√T checkpointed, ten microbatches": Option(
        usual(), microbatches=10, checkpointed=True
    ),
    "recipes.martens2010": Option(lambda f, **options: recipes.martens2010(f)),
    "optax.lbfgs": Option(lambda f, **options: optax.lbfgs(), takes_value=True),
}
"""What is compiled: `hessian_free` with its defaults, with some things changed, a recipe,
and an optimizer to compare with."""

USUAL = ("default", "preconditioner=None", "optax.lbfgs")
"""What is compiled if nothing is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add(
        "--problem",
        choices=tuple(PROBLEMS),
        default="autoencoder",
        help="default: autoencoder",
    )
    add("--cases", type=cli.count, help="default: the problem's")
    add("--only", help="set-ups with this in their name; default: " + ", ".join(USUAL))
    add("--gpu", help="file that describes a GPU to compile for; default: the CPU")
    add("--shares", action="store_true", help="run updates, and divide their time")
    add("--exact", choices=tuple(EXPERIMENTS), help="divide an exact update's time")
    add("--stored", type=cli.count, help="numbers of J that it may store")
    add("--updates", type=cli.count, default=12, help="before it; default: 12")
    add("--rounds", type=cli.count, default=7, help="of timing shares; default: 7")
    add("--out", default="runs/costs.json", help="default: runs/costs.json")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write down."""
    console, rows, asked = Console(), [], args.only
    if args.shares and (args.problem != "autoencoder" or asked or args.gpu):
        msg = "--shares is for the autoencoder and the default set-up, on this machine"
        raise cli.RefusedError(msg)
    if args.exact:
        path = cli.output_file(args.out)
        with jax.enable_x64(True):
            return exact_update.run(
                args.exact, args.updates, args.rounds, args.stored, path, console
            )
    with jax.enable_x64(args.problem in FLOAT64):
        problem = PROBLEMS[args.problem](args.cases)
    names = chosen(OPTIONS, USUAL, problem, asked)
    path = cli.output_file(args.out)
    try:
        device = None if args.gpu is None else _gpu(Path(args.gpu).read_text())
    except (OSError, RuntimeError) as error:
        raise cli.RefusedError(error) from error
    if args.shares:
        return shares.run(args.cases or 2000, args.rounds, path, console)
    with jax.enable_x64(args.problem in FLOAT64), console.status("compiling"):
        for name in names:
            rows.append({"name": name, **costs(OPTIONS[name], problem, device)})
            document = {"arguments": vars(args), **machine.describe(), "rows": rows}
            write_json(path, document)
    console.print(_table(rows, problem))
    console.print(_places(rows))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def chosen(
    options: dict[str, Option],
    usual: Collection[str],
    problem: Problem,
    asked: str | None,
) -> list[str]:
    """List the set-ups that fit a problem: the usual ones, or those asked for."""
    names = [
        name
        for name, option in options.items()
        if option.fits(problem) and (name in usual if asked is None else asked in name)
    ]
    if not names:
        msg = f"--only: no set-up of this problem has {asked!r} in its name"
        raise cli.RefusedError(msg)
    return names


def lower(
    option: Option, problem: Problem, place: Place = lambda *args: args
) -> Lowered:
    """Trace an update from nothing, as a user compiles it.

    Args:
      option: the set-up.
      problem: shapes.
      place: `(params, state, batch) -> the same`, on the devices to compile for.

    Returns:
      What XLA is given, and what it took.
    """
    jax.clear_caches()
    objective = problem.checkpointed if option.checkpointed else problem.objective
    if option.microbatches > 1:
        cases = len(jax.tree.leaves(problem.batch)[0])
        objective = dataclasses.replace(
            objective,
            microbatch_size=max(1, cases // option.microbatches),
            linearize_once=option.linearize_once,
        )
    tx = option.build(objective, **problem.options)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        value, grads = objective.value_and_grad(params, batch)
        given: dict[str, Any] = {"batch": batch}
        if option.takes_value:
            of_params = functools.partial(objective.value, batch=batch)
            given = {"value": value, "grad": grads, "value_fn": of_params}
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, problem.params)
    args = place(problem.params, state, problem.batch)
    donated = ("params", "state") if option.donated else ()
    start = time.process_time()
    lowered = jax.jit(step, donate_argnames=donated).lower(*args)
    return Lowered(lowered, state, time.process_time() - start)


def costs(option: Option, problem: Problem, device: Any = None) -> dict[str, Any]:
    """Compile an update, and look at the program."""
    there = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def place(*args: Any) -> Any:
        if there is None:
            return args
        return jax.tree.map(lambda x: x.update(sharding=there), args)

    lowered, state, seconds = lower(option, problem, place)
    start = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        msg = f"XLA says nothing of programs on {jax.devices()[0].device_kind}."
        raise RuntimeError(msg)
    program = programs.read(text, problem.writers)
    return {
        "vector_bytes": bytes_of(problem.params),
        "state_bytes": bytes_of(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "saved_bytes": memory.alias_size_in_bytes,
        "instructions": program.instructions,
        "kernels": program.kinds.total(),
        "kinds": program.kinds,
        "places": program.places,
        "origins": [[*both, n] for both, n in program.origins.most_common(_ORIGINS)],
        "models": {
            place: units / problem.units for place, units in program.units.items()
        },
        "jax_seconds": seconds,
        "xla_seconds": end - start,
    }


def _gpu(description: str) -> Any:
    """Return a GPU that programs can be compiled for, and not run on."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=description,
        topology="1x1x1",
    )
    return topology.devices[0]


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _table(rows: list[dict[str, Any]], problem: Problem) -> Table:
    table = Table(
        title=f"Updates of {problem.title}",
        caption=f"temp., state, saved: vectors of {rows[0]['vector_bytes']:,} bytes\n"
        "HLO: instructions; JAX, XLA: processor seconds",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("", min_width=20)
    for name in ("temp.", "state", "saved", "HLO", "kernels", "model", "JAX", "XLA"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        size = row["vector_bytes"]
        table.add_row(
            row["name"],
            f"{row['temporary_bytes'] / size:.1f}",
            f"{row['state_bytes'] / size:.1f}",
            f"{row['saved_bytes'] / size:.1f}",
            f"{row['instructions']:,}",
            f"{row['kernels']:,}",
            f"{sum(row['models'].values()):g}",
            f"{row['jax_seconds']:.1f}",
            f"{row['xla_seconds']:.1f}",
        )
    return table


def _places(rows: list[dict[str, Any]]) -> Table:
    """Say where the kernels are."""
    cells = [["", *(row["name"] for row in rows)]]
    for place in dict.fromkeys(place for row in rows for place in row["places"]):
        cells.append([place])
        for row in rows:
            kernels, models = row["places"].get(place), row["models"].get(place, 0)
            often = f" ({models:g})" if models else ""
            cells[-1].append("" if kernels is None else f"{kernels:,}{often}")
    title = "Kernels outside of loops, and in each loop (times the model)"
    return rich_table(cells, "a loop by the function that it is written in", title)
