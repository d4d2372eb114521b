"""The images of a run on many devices: each is made where it is needed."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import data

AXIS = "cases"
"""The axis of the mesh that cases are shared out along."""

_BLOCK = 100  # images that are drawn together


def share_out(cases: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Make every device's share of the images where the device is.

    Args:
      cases: in all; what is missing to the same number on every device is padding.
      mesh: of the devices.

    Returns:
      The images, `[cases and padding, 784]`, and their weights, 0 for padding.
    """
    total = -(-cases // mesh.size) * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def images(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        return _draw(start, stop, cases)

    def weights(index: Any) -> np.ndarray:
        return (np.arange(total)[index] < cases).astype(np.float32)

    return (
        jax.make_array_from_callback((total, data.PIXELS), sharding, images),
        jax.make_array_from_callback((total,), sharding, weights),
    )


def _draw(start: int, stop: int, cases: int) -> np.ndarray:
    """Draw images `start` to `stop`, the same whoever draws them; blank from `cases`.

    The number of a block of them is its seed.
    """
    images = np.zeros((stop - start, data.PIXELS), np.float32)
    stop = min(stop, cases)
    for first in range(start - start % _BLOCK, stop, _BLOCK):
        block = data.curves(_BLOCK, 0, seed=first // _BLOCK).train
        low, high = max(first, start), max(min(first + _BLOCK, stop), start)
        images[low - start : high - start] = block[low - first : high - first]
    return images
