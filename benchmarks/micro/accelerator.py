"""Everything that needs an accelerator, in one call of ten minutes, and one table of it.

    python -m benchmarks accelerator
    python -m benchmarks accelerator --data-dir DIR --minutes 10 --out runs/accelerator
    JAX_PLATFORMS=cpu python -m benchmarks accelerator --small --minutes 7
    python -m benchmarks accelerator --speeds
    JAX_PLATFORMS=cpu python -m benchmarks accelerator --compile-only H200.textproto

Other commands do the work, each in a process of its own, the most telling first: `product`,
`costs` (also with `--shares` and `--exact`), and `compare` on the autoencoder beside Adam
and on the equations that are too large for a CPU. What fails, or is not done when the
minutes are over, is told in the table, and the rest goes on. Each leaves its own file in
the folder. `--small` has sizes for a CPU, to see that the script runs.

`--speeds` measures what the rest is to be held against: products of two matrices by
precision, an iteration of a loop that hardly computes, and decompositions of the sizes
that Kronecker factors have.

`--compile-only` needs no accelerator: every set-up of `costs` is compiled for the GPU that
the file describes (see `costs --gpu`), and the table has its kernels outside of loops and in
an iteration of conjugate gradients, calls of libraries, temporary memory, seconds of XLA,
and the functions that most kernels come from.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.machine import compile_ahead, timed
from benchmarks.harness.table import rich_table
from benchmarks.suites.mnist import FILE

_ROUNDS = 5
_TRIPS = 1000  # of the loop that hardly computes
_FACTORS = (785, 1001)  # sizes of Kronecker factors of the autoencoders
_IMAGES, _EQUATIONS = 0.06, 0.03
"""Of the time, for each run of the two comparisons: four, for Adam has three rates, and
three. Half of the time goes to compiling and to the other commands."""


COMPILED = ("readme", "poisson", "recurrent", "autoencoder")
"""The problems of `costs` whose set-ups are compiled for a GPU, the cheapest first."""


class Step(NamedTuple):
    """A command to run.

    Attributes:
      name: of its row, and of what it writes.
      words: of the command, without where to write.
      read: what the table shows of what it wrote.
    """

    name: str
    words: list[str]
    read: Callable[[Any], dict[str, str]] = lambda document: {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add(
        "--minutes", type=cli.positive, default=10.0, help="for everything; default: 10"
    )
    add("--data-dir", help="of mnist.npz; without it, 20,000 curves")
    add("--small", action="store_true", help="sizes for a CPU")
    add("--compile-only", metavar="FILE", help="for the GPU that a file describes")
    add("--speeds", action="store_true", help="only what the device is capable of")
    add("--out", default="runs/accelerator", help="default: runs/accelerator")


def run(args: argparse.Namespace) -> int:
    """Run the commands, and put together what they found."""
    console, folder = Console(), Path(args.out)
    path = cli.output_file(str(folder / "accelerator.json"))
    if args.speeds:
        found = speeds(256 if args.small else 4096)
        write_json(path, {**machine.describe(), "speeds": found})
        console.print(rich_table([["", ""], *found.items()], title="This device"))
        return 0
    ends, rows = time.monotonic() + 60 * args.minutes, []
    todo = steps(args.small, args.data_dir, 60 * args.minutes)
    if args.compile_only is not None:
        todo = compilations(args.compile_only, args.small)
    for step in todo:
        rows.append(taken(step, folder, ends - time.monotonic()))
        write_json(path, {"arguments": vars(args), "rows": rows})
        console.print(rich_table(_cells(rows), "Seconds are those of the process."))
    console.print(f"Written to {folder}", highlight=False, soft_wrap=True)
    return 0


def steps(small: bool, data_dir: str | None, seconds: float) -> Iterator[Step]:
    """List the commands, the most telling first."""
    rounds = ["--rounds", "3"]
    cases = "100" if small else "10000"
    yield Step("speeds", ["accelerator", "--speeds"] + small * ["--small"], _of_speeds)
    yield Step("product", ["product", "--cases", cases, *rounds], _of_product)
    yield Step("costs", ["costs", "--only", "default"], _of_costs)
    shown = "200" if small else "20000"
    yield Step("shares", ["costs", "--shares", "--cases", shown, *rounds], _of_shares)
    exact = "poisson2d" if small else "poisson3d"
    yield Step("exact", ["costs", "--exact", exact, *rounds], _of_exact)
    each = max(1, round(_IMAGES * seconds))
    images = ["--problem", "curves1000" if small else "curves20000"]
    if data_dir is not None and (Path(data_dir) / FILE).exists() and not small:
        images = ["--problem", "mnist", "--data-dir", data_dir]
    compared = ["--optimizers", "hfjax,adam", "--seconds", str(each)]
    yield Step("images", ["compare", "--suite", "images", *images, *compared])
    problems = "poisson2d" if small else "20,21,29"
    each = max(1, round(_EQUATIONS * seconds))
    compared = ["--optimizers", "hfjax", "--seconds", str(each)]
    words = ["compare", "--suite", "equations", "--problem", problems, *compared]
    yield Step("equations", words)


def compilations(description: str, small: bool) -> Iterator[Step]:
    """List the commands that compile every set-up for a GPU that need not be there."""
    which = ["--only", "default" if small else ""]
    for problem in ("readme",) if small else COMPILED:
        words = ["costs", "--problem", problem, "--gpu", description, *which]
        yield Step(f"compiled-{problem}", words, _of_programs)


def taken(step: Step, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a command in its own process, for so many seconds at most.

    Returns:
      `name`, `command`, `seconds`, and `found`, or `why` there is nothing.
    """
    is_folder = step.words[0] in ("compare", "accelerator")
    out = folder / (step.name if is_folder else f"{step.name}.json")
    command = [sys.executable, "-m", "benchmarks", *step.words, "--out", str(out)]
    row: dict[str, Any] = {"name": step.name, "command": " ".join(step.words)}
    if seconds <= 0:
        return {**row, "seconds": 0.0, "why": "the time was over"}
    start = time.monotonic()
    try:
        ended = subprocess.run(
            command, timeout=seconds, check=False, stderr=subprocess.PIPE, text=True
        )
        why = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
        row |= {"why": why} if ended.returncode else {"found": _read(step, out)}
    except subprocess.TimeoutExpired:
        row["why"] = f"stopped after {seconds:.0f} s"
    return {**row, "seconds": time.monotonic() - start}


def speeds(side: int) -> dict[str, str]:
    """Measure what the device is capable of.

    Args:
      side: of the matrices that are multiplied.
    """
    found = {}
    of = [("float32", "highest"), ("float32", "default"), ("bfloat16", "default")]
    for dtype, precision in [*of, ("float64", "highest")]:
        with jax.enable_x64(dtype == "float64"):
            matrix = jnp.ones((side, side), dtype)
            seconds = _least(
                lambda x, precision=precision: jnp.matmul(x, x, precision=precision),
                matrix,
            )
        name = f"{dtype}, precision {precision}"
        found[name] = f"{2 * side**3 / seconds / 1e12:.3g} Tflops per second"

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, _TRIPS, lambda _, x: jnp.sin(x), x)

    trip = _least(loop, jnp.ones(16)) / _TRIPS
    found["an iteration of one small kernel"] = f"{1e6 * trip:.3g} µs"
    for size in _FACTORS:
        matrix = 2 * jnp.eye(size) + 1 / size
        for name, fn in (("Cholesky factor", jnp.linalg.cholesky), ("eigh", _vectors)):
            found[f"{name}, {size}"] = f"{1000 * _least(fn, matrix):.3g} ms"
    return found


def _vectors(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.eigh(matrix)[1]


def _least(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Return the seconds of the fastest of some calls."""
    compiled, _ = compile_ahead(fn, x)
    jax.block_until_ready(compiled(x))
    return min(timed(lambda: compiled(x))[1].wall for _ in range(_ROUNDS))


def _read(step: Step, out: Path) -> dict[str, str]:
    if step.words[0] == "compare":
        return {"tables and pictures": str(out)}
    file = out / "accelerator.json" if out.is_dir() else out
    return step.read(json.loads(file.read_text()))


def _of_speeds(document: Any) -> dict[str, str]:
    return document["speeds"]


def _of_product(document: Any) -> dict[str, str]:
    limit = document["flop_limits"].get("product", float("nan"))
    return {
        "G v, in gradients": f"{document['in_gradients']['product']:.2f}, by flops {limit:.2f}",
        "an update, over its products": f"{document['update_over_its_products']:.2f}",
    }


def _of_costs(document: Any) -> dict[str, str]:
    (row,) = document["rows"]
    memory = row["temporary_bytes"] / row["vector_bytes"]
    return {
        "kernels, once": f"{row['places'].get('once', 0)}",
        "kernels, an iteration of CG": f"{row['places'].get('pcg.run', 0)}",
        "temporary memory": f"{memory:.1f} vectors",
        "to compile": f"{row['jax_seconds'] + row['xla_seconds']:.1f} processor seconds",
    }


def _of_programs(document: Any) -> dict[str, str]:
    found = {}
    for row in document["rows"]:
        places, calls = row["places"], row["kinds"].get("custom-call", 0)
        memory = row["temporary_bytes"] / 1e6
        found[row["name"]] = (
            f"{places.get('once', 0)} once, {places.get('pcg.run', 0)} in CG, "
            f"{row['kernels']} in all, {calls} calls, {memory:.1f} MB, "
            f"{row['xla_seconds']:.1f} s"
        )
    origins = document["rows"][0]["origins"]
    found["most of them"] = ", ".join(f"{f} {n} ({at})" for at, f, n in origins[:5])
    return found


def _of_shares(document: Any) -> dict[str, str]:
    parts = document["shares"].items()
    return {name: f"{100 * part['share']:.0f} %" for name, part in parts}


def _of_exact(document: Any) -> dict[str, str]:
    limits = document["limits"]
    return {
        part: f"{1000 * seconds:.1f} ms"
        + (f", by flops {1000 * limits[part]:.1f}" if part in limits else "")
        for part, seconds in document["seconds"].items()
    }


def _cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    cells = [["", "s", "", ""]]
    for row in rows:
        found = row.get("found") or {"": row.get("why", "")}
        heads = [(row["name"], f"{row['seconds']:.0f}")] + [("", "")] * (len(found) - 1)
        cells += [
            [*head, *pair] for head, pair in zip(heads, found.items(), strict=True)
        ]
    return cells
