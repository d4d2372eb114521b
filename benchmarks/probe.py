"""A probe of the machine: how long a fixed matrix product takes just now."""

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.racers import compile_ahead

_SIDE = 1024
_PRODUCTS = 5


def seconds_of_a_product() -> float:
    """Time a product of two 1,024 × 1,024 matrices: the median of five.

    By the clock on the wall: what else runs on the machine shows in it.
    """
    product, matrix = _product()
    times = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@functools.cache
def _product() -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    """Compile the product, and do it once."""
    matrix = jnp.ones((_SIDE, _SIDE), jnp.float32)
    compiled, _ = compile_ahead(lambda x: x @ x, matrix)
    jax.block_until_ready(compiled(matrix))
    return compiled, matrix
