"""The suite of equations: networks that solve differential equations, in float64.

The problems on which Dangel, Müller & Zeinhofer (2024, arXiv 2405.15603) compare
optimizers that each had the same time, and the best of tens of settings. Their logs are
public (`f-dangel/kfac-pinns-experiments`). A problem has the number of its experiment
there, and `Levels` the lowest error in each log.

The value is the relative L2 error against the exact solution, ‖u_θ − u‖ / ‖u‖, on points
that no update learns from. The logs have the root of the mean square of u_θ − u, which is
not relative, so the published levels are divided by that of u.

Where the logs are of several problems: in 15 and 20 Hessian-free was run on the sum of
cosines, the others on the product of sines. Both are here, each with its own levels;
`_sin` is the second. In 14 every optimizer had its own number of points, and here are
those of Hessian-free. Where new points are drawn in each step, KFAC had new ones every
100 steps, in 43 every 10.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks.suites import derivatives, pde
from benchmarks.suites.images import Layers
from benchmarks.suites.pde import Equation
from benchmarks.suites.problem import (
    Kind,
    Measure,
    Minibatches,
    Problem,
    Suite,
    Summary,
)

SMALL, MEDIUM = (64,), (64, 64, 48, 48)
LARGE, LARGEST = (256, 256, 128, 128), (768, 768, 512, 512)


class Levels(NamedTuple):
    """The lowest error within the budget by optimizer; `None` if it was not run.

    Attributes:
      hf: PyTorchHessianFree, without a preconditioner.
      kfac: the better of KFAC and KFAC*.
      engd: energy natural gradient, with the whole matrix or its diagonal blocks.
      lbfgs: PyTorch's.
      adam: the best learning rate of 50.
      sgd: the best learning rate and momentum of 50.
      spring: SPRING, or ENGD-W, which is the same without momentum, of a later source
        (`andresguzco/rla-pinns`), in up to 7,000 s.
    """

    hf: float | None = None
    kfac: float | None = None
    engd: float | None = None
    lbfgs: float | None = None
    adam: float | None = None
    sgd: float | None = None
    spring: float | None = None

    def known(self) -> dict[str, float]:
        """Return those that were run, by name for people."""
        words = ("HF", "KFAC", "ENGD", "L-BFGS", "Adam", "SGD", "SPRING")
        named = zip(words, self, strict=True)
        return {name: level for name, level in named if level is not None}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A network that solves an equation.

    Attributes:
      number: of the experiment; with `s` behind it, its other problem.
      equation: with its solution.
      hidden: units of the tanh layers.
      budget: what the published runs had: seconds on a GPU, or in words.
      levels: the lowest errors in the logs.
      relative: published errors that are relative, by name, of other sources.
      interior: points inside.
      boundary: points where the solution is given.
      redrawn: steps after which points are drawn anew; 0 is never.
      evaluation: points inside that errors are measured on, drawn once.
    """

    number: str
    equation: Equation
    hidden: tuple[int, ...]
    budget: float | str
    levels: Levels = dataclasses.field(default_factory=Levels)
    relative: Mapping[str, float] = dataclasses.field(default_factory=dict)
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
        every = f"every {self.redrawn} steps" if self.redrawn > 1 else "each step"
        return (
            f"{self.number} {self.equation.title}, tanh {layers} "
            f"({self.parameters:,} parameters), {points}"
            f"{f', new {every}' if self.redrawn else ''}"
        )

    def residual(self, params: Layers, points: jax.Array) -> jax.Array:
        """Compute the equation's residual at points inside, `[cases]`."""
        found = derivatives.of_network(params, points, self.equation.spatial)
        return self.equation.residual(points, found)

    @functools.cached_property
    def objective(self) -> Any:
        """½ mean r² inside plus ½ mean (u − its solution)² where that is given."""
        squared_error = hfjax.losses.squared_error()
        inside = hfjax.Objective(self.residual, squared_error)
        given = hfjax.Objective(derivatives.network, squared_error)
        return hfjax.objective.weighted_sum([(1.0, inside), (1.0, given)])

    def batch(self, key: jax.Array, updates: jax.Array | int = 0) -> Any:
        """Draw what an update learns from.

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

    def data(self, seed: int) -> Any:
        """Return what updates learn from: a batch, or a key if that is redrawn."""
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return key if self.redrawn else jax.jit(self.batch)(key)

    def evaluation_points(self) -> jax.Array:
        """Draw the points that errors are measured on, the same for all seeds."""
        return self.equation.inside(jax.random.key(0), self.evaluation)

    def size(self, points: jax.Array) -> jax.Array:
        """Compute the root of the mean square of the solution."""
        return jnp.sqrt(jnp.mean(jnp.square(self.equation.solution(points))))

    def error(self, params: Layers, points: jax.Array) -> jax.Array:
        """Compute the relative L2 error."""
        wrong = derivatives.network(params, points) - self.equation.solution(points)
        return jnp.sqrt(jnp.mean(jnp.square(wrong))) / self.size(points)

    def measurer(self, params: Layers, seed: int) -> Measure:
        """Measure f and the error. Redrawn points: f on a draw that no update sees."""
        data, where = self.data(seed), self.evaluation_points()
        # Updates are counted from 0, so that none of them has the draw of minus one.
        batch = jax.jit(self.batch)(data, -1) if self.redrawn else data

        def both(params: Layers, batch: Any, where: jax.Array) -> Any:
            return self.objective.value(params, batch), self.error(params, where)

        compiled = jax.jit(both).lower(params, batch, where).compile()

        def measure(params: Layers, updates: int) -> tuple[float, float]:
            del updates
            loss, error = jax.device_get(compiled(params, batch, where))
            return float(loss), float(error)

        return measure

    def relative_levels(self) -> dict[str, float]:
        """Return the published errors, relative to the solution, by name."""
        size = float(self.size(self.evaluation_points()))
        levels = {name: level / size for name, level in self.levels.known().items()}
        return {**levels, **self.relative}

    def summary(self) -> Summary:
        """Say what tables and pictures need; milestones are the published levels."""
        levels = self.relative_levels()
        listed = ", ".join(f"{name} {level:.2g}" for name, level in levels.items())
        known = dict(levels)
        others = [
            known.pop(name) for name in ("L-BFGS", "Adam", "SGD") if name in known
        ]
        known.update({"others": min(others)} if others else {})
        budget = self.budget
        within = budget if isinstance(budget, str) else f"{budget:g} s on a GPU"
        first = " Others: the best of L-BFGS, Adam and SGD." if others else ""
        return Summary(
            title=self.title,
            value="relative L2 error",
            milestones={f"{name} {level:.2g}": level for name, level in known.items()},
            lowest=True,
            note=(
                f"Error: ‖u_θ − u‖ / ‖u‖ on {self.evaluation:,} points. Published, "
                f"{within}: {listed}.{first}"
            ),
        )

    def problem(self) -> Problem:
        """Build the problem; all points are in each update."""

        def draw(
            data: Any, updates: jax.Array, order: Any, key: jax.Array
        ) -> tuple[Any, Any]:
            del key
            return (self.batch(data, updates) if self.redrawn else data), order

        return Problem(
            summary=self.summary(),
            objective=self.objective,
            start=lambda key: derivatives.init(key, self.sizes),
            data=self.data,
            measurer=self.measurer,
            minibatches=Minibatches(draw, "all points"),
            redraw=self.batch if self.redrawn else None,
            options={"solver": "auto"},
            rows=self.interior + self.boundary,
        )


_sin2 = pde.poisson(2, "product of sines", *pde.product_of_sines(2))
_sin3 = pde.poisson(3, "product of sines", *pde.product_of_sines(3))
_cos2 = pde.poisson(2, "sum of cosines", *pde.sum_of_cosines())
_cos5 = pde.poisson(5, "sum of cosines", *pde.sum_of_cosines())
_pairs10 = pde.poisson(10, "sum of pairs", *pde.sum_of_pairs(1.34))
_norm100 = pde.poisson(100, "squared norm", *pde.squared_norm(100, 33.47))
_heat1 = pde.heat(1, pde.decaying_sines(1))
_heat4 = pde.heat(4, pde.decaying_sum)

_fixed = functools.partial(
    Experiment, budget=1000, interior=900, boundary=120, redrawn=0, evaluation=9000
)
_drawn = functools.partial(Experiment, budget=3000)
_long = functools.partial(Experiment, budget=6000, boundary=1000)

LEVELS = {
    "09": Levels(3.21e-7, 1.99e-7, 6.12e-8, 1.56e-4, 9.40e-5, 2.72e-5),
    "10": Levels(6.10e-6, 2.58e-6, 5.58e-8, 8.88e-4, 1.14e-3, 2.59e-3),
    "13": Levels(6.20e-7, 8.39e-7, 2.75e-8, 2.69e-4, 7.95e-5, 2.82e-4),
    "14": Levels(1.02e-2, 4.30e-3, None, 1.34e-2, 1.70e-2, 2.35e-2),
    "15": Levels(1.25e-6),
    "15s": Levels(None, 7.89e-7, 9.49e-5, 3.39e-4, 2.11e-4, 5.58e-4),
    # In 16, ENGD reached 1.14e-4 with a smaller network, 64-48-32-16.
    "16": Levels(1.23e-4, 6.33e-4, 3.95e-4, 3.01e-3, 3.77e-3, 9.74e-3),
    "19": Levels(2.52e-4, 1.73e-4, None, 2.96e-3, 3.98e-3, 5.44e-3),
    "20": Levels(2.01e-6),
    "20s": Levels(None, 1.52e-5, None, 3.97e-4, 8.54e-4, 1.22e-3),
    "21": Levels(2.17e-5, 4.71e-5, None, 6.95e-4, 1.49e-3, 4.09e-3),
    "27": Levels(1.44e-5, 5.59e-5, 7.36e-7, 4.85e-4, 1.05e-3, 8.38e-3),
    "28": Levels(1.11e-5, 9.32e-6, 1.45e-4, 1.17e-3, 7.38e-4, 4.88e-3),
    "29": Levels(1.97e-5, 1.32e-5, None, 6.71e-4, 7.47e-4, 5.11e-3),
    "43": Levels(2.35e-2, 2.60e-2, None, 4.88e-2, 0.183, 0.495),
}
"""By the number of the experiment."""

EXPERIMENTS = {
    "poisson2d": _fixed("09", _sin2, SMALL, levels=LEVELS["09"]),
    "poisson5d": _drawn("10", _cos5, SMALL, levels=LEVELS["10"]),
    "heat1d": _fixed("13", _heat1, SMALL, levels=LEVELS["13"]),
    "poisson100d": Experiment(
        "14",
        _norm100,
        LARGEST,
        budget=10_000,
        levels=LEVELS["14"],
        interior=108,
        boundary=2372,
        redrawn=55,
    ),
    "poisson2d_medium": _fixed("15", _cos2, MEDIUM, levels=LEVELS["15"]),
    "poisson2d_medium_sin": _fixed("15s", _sin2, MEDIUM, levels=LEVELS["15s"]),
    "poisson5d_medium": _drawn("16", _cos5, MEDIUM, levels=LEVELS["16"]),
    "poisson5d_large": _drawn("19", _cos5, LARGE, levels=LEVELS["19"]),
    "poisson2d_large": _fixed("20", _cos2, LARGE, levels=LEVELS["20"]),
    "poisson2d_large_sin": _fixed("20s", _sin2, LARGE, levels=LEVELS["20s"]),
    "poisson10d": _long("21", _pairs10, LARGE, levels=LEVELS["21"]),
    "heat4d": _drawn("27", _heat4, SMALL, levels=LEVELS["27"]),
    "heat4d_medium": _drawn("28", _heat4, MEDIUM, levels=LEVELS["28"]),
    "heat4d_large": _drawn("29", _heat4, LARGE, levels=LEVELS["29"]),
    "log_fokker_planck9d": _long(
        "43", pde.log_fokker_planck(9), LARGE, levels=LEVELS["43"]
    ),
    "poisson3d": Experiment(
        "b1",
        _sin3,
        (32, 32),
        budget="10,000 iterations",
        relative={"BFGS": 2.6e-4, "SSBFGS": 1.2e-5, "SSBroyden": 4e-6},
        interior=5000,
        boundary=800,
        redrawn=0,
        evaluation=50_000,
    ),
}
"""By name."""


def kind(experiment: Experiment) -> Kind:
    """Return what builds an experiment's problem."""
    return Kind(experiment.title, lambda data_dir: experiment.problem())


SUITE = Suite(
    name="equations",
    title="differential equations, by the relative L2 error, in float64",
    problems={name: kind(experiment) for name, experiment in EXPERIMENTS.items()},
    default=("poisson2d",),
    optimizers=("hfjax", "cg", "martens2010", "adam", "lbfgs"),
    seconds=300.0,
    float64=True,
    numbers={experiment.number: name for name, experiment in EXPERIMENTS.items()},
)
