"""What an update becomes on TPUs that need not be there: compiled, never run.

    JAX_PLATFORMS=cpu python -m benchmarks tpu --problem readme
    JAX_PLATFORMS=cpu python -m benchmarks tpu --only '' --layout replicated,fsdp
    JAX_PLATFORMS=cpu python -m benchmarks tpu --topology v5p:8x8x4 --only default
    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
        python -m benchmarks tpu --topology cpu

libtpu, a wheel, compiles on any machine: `pip install libtpu`. The examples of a batch are
divided among the devices; parameters and state are `replicated`, or divided too (`fsdp`).
For each set-up: whether it compiles, or what XLA says; processor seconds of JAX and of
XLA; the size of the program; memory in vectors of the parameters' size, and flops, both of
one device; collectives outside of loops + in loops, each counted once; and megabytes that
they leave on a device, outside of loops + each time that a loop runs. On a TPU XLA divides
some of them into steps, and each step counts. `--topology cpu` compiles for the CPUs that
this process has, virtual ones, where nothing is divided.
"""

import argparse
import math
import os
import re
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.table import rich_table
from benchmarks.micro import costs, programs
from benchmarks.micro.cost_problems import PROBLEMS, Problem
from benchmarks.micro.costs import Option
from hfjax import recipes, sample_space

AXIS = "cases"
LAYOUTS = ("replicated", "fsdp")
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_SMALL = 2**14
"""Leaves of fewer numbers are replicated in any layout."""

_WIDE = 160

_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")

OPTIONS = {
    **{name: option for name, option in costs.OPTIONS.items() if "donated" not in name},
    "recipes.curvature_guarded": Option(lambda f, **_: recipes.curvature_guarded(f)),
    "recipes.momentum_like": Option(lambda f, **_: recipes.momentum_like(f)),
    "sample_space.cholesky()": Option(costs.usual(solver=sample_space.cholesky())),
    "optax.adam": Option(
        lambda f, **_: optax.with_extra_args_support(optax.adam(1e-3))
    ),
}
USUAL = ("default", "preconditioner=None", "ten microbatches", "optax.adam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--problem", choices=tuple(PROBLEMS), default="readme", help="default: readme")
    add("--cases", type=cli.count, help="default: the problem's, for all devices")
    add("--topology", default="v5e:2x2", help="default: v5e:2x2, four chips")
    add(
        "--layout",
        type=lambda words: cli.listed(_layout, words),
        default=LAYOUTS[:1],
        help="replicated, fsdp, or both with a comma; default: replicated",
    )
    add("--only", help="set-ups with this in their name; default: " + ", ".join(USUAL))
    add("--out", default="runs/tpu.json", help="default: runs/tpu.json")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write down."""
    # Rows are long, which a file does not mind.
    console = Console(width=None if Console().is_terminal else _WIDE)
    rows: list[dict[str, Any]] = []
    devices = topology(args.topology)
    problem = fitted(args.problem, args.cases, len(devices))
    names = costs.chosen(OPTIONS, USUAL, problem, args.only)
    path = cli.output_file(args.out)
    mesh = Mesh(np.array(devices), (AXIS,))
    with console.status("compiling"):
        for layout in args.layout:
            for name in names:
                row = compiled(OPTIONS[name], problem, mesh, layout)
                rows.append({"name": name, "layout": layout, **row})
                document = {"arguments": vars(args), **machine.describe(), "rows": rows}
                write_json(path, document)
    title = f"{problem.title}; {args.topology}, {len(devices)} devices"
    console.print(rich_table(_cells(rows, problem), "of one device", title))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def topology(name: str) -> list[Any]:
    """Return the devices of a topology.

    Raises:
      RefusedError: if there is no such topology, or no libtpu.
    """
    if name == "cpu":
        return jax.devices("cpu")
    # Without these libtpu asks the network what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # libtpu raises of many kinds.
        msg = f"--topology {name}: {_line(error)} (it needs `pip install libtpu`)"
        raise cli.RefusedError(msg) from error
    return list(found.devices)


def fitted(name: str, cases: int | None, devices: int) -> Problem:
    """Build a problem with as many examples on every device."""
    problem = PROBLEMS[name](cases)
    found = len(jax.tree.leaves(problem.batch)[0])
    return PROBLEMS[name](found + -found % devices)


def compiled(
    option: Option, problem: Problem, mesh: Mesh, layout: str
) -> dict[str, Any]:
    """Compile an update for a mesh, and look at the program.

    Returns:
      What the table shows; or `why`, what XLA says if it does not compile.
    """

    def place(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
        return (
            _placed(params, mesh, layout),
            _placed(state, mesh, layout),
            _placed(batch, mesh, "examples"),
        )

    try:
        lowered = costs.lower(option, problem, place)
        start = time.process_time()
        program = lowered.program.compile()
        seconds = time.process_time() - start
    except Exception as error:  # Whatever it is, the table says it.
        return {"why": f"{type(error).__name__}: {_line(error)}"}
    memory, text = program.memory_analysis(), program.as_text()
    return {
        "jax_seconds": lowered.seconds,
        "xla_seconds": seconds,
        "program_bytes": memory.generated_code_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": program.cost_analysis().get("flops"),
        "collectives": collectives(text),
        "collective_bytes": sent(text),
    }


def collectives(text: str) -> dict[str, list[int]]:
    """Count collectives by kind: outside of loops, and in loops.

    Example:
      >>> collectives('''
      ... %body (p: f32[8]) -> f32[8] {
      ...   %p = f32[8]{0} parameter(0)
      ...   ROOT %r = f32[8]{0} all-reduce(%p), to_apply=%add
      ... }
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %g = (f32[1], f32[8]) all-gather-start(%x)
      ...   ROOT %w = f32[8]{0} while(%c), condition=%test, body=%body
      ... }
      ... ''')
      {'all-reduce': [0, 1], 'all-gather': [1, 0]}
    """
    around, found = programs.loop_of(text), Counter()
    for computation, _, opcode, _ in programs.instructions(text):
        found[opcode.removesuffix("-start"), around(computation) is not None] += 1
    counts = {kind: [found[kind, False], found[kind, True]] for kind in COLLECTIVES}
    return {kind: both for kind, both in counts.items() if any(both)}


def sent(text: str) -> list[int]:
    """Return the bytes that collectives leave on a device: outside of loops, and in loops.

    Example:
      >>> sent('''
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %g = (f32[2,3]{1,0}, bf16[4]{0}) all-reduce(%x, %y), to_apply=%add
      ... }
      ... ''')
      [32, 0]
    """
    around, found = programs.loop_of(text), [0, 0]
    for computation, shape, opcode, _ in programs.instructions(text):
        if opcode.removesuffix("-start") not in COLLECTIVES:
            continue
        arrays = _ARRAY.findall(shape)
        if opcode.endswith("-start"):  # Operands come first, then results.
            arrays = arrays[len(arrays) // 2 :]
        sizes = [
            math.prod(map(int, filter(None, dims.split(",")))) * _bits(dtype) // 8
            for dtype, dims in arrays
        ]
        found[around(computation) is not None] += sum(sizes)
    return found


def _bits(dtype: str) -> int:
    """Return how many bits of a number XLA's name of a dtype says; a truth value has 8."""
    digits = re.findall(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _placed(tree: Any, mesh: Mesh, layout: str) -> Any:
    """Say where arrays are: an axis of each divided among the devices, or none."""
    devices = mesh.size

    def axis_of(leaf: Any) -> int | None:
        if layout == "examples":
            return 0 if leaf.shape[0] % devices == 0 else None
        fits = [k for k, size in enumerate(leaf.shape) if size % devices == 0]
        if layout == "replicated" or leaf.size < _SMALL or not fits:
            return None
        return max(fits, key=lambda k: leaf.shape[k])

    def place(leaf: Any) -> Any:
        axis = axis_of(leaf)
        names = [] if axis is None else [None] * axis + [AXIS]
        return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*names)))

    return jax.tree.map(place, tree)


def _cells(rows: list[dict[str, Any]], problem: Problem) -> list[list[str]]:
    vector = costs.bytes_of(problem.params)
    cells = [["", "layout", "JAX, s", "XLA, s", "program, MB", "memory, vectors"]]
    cells[0] += ["flops", "sent, MB", "collectives"]
    for row in rows:
        cells.append([row["name"], row["layout"]])
        if "why" in row:
            cells[-1] += ["", "", "", "", "", "", row["why"]]
            continue
        counts = row["collectives"].items()
        words = ", ".join(f"{kind} {once}+{loops}" for kind, (once, loops) in counts)
        cells[-1] += [
            f"{row['jax_seconds']:.1f}",
            f"{row['xla_seconds']:.1f}",
            f"{row['program_bytes'] / 1e6:.1f}",
            f"{row['temporary_bytes'] / vector:.1f}",
            "" if row["flops"] is None else f"{row['flops']:.2g}",
            " + ".join(f"{x / 1e6:.3g}" for x in row["collective_bytes"]),
            words,
        ]
    return cells


def _layout(word: str) -> str:
    if word not in LAYOUTS:
        msg = f"must be one of {', '.join(LAYOUTS)}, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return word


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
