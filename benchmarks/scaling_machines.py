"""Predicts how long an iteration takes on machines that were not at hand.

From the formulas of `benchmarks.scaling_model` and the figures of the machines' makers.
"""

from typing import NamedTuple

from rich.table import Table

from benchmarks.scaling_model import BYTES, Elements, product_elements, update_vectors
from benchmarks.scaling_tables import new_table

CG_PASSES = 28
"""Vectors of n that a CG iteration reads or writes, beside the product: as compiled for
a CPU, with the default preconditioner, 26 with `hfjax.iterates.grid`, 29 with `best`."""

_ADAM_PASSES = 7
"""Of a step of Adam: reads θ, g, m and v; writes θ, m and v."""

MATRIX_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.8
"""What is assumed to be reached of the peaks that makers state."""


class Chip(NamedTuple):
    """A device, by its maker's figures.

    Attributes:
      name: of it.
      flops: of matrix products, a second, in the precision that is used.
      memory_rate: bytes a second.
      link_rate: bytes a second that it can send to the others.
    """

    name: str
    flops: float
    memory_rate: float
    link_rate: float


# TF32, dense; NVLink's 900 GB/s are both ways.
H200 = Chip("H200", 495e12, 4.8e12, 450e9)
# float32 by three passes in bfloat16; links are 1,200 GB/s both ways.
V5P = Chip("v5p", 459e12 / 3, 2.765e12, 600e9)


class Seconds(NamedTuple):
    """Predicted seconds of one thing on each of D devices.

    Attributes:
      matrices: of the matrix products.
      vectors: of reading and writing vectors of n.
      links: of collectives.
    """

    matrices: float
    vectors: float
    links: float

    @property
    def total(self) -> float:
        """Of all, one after another."""
        return sum(self)


def iteration_seconds(
    chip: Chip,
    devices: int,
    parameters: float,
    case_flops: float,
    cases: float,
    layout: str = "replicated",
) -> Seconds:
    """Predict a CG iteration: a product, its collectives, and CG's vectors.

    Args:
      chip: a device.
      devices: D.
      parameters: n.
      case_flops: c.
      cases: b, on all devices together.
      layout: of `benchmarks.scaling_programs`.

    Returns:
      The seconds.
    """
    sharded = layout.startswith("FSDP")
    held = parameters / devices if sharded else parameters
    passes = 6 if layout == "FSDP, scan" else 4  # Two to compute activations again.
    elements = product_elements(parameters, layout)
    return Seconds(
        matrices=passes * case_flops * cases / devices / (chip.flops * MATRIX_SHARE),
        vectors=CG_PASSES * BYTES * held / (chip.memory_rate * MEMORY_SHARE),
        links=elements.wire_bytes(devices, scattered=sharded)
        / (chip.link_rate * LINK_SHARE),
    )


def gradient_seconds(
    chip: Chip, devices: int, parameters: float, case_flops: float, cases: float
) -> Seconds:
    """Predict a step of Adam, parameters replicated: a gradient and its all-reduce.

    Args:
      chip: a device.
      devices: D.
      parameters: n.
      case_flops: c.
      cases: b, on all devices together.

    Returns:
      The seconds.
    """
    return Seconds(
        matrices=3 * case_flops * cases / devices / (chip.flops * MATRIX_SHARE),
        vectors=_ADAM_PASSES * BYTES * parameters / (chip.memory_rate * MEMORY_SHARE),
        links=Elements(parameters).wire_bytes(devices) / (chip.link_rate * LINK_SHARE),
    )


def hidden_cases(
    chip: Chip, devices: int, parameters: float, case_flops: float
) -> float:
    """Return the b at which a product's flops take as long as its all-reduce.

    Args:
      chip: a device.
      devices: D.
      parameters: n.
      case_flops: c.
    """
    one = iteration_seconds(chip, devices, parameters, case_flops, 1.0)
    return one.links / one.matrices


def predictions() -> Table:
    """Tabulate predictions for two machines and two models.

    Returns:
      The table.
    """
    table = new_table(
        "Predictions: a CG iteration, in ms",
        f"{MATRIX_SHARE:.0%} of peak flops, {MEMORY_SHARE:.0%} of peak rates; nothing "
        "overlaps. Adam: its links' share. GB: of vectors, with `iterates.best`.",
        ("machine", "n", "layout"),
        ("cases", "matrices", "vectors", "links", "share", "Adam", "GB"),
    )
    for chip, devices in ((H200, 8), (V5P, 1024)):
        for name, parameters in (("25 M", 25e6), ("1.5 G", 1.5e9)):
            for layout in ("replicated", "FSDP, scan"):
                for power in (13, 16, 20):
                    sizes = (chip, devices, parameters, 2 * parameters, 2**power)
                    hf = iteration_seconds(*sizes, layout)
                    adam = gradient_seconds(*sizes)
                    table.add_row(
                        f"{devices:,} {chip.name}",
                        name,
                        layout,
                        f"2^{power}",
                        *(f"{1e3 * part:.3g}" for part in hf),
                        f"{hf.links / hf.total:.0%}",
                        f"{adam.links / adam.total:.0%}",
                        f"{vector_gigabytes(parameters, devices, layout):.3g}",
                    )
    return table


def vector_gigabytes(
    parameters: float, devices: int, layout: str, kept: int = 1
) -> float:
    """Return the memory of an update's vectors on each device, in GB.

    Args:
      parameters: n.
      devices: D.
      layout: of `benchmarks.scaling_programs`.
      kept: iterates that CG keeps.
    """
    held = parameters / devices if layout.startswith("FSDP") else parameters
    return update_vectors(kept) * BYTES * held / 1e9
