"""A differential equation that a network is to solve: points, objective and error."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks import pinn_operators as operators
from benchmarks.network import Layers
from benchmarks.pinn_equations import Equation


class Levels(NamedTuple):
    """The lowest error within the budget by optimizer; `None` if it was not run.

    Attributes:
      hf: PyTorchHessianFree, without a preconditioner.
      kfac: the better of KFAC and KFAC*.
      engd: energy natural gradient, with all of the matrix or its diagonal blocks;
        `None` where there was its diagonal only.
      lbfgs: PyTorch's.
      adam: the best learning rate of 50.
      sgd: the best learning rate and momentum of 50.
    """

    hf: float | None = None
    kfac: float | None = None
    engd: float | None = None
    lbfgs: float | None = None
    adam: float | None = None
    sgd: float | None = None

    def known(self) -> dict[str, float]:
        """Return those that there are, by name for people."""
        return {
            _WORDS[name]: level
            for name, level in self._asdict().items()
            if level is not None
        }


_WORDS = {
    "hf": "HF",
    "kfac": "KFAC",
    "engd": "ENGD",
    "lbfgs": "L-BFGS",
    "adam": "Adam",
    "sgd": "SGD",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network that is to solve an equation.

    Attributes:
      number: of the experiment; with `s` behind it the other problem of it.
      equation: with its solution.
      hidden: units of the tanh layers.
      budget: seconds that the runs of the logs had, on a GPU.
      levels: the lowest errors in the logs.
      interior: points inside.
      boundary: points where the solution is given.
      redrawn: steps after which points are drawn anew; 0: never.
      evaluation: points inside that errors are measured on, drawn once.
    """

    number: str
    equation: Equation
    hidden: tuple[int, ...]
    budget: float
    levels: Levels
    interior: int = 3000
    boundary: int = 500
    redrawn: int = 1
    evaluation: int = 30_000

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of all layers, from the coordinates to the output."""
        return (self.equation.coordinates, *self.hidden, 1)

    @property
    def parameters(self) -> int:
        """Count the parameters."""
        pairs = itertools.pairwise(self.sizes)
        return sum((inputs + 1) * units for inputs, units in pairs)

    @property
    def title(self) -> str:
        """Say in a few words what it is."""
        layers = "-".join(map(str, self.hidden))
        points = f"{self.interior:,} + {self.boundary:,} points"
        kept = (
            f"new every {self.redrawn} steps" if self.redrawn > 1 else "new each step"
        )
        return (
            f"{self.number} {self.equation.title}, tanh {layers} "
            f"({self.parameters:,} parameters), {points}"
            f"{', ' + kept if self.redrawn else ''}"
        )

    def init(self, key: jax.Array) -> Layers:
        """Draw parameters to start from."""
        return operators.init(key, self.sizes)

    def residual(self, params: Layers, points: jax.Array) -> jax.Array:
        """Compute the equation's residual at points inside, `[cases]`."""
        found = operators.of_network(params, points, self.equation.spatial)
        return self.equation.residual(points, found)

    @functools.cached_property
    def objective(self) -> hfjax.Objective:
        """½ mean r² inside plus ½ mean (u − its solution)² where that is given."""
        squared_error = hfjax.losses.squared_error()
        inside = hfjax.Objective(self.residual, squared_error)
        given = hfjax.Objective(operators.network, squared_error)
        return hfjax.objective.weighted_sum([(1.0, inside), (1.0, given)])

    def batch(self, key: jax.Array, updates: jax.Array | int = 0) -> Any:
        """Draw what an update learns from.

        Args:
          key: of a run.
          updates: so far; new points are drawn as they grow.

        Returns:
          A batch of `objective`: points inside and zeros, points and u where it is
          given.
        """
        if self.redrawn:
            key = jax.random.fold_in(key, updates // self.redrawn)
        inside, given = jax.random.split(key)
        points = self.equation.inside(inside, self.interior)
        known = self.equation.given(given, self.boundary)
        zeros = jnp.zeros(self.interior, points.dtype)
        return (points, zeros), (known, self.equation.solution(known))

    def error(self, params: Layers, points: jax.Array) -> jax.Array:
        """Compute the root of the mean squared error, not relative to u."""
        wrong = operators.network(params, points) - self.equation.solution(points)
        return jnp.sqrt(jnp.mean(jnp.square(wrong)))
