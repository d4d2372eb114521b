"""The optimizers that are compared, by name: ours, Optax's, and other packages'.

To add one: a function `(problem, params, seed) -> Racer` and a line in `OPTIMIZERS`.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
import optax.contrib

import hfjax
from benchmarks import batches, compare_peers, racers
from benchmarks.batches import Hand
from benchmarks.compare_problems import Problem
from benchmarks.racers import Racer

MUON_RATES = (0.2, 0.05, 0.02, 0.005)
"""Around 0.02, which its author uses."""

Build = Callable[[Any, Any, int], Any]
"""`(problem, params, seed) -> racer`, or `-> (learning_rate -> racer)` where there are
rates; the seed is of what the optimizer itself draws."""


class Optimizer(NamedTuple):
    """An optimizer that can be built.

    Attributes:
      title: its settings, in a few words.
      build: compiles it.
      rates: learning rates; each gets a run of its own, and the best counts.
      module: that must be there to be imported.
      package: what installs the module.
      unfit: `problem -> why it cannot solve it`, `None` if it can.
    """

    title: str
    build: Build
    rates: tuple[float, ...] = ()
    module: str = "optax"
    package: str = "optax"
    unfit: Callable[[Any], str | None] = lambda problem: None

    def missing(self) -> str | None:
        """Say what must be installed first, if anything must."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed: pip install 'hfjax[peers]'"
        return None

    def names(self, name: str) -> dict[str, float | None]:
        """List its runs: the name of each, and its learning rate.

        Args:
          name: of the optimizer.
        """
        if not self.rates:
            return {name: None}
        return {f"{name} {rate:g}": rate for rate in self.rates}


def default(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `hfjax.hessian_free` as it comes; no knob for the problem."""
    del seed
    tx = hfjax.hessian_free(problem.objective)
    return _ours("default", tx, problem, params, batches.everything(problem.parts))


def martens2010(problem: Problem, params: Any, seed: int) -> Racer:
    """Build Martens' program."""
    del seed
    tx = hfjax.recipes.martens2010(problem.objective, initial_damping=problem.damping)
    return _ours("martens2010", tx, problem, params, batches.everything(problem.parts))


def curvature_guarded(problem: Problem, params: Any, seed: int) -> Racer:
    """Build the report's second recipe: curvature on half of the cases at most."""
    del seed
    tx = hfjax.recipes.curvature_guarded(
        problem.objective, initial_damping=problem.damping
    )
    hand = batches.guarded(max(2, problem.parts))
    return _ours("curvature_guarded", tx, problem, params, hand)


def momentum_like(problem: Problem, params: Any, seed: int) -> Racer:
    """Build the report's third recipe, on a quarter of each part for everything."""
    del seed
    tx = hfjax.recipes.momentum_like(problem.objective, initial_damping=problem.damping)
    hand = batches.alone(4 * problem.parts)
    return _ours("momentum_like", tx, problem, params, hand)


def adam(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build Adam."""
    return _optax("adam", optax.adam, problem, params, seed)


def muon(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build Muon, with Adam on biases."""
    return _optax("muon", optax.contrib.muon, problem, params, seed)


def lbfgs(problem: Problem, params: Any, seed: int) -> Racer:
    """Build L-BFGS."""
    del seed
    return racers.lbfgs(problem.objective, problem.batch, params)


def _ours(
    name: str,
    tx: optax.GradientTransformationExtraArgs,
    problem: Problem,
    params: Any,
    hand: Hand,
) -> Racer:
    return racers.hessian_free(name, tx, problem.objective, problem.batch, params, hand)


def _optax(
    name: str, optimizer: Any, problem: Problem, params: Any, seed: int
) -> Callable[[float], Racer]:
    return racers.first_order(
        name, optimizer, problem.objective, problem.batch, params, seed=seed
    )


_MINIBATCHES = f"minibatches of {batches.MINIBATCH}"

OPTIMIZERS = {
    "default": Optimizer("hfjax.hessian_free as it comes, gradient on all", default),
    "martens2010": Optimizer("hfjax.recipes.martens2010, gradient on all", martens2010),
    "curvature_guarded": Optimizer(
        "hfjax.recipes.curvature_guarded, gradient on all", curvature_guarded
    ),
    "momentum_like": Optimizer(
        "hfjax.recipes.momentum_like, a quarter of the curvature's cases at a time",
        momentum_like,
    ),
    "adam": Optimizer(f"optax.adam, {_MINIBATCHES}", adam, racers.ADAM_RATES),
    "muon": Optimizer(f"optax.contrib.muon, {_MINIBATCHES}", muon, MUON_RATES),
    "lbfgs": Optimizer("optax.lbfgs as it comes, on all", lbfgs),
    "kfac": Optimizer(
        "kfac_jax.Optimizer as in its autoencoder example, on all",
        compare_peers.kfac,
        module="kfac_jax",
        package="kfac-jax",
        unfit=compare_peers.unfit_for_kfac,
    ),
    "somax": Optimizer(
        "somax.sgn_ce or sgn_mse, Gauss-Newton by CG as in its README, on all",
        compare_peers.somax,
        compare_peers.SOMAX_RATES,
        module="somax",
        package="python-somax",
        unfit=compare_peers.unfit_for_somax,
    ),
    "optimistix": Optimizer(
        "optimistix.LBFGS as it comes, on all",
        compare_peers.optimistix,
        module="optimistix",
        package="optimistix",
    ),
}
"""By the name on the command line. Optax has neither Shampoo nor SOAP."""
