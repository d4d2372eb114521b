"""Optimizers that see a small batch in each update, and need little but its gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import hfjax
from benchmarks.harness.machine import compile_ahead, timed
from benchmarks.harness.race import Carry, Racer
from benchmarks.suites.problem import Problem

ADAM_RATES = (1e-2, 1e-3, 1e-4)
MUON_RATES = (0.2, 0.05, 0.02, 0.005)
"""Around 0.02, which its author uses."""

STOCHASTIC_RATES = (0.3, 0.1, 0.03)

_STEP_SECONDS = 0.25
"""Of small updates in one call, so that Python's part does not count."""


def adam(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build Adam; its gradients are clipped if the problem says so."""

    def optimizer(rate: Any) -> optax.GradientTransformation:
        if problem.clip is None:
            return optax.adam(rate)
        return optax.chain(optax.clip_by_global_norm(problem.clip), optax.adam(rate))

    return first_order(optimizer, problem, params, seed)


def muon(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build Muon, with Adam on biases."""
    return first_order(optax.contrib.muon, problem, params, seed)


def stochastic(problem: Problem, params: Any, seed: int) -> Callable[[float], Racer]:
    """Build `hfjax.recipes.stochastic`."""

    def optimizer(rate: Any) -> optax.GradientTransformation:
        return hfjax.recipes.stochastic(problem.objective, rate)

    return first_order(optimizer, problem, params, seed, takes_batch=True)


def first_order(
    optimizer: Callable[[Any], optax.GradientTransformation],
    problem: Problem,
    params: Any,
    seed: int,
    *,
    takes_batch: bool = False,
) -> Callable[[float], Racer]:
    """Build an optimizer on minibatches, compiled once for all learning rates.

    Args:
      optimizer: `learning_rate -> transformation`.
      problem: whose minibatches it sees.
      params: where it starts.
      seed: of the order of the examples.
      takes_batch: whether an update is given the minibatch, beside its gradient.

    Returns:
      `learning_rate -> racer`; a step is as many updates as take about a quarter of a
      second, at most an epoch.
    """
    minibatches, key = problem.minibatches, jax.random.key(seed)
    cases, data = minibatches.cases, problem.data(seed)

    def steps(carry: Carry, rate: Any, count: Any, data: Any) -> Carry:
        def one(_: jax.Array, carry: Carry) -> Carry:
            batch, kept = minibatches.draw(data, carry, key)
            _, grads = problem.objective.value_and_grad(carry.params, batch)
            own = {"batch": batch} if takes_batch else {}
            update: Any = optimizer(rate).update
            updates, state = update(grads, carry.state, carry.params, **own)
            params: Any = optax.apply_updates(carry.params, updates)
            return Carry(params, state, carry.updates + 1, kept)

        if not problem.looped:
            return one(jnp.int32(0), carry)
        return jax.lax.fori_loop(0, count, one, carry)

    def init(params: Any) -> Carry:
        kept = jnp.arange(cases) if cases else problem.kept
        return Carry(params, optimizer(0.0).init(params), jnp.int32(0), kept)

    idle, single, start = jnp.float32(0), jnp.int32(1), init(params)
    compiled, taken = compile_ahead(steps, start, idle, single, data)
    warm = jax.block_until_ready(compiled(start, idle, single, data))
    _, once = timed(lambda: compiled(warm, idle, single, data))
    fit = max(1, int(_STEP_SECONDS / once.wall))
    epoch = minibatches.epoch or fit
    count = jnp.int32(min(fit, epoch))

    def racer(learning_rate: float) -> Racer:
        rate = jnp.float32(learning_rate)

        def step(carry: Carry) -> Carry:
            for _ in range(1 if problem.looped else int(count)):
                carry = compiled(carry, rate, count, data)
            return carry

        return Racer(init, step, taken)

    return racer
