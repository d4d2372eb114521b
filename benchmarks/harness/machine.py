"""The machine: what it is, how fast it is just now, and how long Python has run."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import benchmarks
import hfjax

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""By name: the clock on the wall, and the seconds of all threads of this process."""

_SIDE = 1024
_PRODUCTS = 5


class Taken(NamedTuple):
    """How long something took.

    Attributes:
      wall: seconds.
      processor: seconds of all threads together.
    """

    wall: float = 0.0
    processor: float = 0.0


def timed(call: Callable[[], Any]) -> tuple[Any, Taken]:
    """Call a function, and wait for its results.

    Returns:
      What it returned, and how long it took.
    """
    wall, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    taken = time.perf_counter() - wall, time.process_time() - processor
    return result, Taken(*taken)


def compile_ahead(fn: Callable[..., Any], *args: Any) -> tuple[Any, Taken]:
    """Trace and compile a function for arguments like these.

    Returns:
      The compiled function, and how long that took.
    """
    return timed(lambda: jax.jit(fn).lower(*args).compile())


def since_python_started() -> Taken:
    """Return for how long this process has run.

    On Linux the kernel says when the process began. Elsewhere the time starts when
    `benchmarks` is imported, which misses the start of the interpreter itself.
    """
    imported = time.perf_counter() - benchmarks.IMPORTED
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        wall = time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (AttributeError, LookupError, OSError, ValueError):
        wall = imported
    # A sandbox may give the kernel's times on another scale than the clock's.
    plausible = imported <= wall < imported + 60
    return Taken(wall if plausible else imported, time.process_time())


def describe() -> dict[str, Any]:
    """Describe device, processors and versions in JSON's types."""
    return {
        "device": jax.devices()[0].device_kind,
        "processors": os.cpu_count(),
        "jax": jax.__version__,
        "hfjax": hfjax.__version__,
    }


def probe() -> float:
    """Time a product of two 1,024 × 1,024 matrices: the median of five.

    By the clock on the wall, so that other work on the machine shows.
    """
    product, matrix = _product()
    return statistics.median(
        timed(lambda: product(matrix))[1].wall for _ in range(_PRODUCTS)
    )


@functools.cache
def _product() -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Compile the product, and compute it once."""
    matrix = jnp.ones((_SIDE, _SIDE), jnp.float32)
    compiled, _ = compile_ahead(lambda x: x @ x, matrix)
    jax.block_until_ready(compiled(matrix))
    return compiled, matrix
