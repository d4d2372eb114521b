"""What memory a curvature product of a recurrent network needs, by length and way.

    python -m benchmarks memory

Temporary memory, as XLA plans it, of a program that linearises the network and
multiplies by G in a loop, as conjugate gradients do; parameters, data and results are
not in it. Seconds are of one product of that loop, without the linearisation.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options
from benchmarks.history import write_json
from benchmarks.problem import machine
from hfjax import scan

_FEATURES = 2
_FEW, _MANY = 2, 10  # products of the two loops whose difference is timed

Program = Callable[[Any, Any, tuple, int], Any]

_PARTS = 10
"""Microbatches."""


class Way(NamedTuple):
    """How to make do with less memory.

    Attributes:
      scan: over time: keeps all states, or those at multiples of ⌈√T⌉.
      parts: microbatches, in number.
      once: whether all of them are linearised once, or anew in each product.
    """

    scan: Callable
    parts: int = 1
    once: bool = False


WAYS = {
    "plain": Way(jax.lax.scan),
    "√T checkpointed": Way(scan.checkpointed),
    "microbatches, linearised anew": Way(jax.lax.scan, _PARTS),
    "microbatches, linearised once": Way(jax.lax.scan, _PARTS, once=True),
    "√T checkpointed microbatches": Way(scan.checkpointed, _PARTS),
}
"""What is compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--units", type=options.count, default=100, help="hidden; default: 100")
    add("--cases", type=options.count, default=100, help="sequences; default: 100")
    add(
        "--steps",
        type=options.count,
        nargs="+",
        default=[64, 256, 1024],
        help="lengths of the sequences; default: 64 256 1024",
    )
    add("--rounds", type=options.count, default=3, help="of timing; default: 3")
    add("--out", default="runs/memory.json", help="default: runs/memory.json")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if the numbers cannot be written.
    """
    console, path, rows = Console(), Path(args.out), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except OSError as error:
        return options.refuse("memory", error)
    with console.status("compiling and timing"):
        for steps in args.steps:
            for way in WAYS:
                case = {"steps": steps, "way": way}
                program, inputs = products(way, steps, args.units, args.cases)
                case["temporary_bytes"] = temporary_bytes(program, inputs)
                case["seconds"] = product_seconds(program, inputs, args.rounds)
                rows.append(case)
    setup = {"units": args.units, "cases": args.cases, "rounds": args.rounds}
    write_json(path, {**setup, **machine(), "rows": rows})
    console.print(_table(rows, args.units, args.cases))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def products(way: str, steps: int, units: int, cases: int) -> tuple[Program, tuple]:
    """Build the program that is measured.

    Args:
      way: of `WAYS`.
      steps: T.
      units: hidden tanh units.
      cases: sequences in the batch.

    Returns:
      `(params, v, batch, count) -> Gᶜᵒᵘⁿᵗ v`, each product normalised, and its first
      three arguments.
    """

    def model_fn(params: dict, inputs: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
            return h, h @ params["out"]

        first = jnp.broadcast_to(params["h0"], (len(inputs), units))
        return scan_over(step, first, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)

    scan_over, parts, once = WAYS[way]
    objective = hfjax.Objective(
        model_fn,
        hfjax.losses.squared_error(),
        microbatch_size=None if parts == 1 else max(1, cases // parts),
        linearize_once=once,
    )

    def program(params: dict, v: dict, batch: tuple, count: int) -> dict:
        product = hfjax.curvature.ggn(objective, params, batch)

        def normalised(_: int, v: dict) -> dict:
            v = product(v)
            size = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(v)) ** 0.5
            return jax.tree.map(lambda leaf: leaf / size, v)

        return jax.lax.fori_loop(0, count, normalised, v)

    init = hfjax.initializers.sparse(scale=15**-0.5)
    shapes = {"in": (_FEATURES, units), "recurrent": (units, units), "out": (units, 1)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    float32 = jnp.float32
    params = {
        name: init(key, shape, float32)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["h0"] = jnp.zeros(units, float32)
    inputs = jax.random.normal(jax.random.key(1), (cases, steps, _FEATURES), float32)
    batch = inputs, jnp.zeros((cases, steps, 1), float32)
    return program, (params, jax.tree.map(jnp.ones_like, params), batch)


def temporary_bytes(program: Program, inputs: tuple) -> int:
    """Ask XLA what a program needs at most beside its arguments and results.

    Args:
      program: of `products`.
      inputs: its first three arguments.

    Returns:
      Bytes.

    Example:
      All states of a long sequence are more than twice those that are kept:

      >>> plain, kept = (
      ...     temporary_bytes(*products(way, steps=100, units=9, cases=9))
      ...     for way in ("plain", "√T checkpointed")
      ... )
      >>> plain > 2 * kept
      True
    """
    compiled = jax.jit(program, static_argnums=3).lower(*inputs, _MANY).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        msg = f"XLA says nothing of memory on {jax.devices()[0].device_kind}."
        raise RuntimeError(msg)
    return analysis.temp_size_in_bytes


def product_seconds(program: Program, inputs: tuple, rounds: int) -> float:
    """Time one product, as the difference of many and few.

    Args:
      program: of `products`.
      inputs: its first three arguments.
      rounds: of timing, of which the median counts.

    Returns:
      Seconds.
    """
    loop = jax.jit(program)  # The count is traced: one program, run for both.

    def seconds(count: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(loop(*inputs, count))
        return time.perf_counter() - start

    seconds(1)  # Compiles.
    return statistics.median(
        (seconds(_MANY) - seconds(_FEW)) / (_MANY - _FEW) for _ in range(rounds)
    )


def _table(rows: list[dict[str, Any]], units: int, cases: int) -> Table:
    table = Table(
        title=f"Products with G: {units} tanh units, {cases} sequences",
        caption="Temporary memory of the linearised network and a loop of products",
        box=SIMPLE_HEAD,
    )
    table.add_column("T", justify="right")
    table.add_column("way")
    table.add_column("MB", justify="right")
    table.add_column("seconds a product", justify="right")
    for row in rows:
        megabytes = row["temporary_bytes"] / 1e6
        table.add_row(
            str(row["steps"]), row["way"], f"{megabytes:.2f}", f"{row['seconds']:.4f}"
        )
    return table
