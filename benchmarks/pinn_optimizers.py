"""The optimizers of the benchmark of differential equations, by name.

All are given the same points: all of them in every step, drawn anew where the problem
says so. To add one: a function `(problem, params, seed) -> Racer` and a line in
`OPTIMIZERS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

import hfjax
from benchmarks import racers
from benchmarks.batches import Handed
from benchmarks.compare_optimizers import Optimizer
from benchmarks.pinn_problem import Problem
from benchmarks.racers import Carry, Racer

MOMENTUM = 0.5
"""Of SPRING (Goldshlager, Abrahamsen & Lin, 2024), as `solver="auto"` has it."""

DEFAULT = ("hfjax", "cg", "martens2010", "adam", "lbfgs")
"""What runs if nothing is asked for."""

_MOST_NUMBERS = 5 * 10**8  # of a Jacobian: 4 GB


def points(problem: Problem, seed: int) -> Any:
    """Return what updates learn from: a batch, or where that changes a key.

    Args:
      problem: to be solved.
      seed: of the run.
    """
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return key if problem.redrawn else jax.jit(problem.batch)(key)


def drawer(problem: Problem) -> Callable[[Any, jax.Array], Any]:
    """Build what makes an update's batch.

    Args:
      problem: to be solved.

    Returns:
      `(what points returned, updates so far) -> batch`.
    """
    return problem.batch if problem.redrawn else lambda batch, _: batch


def best(problem: Problem, params: Any, seed: int) -> Racer:
    """Build `hfjax.hessian_free` with the solver that suits the sizes."""
    tx = hfjax.hessian_free(problem.objective, solver="auto")
    return _ours("hfjax", tx, problem, params, seed)


def spring(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it solved exactly, with momentum."""
    solver = hfjax.sample_space.cholesky(momentum=MOMENTUM)
    tx = hfjax.hessian_free(problem.objective, solver=solver)
    return _ours("spring", tx, problem, params, seed)


def uncorrected(problem: Problem, params: Any, seed: int) -> Racer:
    """Build the same without corrections: damped Gauss-Newton steps as they are."""
    solver = hfjax.sample_space.cholesky(momentum=MOMENTUM, corrections=0)
    tx = hfjax.hessian_free(problem.objective, solver=solver)
    return _ours("uncorrected", tx, problem, params, seed)


def cg(problem: Problem, params: Any, seed: int) -> Racer:
    """Build it with conjugate gradients, whatever the problem."""
    solver = hfjax.cg.conjugate_gradient()
    tx = hfjax.hessian_free(problem.objective, solver=solver)
    return _ours("cg", tx, problem, params, seed)


def martens2010(problem: Problem, params: Any, seed: int) -> Racer:
    """Build Martens' program; its λ of 45 is for losses of 784 outputs."""
    tx = hfjax.recipes.martens2010(problem.objective, initial_damping=1.0)
    return _ours("martens2010", tx, problem, params, seed)


def adam(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build Adam, on all points."""
    draw = drawer(problem)

    def update(carry: Carry, rate: Any, data: Any) -> Carry:
        batch = draw(data, carry.updates)
        _, grads = problem.objective.value_and_grad(carry.params, batch)
        updates, state = optax.adam(rate).update(grads, carry.state, carry.params)
        moved: Any = optax.apply_updates(carry.params, updates)
        return Carry(moved, state, carry.updates + 1)

    def init(params: Any) -> Carry:
        return Carry(params, optax.adam(0.0).init(params), racers.zero_updates())

    data = points(problem, seed)
    return racers.small_updates("adam", init, update, init(params), data)


def lbfgs(problem: Problem, params: Any, seed: int) -> Racer:
    """Build L-BFGS, on all points."""
    draw = drawer(problem) if problem.redrawn else None
    return racers.lbfgs(problem.objective, points(problem, seed), params, draw=draw)


def _ours(
    name: str,
    tx: optax.GradientTransformationExtraArgs,
    problem: Problem,
    params: Any,
    seed: int,
) -> Racer:
    draw = drawer(problem)

    def hand(data: Any, updates: jax.Array) -> Handed:
        batch = draw(data, updates)
        return Handed(batch, batch, None)

    data = points(problem, seed)
    return racers.hessian_free(name, tx, problem.objective, data, params, hand)


def _too_large(problem: Problem) -> str | None:
    """Say why a problem cannot be solved exactly, if it cannot."""
    numbers = (problem.interior + problem.boundary) * problem.parameters
    if numbers > _MOST_NUMBERS:
        return f"its Jacobian has {numbers:,} numbers, more than {_MOST_NUMBERS:,}"
    return None


OPTIMIZERS = {
    "hfjax": Optimizer('hfjax.hessian_free with solver="auto"', best),
    "spring": Optimizer(
        f"hfjax.hessian_free, sample_space.cholesky(momentum={MOMENTUM:g})",
        spring,
        unfit=_too_large,
    ),
    "uncorrected": Optimizer(
        "the same with corrections=0", uncorrected, unfit=_too_large
    ),
    "cg": Optimizer("hfjax.hessian_free with conjugate gradients", cg),
    "martens2010": Optimizer("hfjax.recipes.martens2010, λ from 1", martens2010),
    "adam": Optimizer("optax.adam, all points", adam, racers.ADAM_RATES),
    "lbfgs": Optimizer("optax.lbfgs as it comes, all points", lbfgs),
}
"""By the name on the command line."""
