"""What an update costs before it runs: compiling, memory and kernels.

    taskset -c 0 python -m benchmarks costs
    python -m benchmarks costs --problem readme --only ''
    JAX_PLATFORMS=cpu python -m benchmarks costs --gpu DESCRIPTION

An update is compiled as a user compiles it, the gradient with it and the data as an
argument, and never run: what XLA plans does not depend on numbers. Each set-up is traced
from nothing.

A vector has as many numbers as there are parameters. Temporary memory comes besides
arguments and results; `saved` are the results that take an argument's place, as
parameters and state are donated. Seconds are of the processor, all its cores together:
JAX's own, before XLA is given the program, and XLA's, which are about so much for each
kernel. Kernels are counted outside of loops, and in each loop once. The model is in a
program as often as its exponentials or tanhs are.

With `--gpu` the program is that of a GPU which need not be there: a file describes it, as
XLA's `GpuTargetConfigProto` in text form, and jax[cuda12] is installed. The kernels are
then what an update launches.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options, programs
from benchmarks.cost_problems import PROBLEMS, Problem
from benchmarks.history import write_json
from benchmarks.problem import machine
from hfjax import cg, damping, iterates, krylov, preconditioners, recipes, trust_region

Build = Callable[..., Any]


class Option(NamedTuple):
    """A set-up to compile.

    Attributes:
      build: `(objective, **options) -> transformation`, with the problem's options.
      microbatches: of the data, in number.
      donated: whether parameters and state are.
      takes_value: whether it takes f and not the batch, as Optax's line searches do.
    """

    build: Build
    microbatches: int = 1
    donated: bool = True
    takes_value: bool = False


def _usual(**given: Any) -> Build:
    return lambda objective, **options: hfjax.hessian_free(
        objective, **{**options, **given}
    )


def _keeping(keep: iterates.IterateRule) -> Build:
    return _usual(solver=cg.conjugate_gradient(keep=keep))


def _within_a_region(objective: hfjax.Objective, **options: Any) -> Any:
    # Not at import: a radius is an array, and `multihost` is not to be first with JAX.
    build = _usual(solver=trust_region.steihaug_toint(), damping=trust_region.radius())
    return build(objective, **options)


_KRONECKER, _BY_RATIO = preconditioners.kronecker, damping.levenberg_marquardt

OPTIONS = {
    "as it comes": Option(_usual()),
    "nothing donated": Option(_usual(), donated=False),
    "kronecker(decay=0.95)": Option(_usual(preconditioner=_KRONECKER(decay=0.95))),
    "kronecker(decay=0.95, interval=5)": Option(
        _usual(preconditioner=_KRONECKER(decay=0.95, interval=5))
    ),
    "nystrom()": Option(_usual(preconditioner=preconditioners.nystrom())),
    "diagonal()": Option(_usual(preconditioner=preconditioners.diagonal())),
    "preconditioner=None": Option(_usual(preconditioner=None)),
    "max_iterations=50": Option(
        _usual(solver=cg.conjugate_gradient(max_iterations=50))
    ),
    "keep=grid(first=1, growth=2)": Option(
        _keeping(iterates.grid(first=1, growth=2.0))
    ),
    "levenberg_marquardt()": Option(_usual(damping=_BY_RATIO())),
    "levenberg_marquardt(), keep=best()": Option(
        _usual(damping=_BY_RATIO(), solver=cg.conjugate_gradient(keep=iterates.best()))
    ),
    "levenberg_marquardt(), keep=best(), preconditioner=None": Option(
        _usual(
            damping=_BY_RATIO(),
            solver=cg.conjugate_gradient(keep=iterates.best()),
            preconditioner=None,
        )
    ),
    "matrix='curvature_diagonal'": Option(
        _usual(damping=_BY_RATIO(matrix="curvature_diagonal"))
    ),
    "line_search=None": Option(_usual(line_search=None)),
    "steihaug_toint()": Option(_within_a_region),
    "subspace_descent()": Option(
        _usual(solver=krylov.subspace_descent(), damping=damping.constant(0.0))
    ),
    "ten microbatches": Option(_usual(), microbatches=10),
    "recipes.martens2010": Option(lambda f, **options: recipes.martens2010(f)),
    "optax.lbfgs": Option(lambda f, **options: optax.lbfgs(), takes_value=True),
}
"""What is compiled: `hessian_free` as it comes, with some things changed, a recipe, and
an optimizer to compare with."""

USUAL = ("as it comes", "preconditioner=None", "optax.lbfgs")
"""What is compiled if nothing is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add(
        "--problem",
        choices=tuple(PROBLEMS),
        default="autoencoder",
        help="default: autoencoder",
    )
    add("--cases", type=options.count, help="default: the problem's")
    add(
        "--layers",
        type=options.layers,
        help="of the autoencoder, from the pixels to the code; default: those of curves",
    )
    add("--only", help="set-ups with this in their name; default: " + ", ".join(USUAL))
    add("--gpu", help="file that describes a GPU to compile for; default: the CPU")
    add("--out", default="runs/costs.json", help="default: runs/costs.json")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if the numbers cannot be written, no GPU can be compiled
      for or nothing is asked for.
    """
    console, path, rows = Console(), Path(args.out), []
    asked = args.only
    names = USUAL if asked is None else [name for name in OPTIONS if asked in name]
    if not names:
        msg = f"--only: no set-up has {asked!r} in its name"
        return options.refuse("costs", ValueError(msg))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
        device = None if args.gpu is None else _gpu(Path(args.gpu).read_text())
    except (OSError, RuntimeError) as error:
        return options.refuse("costs", error)
    # Poisson's equation is solved in float64, as `pinn` has it.
    with jax.enable_x64(args.problem == "poisson"), console.status("compiling"):
        problem = PROBLEMS[args.problem](args.cases, args.layers)
        for name in names:
            found = costs(OPTIONS[name], problem, device)
            rows.append({"name": name, **found})
            write_json(path, {"arguments": vars(args), **machine(), "rows": rows})
    console.print(_table(rows, problem))
    console.print(_places(rows))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def costs(option: Option, problem: Problem, device: Any = None) -> dict[str, Any]:
    """Compile an update, and look at the program.

    Args:
      option: the set-up.
      problem: what is to be learnt.
      device: to compile for; `None` is the default.

    Returns:
      Bytes, counts and processor seconds, by name.
    """
    jax.clear_caches()
    objective = problem.objective
    if option.microbatches > 1:
        cases = len(jax.tree.leaves(problem.batch)[0])
        size = max(1, cases // option.microbatches)
        objective = dataclasses.replace(objective, microbatch_size=size)
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
    args = (problem.params, state, problem.batch)
    if device is not None:
        there = jax.sharding.SingleDeviceSharding(device)
        args = jax.tree.map(lambda x: x.update(sharding=there), args)
    donated = ("params", "state") if option.donated else ()
    start = time.process_time()
    lowered = jax.jit(step, donate_argnames=donated).lower(*args)
    handed = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        msg = f"XLA says nothing of programs on {jax.devices()[0].device_kind}."
        raise RuntimeError(msg)
    program = programs.read(text, problem.writers)
    return {
        "vector_bytes": _bytes(problem.params),
        "state_bytes": _bytes(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "saved_bytes": memory.alias_size_in_bytes,
        "instructions": program.instructions,
        "kernels": program.kinds.total(),
        "kinds": program.kinds,
        "places": program.places,
        "models": {
            place: units / problem.units for place, units in program.units.items()
        },
        "jax_seconds": handed - start,
        "xla_seconds": end - handed,
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


def _bytes(tree: Any) -> int:
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
    table = Table(
        title="Kernels outside of loops, and in each loop (times the model)",
        caption="a loop by the function that it is written in",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("", min_width=20)
    for row in rows:
        table.add_column(row["name"], justify="right")
    for place in dict.fromkeys(place for row in rows for place in row["places"]):
        cells = []
        for row in rows:
            kernels, models = row["places"].get(place), row["models"].get(place, 0)
            often = f" ({models:g})" if models else ""
            cells.append("" if kernels is None else f"{kernels:,}{often}")
        table.add_row(place, *cells)
    return table
