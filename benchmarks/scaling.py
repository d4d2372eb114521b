"""What an update sends, computes and holds on more devices: of compiled programs.

    python -m benchmarks scaling

The devices are virtual ones of a CPU, and nothing is run: XLA's own account of the
programs that it has compiled is held against the formulas of
`benchmarks.scaling_model`. docs/scaling.md explains them, and what they predict.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import hfjax
from benchmarks import options, scaling_machines, scaling_tables
from benchmarks.history import write_json
from benchmarks.problem import machine
from benchmarks.scaling_programs import (
    LAYOUTS,
    REPLICATED,
    SCANNED,
    SHARDED,
    Network,
    Program,
    compile_product,
    compile_update,
    mesh_of,
    solver,
)

_KEEPS = {"best": hfjax.iterates.best(), "grid": hfjax.iterates.grid()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--width", type=options.count, default=512, help="of layers; default: 512")
    add("--layers", type=options.count, default=8, help="in number; default: 8")
    add(
        "--cases",
        type=options.count,
        default=512,
        help="on each device for weak scaling, on all for memory; default: 512",
    )
    add(
        "--devices",
        type=options.count,
        nargs="+",
        default=[1, 2, 4, 8],
        help="how many; default: 1 2 4 8",
    )
    add("--iterations", type=options.count, default=50, help="of CG; default: 50")
    add("--out", default="runs/scaling.json", help="default: runs/scaling.json")


def run(args: argparse.Namespace) -> int:
    """Compile, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if there are too few devices, or the numbers cannot be
      written.
    """
    console, path = Console(), Path(args.out)
    network, most = Network(args.width, args.layers), max(args.devices)
    try:
        _provide(most)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except (OSError, RuntimeError) as error:
        return options.refuse("scaling", error)
    compiled = functools.cache(functools.partial(compile_one, network))
    rows: dict[str, list[dict[str, Any]]] = {"traffic": [], "weak": [], "memory": []}

    for layout in LAYOUTS:
        with console.status(f"compiling for {most} devices, {layout}"):
            for what in ("product", "update"):
                one = compiled(what, layout, (most,), most * args.cases)
                rows["traffic"].append({"what": what, "layout": layout, "of": one})
    console.print(scaling_tables.traffic(rows["traffic"], network, most))
    console.print(
        scaling_tables.totals(rows["traffic"], network, most, args.iterations)
    )

    for layout in (REPLICATED, SHARDED):
        for devices in args.devices:
            with console.status(f"compiling for {devices} devices, {layout}"):
                cases = devices * args.cases
                of = [
                    compiled(what, layout, (devices,), cases)
                    for what in ("product", "update")
                ]
            row = {"layout": layout, "devices": devices, "product": of[0]}
            rows["weak"].append({**row, "update": of[1]})
    console.print(scaling_tables.weak(rows["weak"], network, args.cases))

    meshes: list[tuple[int, ...]] = [(devices,) for devices in args.devices]
    if most > 2 and most % 2 == 0:
        meshes.append((most // 2, 2))
    for sizes in meshes:
        for layout in (SHARDED, SCANNED):
            with console.status(f"compiling for {sizes} devices, {layout}"):
                row = {"layout": layout, "mesh": sizes}
                for keep in _KEEPS:
                    row[keep] = compiled("update", layout, sizes, args.cases, keep)
            rows["memory"].append(row)
    console.print(scaling_tables.memory(rows["memory"], network, args.cases))
    console.print(scaling_machines.predictions())
    write_json(path, {**network._asdict(), **vars(args), **machine(), **plain(rows)})
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def compile_one(
    network: Network,
    what: str,
    layout: str,
    sizes: tuple[int, ...],
    cases: int,
    keep: str | None = None,
) -> Program:
    """Compile a product, or an update.

    Args:
      network: the model.
      what: `"product"`, or `"update"`.
      layout: of `benchmarks.scaling_programs`.
      sizes: of the mesh.
      cases: on all devices.
      keep: the iterates that CG keeps, `"best"` or `"grid"`, of an update of the
        report's without a preconditioner; `None` is one with the diagonal. But where
        layers are scanned over there is never one: the diagonal would form the
        gradients of cases.

    Returns:
      What XLA says of it.
    """
    mesh = mesh_of(*sizes)
    if what == "product":
        return compile_product(network, layout, mesh, cases)
    options: dict[str, Any] = {}
    if keep is not None:
        options["solver"] = solver(_KEEPS[keep])
    if keep is not None or layout == SCANNED:
        options["preconditioner"] = None
    return compile_update(network, layout, mesh, cases, **options)


def plain(tree: Any) -> Any:
    """Turn named tuples into JSON's types.

    Args:
      tree: of dictionaries, lists and named tuples.

    Returns:
      The tree without the last.
    """
    if hasattr(tree, "_asdict"):
        return plain(tree._asdict())
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list) else tree


def _provide(devices: int) -> None:
    """Make virtual devices, unless JAX has started with others."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # It has.
        pass
    if jax.device_count() < devices:
        msg = f"{devices} devices are needed, JAX has {jax.device_count()}"
        raise RuntimeError(msg)
