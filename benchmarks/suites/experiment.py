"""Networks that solve equations: f, the points it is measured on, and the errors.

f is ½ mean r² of the equation's residual on points inside, plus ½ mean (u_θ − u)² on
points where u is given, each with its weight. The value is the relative L2 error against
the exact solution, ‖u_θ − u‖ / ‖u‖, on points that no update learns from.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hfjax
from benchmarks.suites import derivatives
from benchmarks.suites.pde import Equation
from benchmarks.suites.pde_networks import Network
from benchmarks.suites.problem import Kind, Measure, Minibatches, Problem, Summary

_INTERVALS = 40
"""Growing intervals between draws; no run is as long as so many."""


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
      hidden: units of the layers.
      budget: what the published runs had: seconds on a GPU, or in words.
      levels: the lowest errors in the logs.
      relative: published errors that are relative, by name, of other sources.
      interior: points inside.
      boundary: points where the solution is given.
      redrawn: steps after which points are drawn anew; 0 is never.
      growth: each such interval is so many times as long as the one before.
      pool: uniform points, from which those inside are chosen by their residuals; 0 takes
        uniform points themselves.
      replaced: points inside that a draw from the pool replaces, the oldest first; 0 is all.
      evaluation: points inside that errors are measured on, drawn once.
      network: of the layers.
      weights: of the terms inside, where u is given, and where its derivative by time is.
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
    growth: float = 1.0
    pool: int = 0
    replaced: int = 0
    evaluation: int = 30_000
    network: Network = dataclasses.field(default_factory=Network)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Units of all layers, from the inputs to the output."""
        return (self.network.inputs or self.equation.coordinates, *self.hidden, 1)

    @property
    def parameters(self) -> int:
        """Count the parameters."""
        shapes = jax.eval_shape(self.start, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    @property
    def title(self) -> str:
        """Say in a few words what it is."""
        layers = "-".join(map(str, self.hidden))
        given = [self.boundary] * (2 if self.equation.moving else 1)
        counts = [self.interior, *(count for count in given if count)]
        points = " + ".join(f"{count:,}" for count in counts) + " points"
        every = f"every {self.redrawn} steps" if self.redrawn > 1 else "each step"
        later = f", then {self.growth:g} times as many" if self.growth > 1 else ""
        chosen = f" chosen of {self.pool:,}" if self.pool else ""
        some = f"{self.replaced:,} " if self.replaced else ""
        return (
            f"{self.number} {self.equation.title}, {self.network.title} {layers} "
            f"({self.parameters:,} parameters), {points}{chosen}"
            f"{f', {some}new {every}{later}' if self.redrawn else ''}"
        )

    def start(self, key: jax.Array) -> Any:
        """Draw the parameters."""
        return self.network.init(key, self.sizes)

    def residual(self, params: Any, points: jax.Array) -> jax.Array:
        """Compute the equation's residual at points inside, `[cases]`."""
        found = self.network.derive(params, points, self.equation.spatial)
        return self.equation.residual(points, found)

    def value(self, params: Any, points: jax.Array) -> jax.Array:
        """Compute u at points, `[cases]`."""
        return self.network(params, points)

    def speed(self, params: Any, points: jax.Array) -> jax.Array:
        """Compute ∂u/∂t at points, `[cases]`."""
        u = functools.partial(self.value, params)
        return derivatives.Taylor(u, points).along(0, 1)[1]

    @functools.cached_property
    def objective(self) -> Any:
        """½ mean r² inside plus ½ mean (u − its solution)² where that is given."""
        squared_error = hfjax.losses.squared_error()
        models = [self.residual]
        models += [self.value] if self.boundary else []
        models += [self.speed] if self.equation.moving else []
        terms = [hfjax.Objective(model, squared_error) for model in models]
        return hfjax.objective.weighted_sum(
            list(zip(self.weights, terms, strict=False))
        )

    def residuals(self, params: Any, batch: Any) -> jax.Array:
        """Compute all residuals with their weights: f is half the sum of their squares."""
        found = []
        for (weight, term), (x, t) in zip(self.objective.parts, batch, strict=True):
            residual = (term.model_fn(params, x) - t).ravel()
            found.append(jnp.sqrt(weight / len(residual)) * residual)
        return jnp.concatenate(found)

    def batch(self, key: jax.Array, updates: jax.Array | int = 0) -> Any:
        """Draw what an update learns from.

        Returns:
          A batch of `objective`: points inside and zeros; points and u where it is given,
          if it is; points and ∂u/∂t where that is given, if it is.
        """
        if self.redrawn:
            key = jax.random.fold_in(key, self.draws(updates))
        inside, given = jax.random.split(key)
        points = self.equation.inside(inside, self.interior)
        terms = [(points, jnp.zeros(self.interior, points.dtype))]
        if self.boundary:
            known = self.equation.given(given, self.boundary)
            terms.append((known, self.equation.solution(known)))
        if self.equation.moving:
            start = self.equation.moving(jax.random.fold_in(given, 1), self.boundary)
            u = derivatives.Taylor(self.equation.solution, start)
            terms.append((start, u.along(0, 1)[1]))
        return tuple(terms)

    def draws(self, updates: jax.Array | int) -> jax.Array | int:
        """Count the draws before that of an update."""
        if self.growth == 1:
            return updates // self.redrawn
        intervals = np.round(self.redrawn * self.growth ** np.arange(_INTERVALS))
        starts = np.concatenate([[0], np.cumsum(intervals)])
        return jnp.searchsorted(jnp.asarray(starts), updates, side="right") - 1

    def redraw(self, key: jax.Array, carry: Any) -> Any:
        """Draw what an update learns from, or keep what the one before had."""
        if not self.pool:
            return self.batch(key, carry.updates)

        def chosen() -> Any:
            (uniform, zeros), *others = self.batch(key, carry.updates)
            old = jnp.where(carry.updates == 0, uniform, carry.kept[0][0])
            its = jax.random.fold_in(key, self.draws(carry.updates))
            points = self.by_residual(jax.random.fold_in(its, 2), carry.params)
            points = jnp.concatenate([points, old[: self.interior - len(points)]])
            return (points, zeros), *others

        due = self.draws(carry.updates) > self.draws(carry.updates - 1)
        return jax.lax.cond(due, chosen, lambda: carry.kept)

    def by_residual(self, key: jax.Array, params: Any) -> jax.Array:
        """Choose new points inside from a pool, without replacement.

        A point is as likely as |r| / mean |r| + 1 (RAD, Wu et al., 2023, k = c = 1).
        """
        places, noise = jax.random.split(key)
        pool = self.equation.inside(places, self.pool)
        size = jnp.abs(self.residual(params, pool))
        # The largest logarithms of weights are such a draw, after Gumbel's noise.
        weight = jnp.log(size / jnp.mean(size) + 1)
        noisy = weight + jax.random.gumbel(noise, weight.shape, weight.dtype)
        return pool[jax.lax.top_k(noisy, self.replaced or self.interior)[1]]

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

    def error(self, params: Any, points: jax.Array, truth: jax.Array) -> jax.Array:
        """Compute the relative L2 error, where the truth is the solution at the points."""
        wrong = self.value(params, points) - truth
        return jnp.sqrt(jnp.mean(jnp.square(wrong)) / jnp.mean(jnp.square(truth)))

    def measurer(self, params: Any, seed: int) -> Measure:
        """Measure f and the error. Redrawn points: f on a draw that no update sees."""
        data, where = self.data(seed), self.evaluation_points()
        truth = jax.jit(self.equation.solution)(where)
        # Updates are counted from 0, so that none of them has the draw of minus one.
        batch = jax.jit(self.batch)(data, -1) if self.redrawn else data

        def both(params: Any, batch: Any, where: jax.Array, truth: jax.Array) -> Any:
            value = self.objective.value(params, batch)
            return value, self.error(params, where, truth)

        compiled = jax.jit(both).lower(params, batch, where, truth).compile()

        def measure(params: Any, updates: int) -> tuple[float, float]:
            del updates
            loss, error = jax.device_get(compiled(params, batch, where, truth))
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
        terms = jax.eval_shape(self.batch, jax.random.key(0))
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), terms)
        problem = Problem(
            summary=self.summary(),
            objective=self.objective,
            start=self.start,
            data=self.data,
            measurer=self.measurer,
            minibatches=Minibatches(
                lambda data, carry, key: problem.batch(data, carry), "all points"
            ),
            redraw=self.redraw if self.redrawn else None,
            kept=nothing if self.pool else None,
            options={"solver": "auto"},
            rows=sum(leaf.shape[0] for _, leaf in terms),
            residuals=self.residuals,
        )
        return problem


def kind(experiment: Experiment) -> Kind:
    """Return what builds an experiment's problem."""
    return Kind(experiment.title, lambda data_dir: experiment.problem())
