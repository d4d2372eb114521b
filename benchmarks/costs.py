"""What each option of an update costs in memory and in compiling.

    python -m benchmarks costs

An update is compiled as a user compiles it, the gradient with it and the data as an
argument, and never run: what XLA plans does not depend on numbers. Each set-up is traced
from nothing.

A vector has as many numbers as there are parameters. Temporary memory comes besides
arguments and results; `saved` are the results that take an argument's place, as
parameters and state are donated. Seconds are of the processor, all its cores together:
JAX's own, before XLA is given the program, and XLA's. Those are about so much for each
kernel: a fusion of the program.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options
from benchmarks.data import PIXELS
from benchmarks.history import write_json
from benchmarks.network import autoencoder, mirrored
from benchmarks.problem import SETUPS, machine
from hfjax import cg, damping, iterates, krylov, preconditioners, recipes, trust_region

Build = Callable[[hfjax.Objective], optax.GradientTransformationExtraArgs]


class Option(NamedTuple):
    """A set-up to compile.

    Attributes:
      build: `objective -> transformation`.
      microbatches: of the data, in number.
      donated: whether parameters and state are.
    """

    build: Build
    microbatches: int = 1
    donated: bool = True


def _usual(**given: Any) -> Build:
    return functools.partial(hfjax.hessian_free, **given)


def _keeping(keep: iterates.Keep) -> Build:
    return _usual(solver=cg.conjugate_gradient(keep=keep))


def _within_a_region(objective: hfjax.Objective) -> Any:
    # Not at import: a radius is an array, and `multihost` is not to be first with JAX.
    return hfjax.hessian_free(
        objective,
        solver=trust_region.steihaug_toint(),
        damping=trust_region.radius(),
    )


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
    "recipes.martens2010": Option(recipes.martens2010),
}
"""What is compiled: `hessian_free` as it comes, with some things changed, and a recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--cases", type=options.count, default=2000, help="images; default: 2000")
    add(
        "--layers",
        type=options.layers,
        default=SETUPS["curves"].encoder,
        help="sizes from the pixels to the code; default: those of curves",
    )
    add("--only", default="", help="set-ups with this in their name; default: all")
    add("--out", default="runs/costs.json", help="default: runs/costs.json")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if the numbers cannot be written or nothing is asked for.
    """
    console, path, rows = Console(), Path(args.out), []
    names = [name for name in OPTIONS if args.only in name]
    if not names:
        msg = f"--only: no set-up has {args.only!r} in its name"
        return options.refuse("costs", ValueError(msg))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except OSError as error:
        return options.refuse("costs", error)
    with console.status("compiling"):
        for name in names:
            found = costs(OPTIONS[name], args.layers, args.cases)
            rows.append({"name": name, **found})
            write_json(path, {"arguments": vars(args), **machine(), "rows": rows})
    console.print(_table(rows, args.layers, args.cases))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def costs(option: Option, encoder: tuple[int, ...], cases: int) -> dict[str, float]:
    """Compile an update of an autoencoder, and look at the program.

    Args:
      option: the set-up.
      encoder: sizes from the pixels to the code.
      cases: images.

    Returns:
      Bytes, counts and processor seconds, by name.
    """
    jax.clear_caches()
    init, model_fn = autoencoder(encoder)
    objective = hfjax.Objective(
        model_fn,
        hfjax.losses.sigmoid_cross_entropy(),
        microbatch_size=(
            None if option.microbatches == 1 else max(1, cases // option.microbatches)
        ),
    )
    tx = option.build(objective)

    def step(params: Any, state: Any, batch: tuple) -> tuple[Any, Any]:
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    images = jax.ShapeDtypeStruct((cases, PIXELS), jnp.float32)
    params = jax.eval_shape(init, jax.random.key(0))
    state = jax.eval_shape(tx.init, params)
    donated = ("params", "state") if option.donated else ()
    start = time.process_time()
    lowered = jax.jit(step, donate_argnames=donated).lower(
        params, state, (images, images)
    )
    handed = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        msg = f"XLA says nothing of programs on {jax.devices()[0].device_kind}."
        raise RuntimeError(msg)
    return {
        "vector_bytes": _bytes(params),
        "activation_bytes": cases * sum(mirrored(encoder)) * images.dtype.itemsize,
        "state_bytes": _bytes(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "saved_bytes": memory.alias_size_in_bytes,
        "instructions": len(re.findall(r"^ +(?:ROOT )?%\S+ = ", text, re.MULTILINE)),
        "kernels": len(re.findall(r" fusion\(", text)),
        "jax_seconds": handed - start,
        "xla_seconds": end - handed,
    }


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _table(rows: list[dict[str, Any]], encoder: tuple[int, ...], cases: int) -> Table:
    vector, activations = (
        rows[0][f"{name}_bytes"] / 2**20 for name in ("vector", "activation")
    )
    table = Table(
        title=f"Updates of {'-'.join(map(str, encoder))}, {cases:,} images",
        caption=f"temp., state, saved: vectors of {vector:.2f} MiB\n"
        f"in act.: the batch's activations, {activations:.2f} MiB\n"
        "HLO: instructions; JAX, XLA: processor seconds",
        box=SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("", min_width=20)
    for name in ("temp.", "in act.", "state", "saved", "HLO", "kernels", "JAX", "XLA"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        size = row["vector_bytes"]
        table.add_row(
            row["name"],
            f"{row['temporary_bytes'] / size:.1f}",
            f"{row['temporary_bytes'] / row['activation_bytes']:.1f}",
            f"{row['state_bytes'] / size:.1f}",
            f"{row['saved_bytes'] / size:.1f}",
            f"{row['instructions']:,}",
            f"{row['kernels']:,}",
            f"{row['jax_seconds']:.1f}",
            f"{row['xla_seconds']:.1f}",
        )
    return table
