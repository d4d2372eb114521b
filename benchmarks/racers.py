"""The racers: Hessian-free and its rivals, behind one small interface.

Each minimises the same `hfjax.Objective` from the same parameters, and each is
compiled ahead of time: what compiling takes is known, and counts for nobody.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import hfjax
from benchmarks import batches
from benchmarks.batches import Hand

RECIPES = ("kronecker_factored", "martens2010")
"""Of `hfjax.recipes`, that take the whole batch; the first is the faster."""

ADAM_RATES = (1e-2, 1e-3, 1e-4)
"""Adam runs with each, and the best by its final loss counts."""

_STEP_SECONDS = 0.25  # of small updates in one call: then Python costs nothing


class Carry(NamedTuple):
    """Where a racer stands.

    Attributes:
      params: θ.
      state: of the Optax transformation.
      updates: of the parameters so far, int32.
      order: of the training cases in this epoch, if the racer shuffles them.
    """

    params: Any
    state: Any
    updates: jax.Array
    order: jax.Array | None = None


class Racer(NamedTuple):
    """An optimizer at the start.

    Attributes:
      name: with its settings, for people.
      family: of racers that differ in a learning rate only, or `"hf"`.
      init: `params -> carry`.
      step: `carry -> carry`, compiled: one update, or of small ones many.
      read: `carry -> scalars`, what the last update did; empty if it does not say.
      compile_seconds: what tracing and compiling took.
    """

    name: str
    family: str
    init: Callable[[Any], Carry]
    step: Callable[[Carry], Carry]
    read: Callable[[Carry], dict[str, Any]]
    compile_seconds: float


def hf(
    objective: hfjax.Objective,
    batch: Any,
    params: Any,
    *,
    recipe: str = RECIPES[0],
    curvature_batches: int = 1,
    max_iterations: int | None = None,
) -> Racer:
    """Build a recipe of hfjax.

    Gradient, choice of iterate and line search are on all cases; the curvature is
    on one of `curvature_batches` equal parts, taken in turn.

    Args:
      objective: f.
      batch: all training cases, `(inputs, targets)`.
      params: to compile for.
      recipe: one of `RECIPES`.
      curvature_batches: number of parts; it divides the number of cases.
      max_iterations: of conjugate gradients in an update; `None` is the recipe's own.

    Returns:
      The racer; a step is an update.
    """
    given = {} if max_iterations is None else {"max_iterations": max_iterations}
    tx = getattr(hfjax.recipes, recipe)(objective, **given)
    hand = batches.everything(curvature_batches)
    return hessian_free("hf", tx, objective, batch, params, hand)


def hessian_free(
    name: str,
    tx: optax.GradientTransformationExtraArgs,
    objective: hfjax.Objective,
    batch: Any,
    params: Any,
    hand: Hand,
) -> Racer:
    """Build a racer of a set-up of Hessian-free.

    Args:
      name: of the racer.
      tx: the set-up, as `hfjax.hessian_free` returns it.
      objective: f.
      batch: all training cases, `(inputs, targets)`.
      params: to compile for.
      hand: which of the cases an update sees.

    Returns:
      The racer; a step is an update.
    """

    def step(carry: Carry, batch: Any) -> Carry:
        handed = hand(batch, carry.updates)
        _, grads = objective.value_and_grad(carry.params, handed.gradient)
        updates, state = tx.update(
            grads,
            carry.state,
            carry.params,
            batch=handed.curvature,
            eval_batch=handed.evaluation,
        )
        params: Any = optax.apply_updates(carry.params, updates)
        return Carry(params, state, carry.updates + 1)

    def init(params: Any) -> Carry:
        return Carry(params, tx.init(params), zero_updates())

    compiled, seconds = compile_ahead(step, init(params), batch)
    return Racer(
        name=name,
        family="hf",
        init=init,
        step=lambda carry: compiled(carry, batch),
        read=lambda carry: hfjax.diagnostics.scalars(carry.state),
        compile_seconds=seconds,
    )


def first_order(
    family: str,
    optimizer: Callable[[Any], optax.GradientTransformation],
    objective: hfjax.Objective,
    batch: Any,
    params: Any,
    *,
    seed: int = 0,
) -> Callable[[float], Racer]:
    """Build an optimizer on minibatches of 200, shuffled anew in each epoch.

    A last minibatch that would not be full is left out of the epoch.

    Args:
      family: of the racers.
      optimizer: `learning_rate -> transformation`; the rate may be traced.
      objective: f.
      batch: all training cases, `(inputs, targets)`.
      params: to compile for.
      seed: of the shuffling.

    Returns:
      `learning_rate -> racer`, compiled once for all rates; a step is as many
      updates as take about a quarter of a second, at most an epoch.
    """
    key, cases = jax.random.key(seed), batches.cases_of(batch)

    def update(carry: Carry, rate: Any, batch: Any) -> Carry:
        part, order = batches.shuffled(batch, carry.updates, carry.order, key)
        _, grads = objective.value_and_grad(carry.params, part)
        updates, state = optimizer(rate).update(grads, carry.state, carry.params)
        params: Any = optax.apply_updates(carry.params, updates)
        return Carry(params, state, carry.updates + 1, order)

    def init(params: Any) -> Carry:
        state = optimizer(0.0).init(params)
        return Carry(params, state, zero_updates(), jnp.arange(cases))

    epoch = max(1, cases // batches.MINIBATCH)
    return small_updates(family, init, update, init(params), batch, most=epoch)


def lbfgs(
    objective: hfjax.Objective,
    batch: Any,
    params: Any,
    *,
    draw: Callable[[Any, jax.Array], Any] | None = None,
) -> Racer:
    """Build `optax.lbfgs` as it comes, on all cases: memory 10, zoom line search.

    Args:
      objective: f.
      batch: all training cases, `(inputs, targets)`.
      params: to compile for.
      draw: `(batch, updates so far) -> the cases of an update`, where they change: f
        and ∇f are then computed anew, and not taken from the line search.

    Returns:
      The racer; a step is an update, its line search included.
    """
    tx = optax.lbfgs()
    _, unravel = ravel_pytree(params)

    # On one long vector: the same numbers, and a fourth of the time to compile.
    def step(carry: Carry, batch: Any) -> Carry:
        cases = batch if draw is None else draw(batch, carry.updates)

        def value_fn(vector: jax.Array) -> jax.Array:
            return objective.value(unravel(vector), cases)

        vector, state = ravel_pytree(carry.params)[0], carry.state
        if draw is None:
            value, grad = optax.value_and_grad_from_state(value_fn)(vector, state=state)
        else:
            value, grad = jax.value_and_grad(value_fn)(vector)
        updates, state = tx.update(
            grad, state, vector, value=value, grad=grad, value_fn=value_fn
        )
        moved: Any = optax.apply_updates(vector, updates)
        return Carry(unravel(moved), state, carry.updates + 1)

    def init(params: Any) -> Carry:
        return Carry(params, tx.init(ravel_pytree(params)[0]), zero_updates())

    compiled, seconds = compile_ahead(step, init(params), batch)
    return Racer(
        name="lbfgs",
        family="lbfgs",
        init=init,
        step=lambda carry: compiled(carry, batch),
        read=lambda carry: {},
        compile_seconds=seconds,
    )


def small_updates(
    family: str,
    init: Callable[[Any], Carry],
    update: Callable[..., Carry],
    start: Carry,
    *data: Any,
    most: int | None = None,
) -> Callable[[float], Racer]:
    """Build racers whose updates are small: many in a step, then Python costs nothing.

    Args:
      family: of the racers.
      init: `params -> carry`.
      update: `(carry, learning_rate, *data) -> carry`.
      start: to compile for.
      *data: what the update needs.
      most: updates in a step, if there is a limit.

    Returns:
      `learning_rate -> racer`, compiled once for all rates; a step is as many
      updates as take about a quarter of a second.
    """

    def steps(carry: Carry, rate: Any, count: Any, *data: Any) -> Carry:
        def one(_: jax.Array, carry: Carry) -> Carry:
            return update(carry, rate, *data)

        return jax.lax.fori_loop(0, count, one, carry)

    idle, single = jnp.float32(0), zero_updates() + 1
    compiled, seconds = compile_ahead(steps, start, idle, single, *data)
    fit = max(
        1, int(_STEP_SECONDS / _seconds(lambda: compiled(start, idle, single, *data)))
    )
    count = zero_updates() + (fit if most is None else min(fit, most))

    def racer(learning_rate: float) -> Racer:
        rate = jnp.float32(learning_rate)
        return Racer(
            name=f"{family} {learning_rate:g}",
            family=family,
            init=init,
            step=lambda carry: compiled(carry, rate, count, *data),
            read=lambda carry: {},
            compile_seconds=seconds,
        )

    return racer


def compile_ahead(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Trace and compile a function for arguments like these.

    Args:
      fn: to compile.
      *args: arrays of the shapes that will come.

    Returns:
      The compiled function, and the seconds it took.
    """
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled, time.perf_counter() - start


def _seconds(call: Callable[[], Any]) -> float:
    """Time a call, after one that warms up."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def zero_updates() -> jax.Array:
    """Count no update yet."""
    return jnp.zeros((), jnp.int32)
