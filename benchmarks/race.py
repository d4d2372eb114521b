"""A race against the clock: steps of one racer, with measurements between them."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

import hfjax
from benchmarks.history import Measured, Moment, Row, Run
from benchmarks.network import Layers
from benchmarks.racers import Racer, compile_ahead

_PAUSE = 1.0
"""Seconds of training between measurements, where updates are small."""

R = TypeVar("R", bound=Measured)

Measure = Callable[[Moment, Any], R]
"""`(moment, params) -> row`."""


class Limits(NamedTuple):
    """When a run ends; `None` is no limit.

    Attributes:
      seconds: of training. The update under way is finished.
      updates: of the parameters.
      error: to which the rows' error has come down.
    """

    seconds: float | None = None
    updates: int | None = None
    error: float | None = None


def measurer(
    objective: hfjax.Objective, train: jax.Array, test: jax.Array, params: Layers
) -> Measure[Row]:
    """Build what measures parameters on all images.

    Args:
      objective: f, and the model.
      train: training images.
      test: test images.
      params: to compile for.

    Returns:
      The measure, compiled.
    """

    def error(params: Layers, images: jax.Array) -> jax.Array:
        outputs = jax.nn.sigmoid(objective.model_fn(params, images))
        return jnp.mean(jnp.sum(jnp.square(outputs - images), axis=1))

    def measure(params: Layers, train: jax.Array, test: jax.Array) -> Any:
        loss = objective.value(params, (train, train))
        return loss, error(params, train), error(params, test)

    compiled, _ = compile_ahead(measure, params, train, test)

    def on_host(moment: Moment, params: Layers) -> Row:
        return Row(*moment, *map(float, jax.device_get(compiled(params, train, test))))

    return on_host


def race(
    racer: Racer,
    params: Any,
    measure: Measure[R],
    limits: Limits,
    run: Run[R],
    watch: Callable[[float], None],
) -> None:
    """Let one racer run to its limit, or until the loss is no number any more.

    `run` is filled in as it goes: an exception, `KeyboardInterrupt` above all,
    passes through and leaves in it what there is.

    Args:
      racer: that runs.
      params: where it starts.
      measure: called after every update that says what it did, else about
        once in a second of training, and at the end.
      limits: when the run ends.
      run: to fill in.
      watch: called with the seconds of training after each step.
    """
    carry, seconds = racer.init(params), 0.0
    run.params = params
    run.rows.append(measure(Moment(0.0, 0, 0), params))
    watch(seconds)
    while not _over(run, seconds, limits):
        start = time.perf_counter()
        carry = jax.block_until_ready(racer.step(carry))
        seconds += time.perf_counter() - start
        run.params, scalars = carry.params, racer.read(carry)
        if scalars:
            run.scalars.append(scalars)
        last = limits.seconds is not None and seconds >= limits.seconds
        if scalars or last or seconds - run.last.seconds >= _PAUSE:
            moment = Moment(seconds, int(carry.updates), run.cg_iterations)
            run.rows.append(measure(moment, carry.params))
        watch(seconds)


def _over(run: Run, seconds: float, limits: Limits) -> bool:
    """Return whether a run has come to a limit, or to nothing."""
    row = run.last
    return (
        (limits.seconds is not None and seconds >= limits.seconds)
        or (limits.updates is not None and row.updates >= limits.updates)
        or (limits.error is not None and row.error < limits.error)
        or not math.isfinite(row.loss)
    )
