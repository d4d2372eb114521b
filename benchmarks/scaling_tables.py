"""The tables of `python -m benchmarks scaling`."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import scaling_model as model
from benchmarks.scaling_programs import SCANNED, Network, Program
from benchmarks.scaling_traffic import BACKTRACKING, ITERATION, OUTSIDE, ROUND

_EVALUATIONS = 2  # iterates looked at, in the total of an update; and no step size more


def traffic(rows: Sequence[dict[str, Any]], network: Network, devices: int) -> Table:
    """Tabulate the collectives of programs by place.

    Args:
      rows: `what` is compiled, its `layout`, and the `Program` that it is `of`.
      network: the model.
      devices: in number.

    Returns:
      The table.
    """
    table = new_table(
        f"Collectives on each of {devices} devices, each time a place is run",
        f"n = {network.parameters:,} parameters; bytes of results over 4n.",
        ("", "layout", "where", "collectives"),
        ("reduced", "gathered"),
    )
    for row in rows:
        first = (row["what"], row["layout"])
        for place, moved in row["of"].traffic.items():
            counts = ", ".join(
                f"{n} {kind}" for kind, n in sorted(moved.counts.items())
            )
            amounts = (
                f"{amount / (4 * network.parameters):.4f}"
                for amount in (moved.reduced, moved.gathered)
            )
            table.add_row(*first, place, counts, *amounts)
            first = ("", "")
    return table


def totals(
    rows: Sequence[dict[str, Any]], network: Network, devices: int, iterations: int
) -> Table:
    """Tabulate what an update of so many iterations moves, and the formula.

    Args:
      rows: as for `traffic`.
      network: the model.
      devices: in number.
      iterations: of CG.

    Returns:
      The table.
    """
    table = new_table(
        f"An update of {iterations} CG iterations, {_EVALUATIONS} evaluations",
        "MB of results on each device; sent by rings, all-reduces as they are compiled.",
        ("layout",),
        ("collectives", "reduced", "formula", "gathered", "formula", "sent"),
    )
    times = {ROUND: 1, ITERATION: iterations, BACKTRACKING: _EVALUATIONS}
    for row in rows:
        if row["what"] != "update":
            continue
        found, layout = row["of"].traffic, row["layout"]
        runs = {place: times.get(place, int(place == OUTSIDE)) for place in found}
        count = sum(found[p].counts.total() * runs[p] for p in found)
        reduced = sum(found[p].reduced * runs[p] for p in found)
        gathered = sum(found[p].gathered * runs[p] for p in found)
        formula = model.update_elements(
            network.parameters,
            network.parameters / network.layers,
            layout,
            iterations=iterations,
            evaluations=_EVALUATIONS,
            diagonal=layout != SCANNED,
        )
        sent = model.Elements(reduced / 4, gathered / 4).wire_bytes(devices)
        amounts = (reduced, 4 * formula.reduced, gathered, 4 * formula.gathered, sent)
        table.add_row(layout, f"{count}", *(f"{x / 1e6:.2f}" for x in amounts))
    return table


def weak(rows: Sequence[dict[str, Any]], network: Network, cases: int) -> Table:
    """Tabulate the work of a device, for so many cases each.

    Args:
      rows: `layout`, `devices`, and the `Program`s of a `product` and an `update`.
      network: the model.
      cases: on each device.

    Returns:
      The table.
    """
    table = new_table(
        f"Weak scaling: {cases} cases on each device",
        "Of a device; each loop's body once. Formula: matrix products alone. Memory in "
        "vectors of n, "
        f"{4 * network.parameters / 1e6:.2f} MB.",
        ("layout",),
        (
            "devices",
            "product Mflop",
            "over formula",
            "update Mflop",
            "over formula",
            "MB accessed",
            "temp",
            "held",
        ),
    )
    flops = dense(network)
    of_update = model.update_flops(
        flops,
        gradient_cases=cases,
        curvature_cases=cases,
        evaluation_cases=cases,
        iterations=1,
        evaluations=2,  # One in each loop.
        shared=True,
    )
    of_product = cases * (flops.whole + flops.product)
    for row in rows:
        product, update = row["product"], row["update"]
        table.add_row(
            row["layout"],
            f"{row['devices']}",
            f"{product.flops / 1e6:.0f}",
            f"{product.flops / of_product:.3f}",
            f"{update.flops / 1e6:.0f}",
            f"{update.flops / of_update:.3f}",
            f"{update.accessed / 1e6:.0f}",
            *_vectors(update, network),
        )
    return table


def memory(rows: Sequence[dict[str, Any]], network: Network, cases: int) -> Table:
    """Tabulate the memory of an update by devices.

    Args:
      rows: `layout`, `mesh`, and the `Program`s that keep the `best` iterate and a
        `grid`.
      network: the model.
      cases: on all devices.

    Returns:
      The table.
    """
    table = new_table(
        f"Memory of an update on each device, {cases} cases shared out",
        "In vectors of n: temporaries, and arguments and results. No preconditioner. "
        "Formula: CG's vectors alone. On 2 axes parameters lie over the second only.",
        ("layout", "mesh"),
        (
            "best: temp",
            "held",
            "sum",
            "formula",
            "grid: temp",
            "held",
            "sum",
            "formula",
        ),
    )
    for row in rows:
        mesh = " × ".join(map(str, row["mesh"]))
        cells = []
        for keep, kept in (("best", 1), ("grid", 16)):
            one = row[keep]
            total = (one.temporary + one.held) / (4 * network.parameters)
            vectors = model.update_vectors(kept, diagonal=False) / row["mesh"][-1]
            cells += [*_vectors(one, network), f"{total:.2f}", f"{vectors:.2f}"]
        table.add_row(row["layout"], mesh, *cells)
    return table


def dense(network: Network) -> model.Dense:
    """Count the flops of a network's forward pass on a case.

    Args:
      network: the model.

    Returns:
      The counts.
    """
    first = 2 * network.width**2
    return model.Dense(network.layers * first, first)


def _vectors(program: Program, network: Network) -> tuple[str, str]:
    unit = 4 * network.parameters
    return f"{program.temporary / unit:.2f}", f"{program.held / unit:.2f}"


def new_table(
    title: str, caption: str, names: Sequence[str], numbers: Sequence[str]
) -> Table:
    """Make a table without rows.

    Args:
      title: above it.
      caption: below it.
      names: of columns of words.
      numbers: names of columns of numbers.

    Returns:
      The table.
    """
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
