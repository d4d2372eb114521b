"""The path that a step is taken along: θ + αδ + α²c, straight where there is no c."""

from typing import NamedTuple

import jax

from hfjax import _tree
from hfjax._types import Tree


class Solution(NamedTuple):
    """What a solver comes to with some λ.

    Attributes:
      step: δ, which lowers M.
      model: M(δ), of the run's own λ.
      undamped: M(δ) without any λ.
      correction: c, like δ, added to it before f is evaluated; no part of M. `None` is 0.
    """

    step: Tree
    model: jax.Array
    undamped: jax.Array
    correction: Tree | None = None


def along(alpha: jax.Array, step: Tree, correction: Tree | None) -> Tree:
    """Return αδ + α²c; its slope at α = 0 is δ's.

    Args:
      alpha: α.
      step: δ.
      correction: c, or `None`.
    """
    scaled = _tree.scale(alpha, step)
    return scaled if correction is None else _tree.axpy(alpha**2, correction, scaled)


def end(step: Tree, correction: Tree | None) -> Tree:
    """Return δ + c: the path's end, at α = 1.

    Args:
      step: δ.
      correction: c, or `None`.
    """
    return step if correction is None else _tree.add(step, correction)
