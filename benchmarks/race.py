"""A race against the clock: steps of one racer, with measurements between them."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

import hfjax
from benchmarks.checkpoint import Checkpoints
from benchmarks.history import Measured, Moment, Row, Run
from benchmarks.network import Layers
from benchmarks.racers import Carry, Racer, compile_ahead, zero_updates

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
    *,
    resumed: Carry | None = None,
    keep: Callable[[Carry], None] = lambda carry: None,
    clock: Callable[[], float] = time.perf_counter,
    pause: float | None = None,
) -> Carry:
    """Let one racer run to its limit, or until the loss is no number any more.

    `run` is filled in as it goes: an exception, `KeyboardInterrupt` above all,
    passes through and leaves in it what there is.

    Args:
      racer: that runs.
      params: where it starts.
      measure: called after every update that says what it did, else after a pause,
        and at the end.
      limits: when the run ends.
      run: to fill in.
      watch: called with the seconds of training after each step.
      resumed: where the racer stood when it was killed, `run` having its history.
      keep: called after each step, to save a checkpoint if it is time.
      clock: tells the seconds of training. `time.process_time` counts those of all
        threads, and does not count what other programs take of the machine.
      pause: seconds of training between measurements where updates do not say what
        they did; `None` is about one.

    Returns:
      Where the racer stands at the end.
    """
    pause = _PAUSE if pause is None else pause
    carry = racer.init(params) if resumed is None else resumed
    run.params = carry.params
    if not run.rows:
        run.rows.append(measure(Moment(0.0, 0, 0), params))
    watch(run.seconds)
    while not _over(run, limits):
        start = clock()
        carry = jax.block_until_ready(racer.step(carry))
        run.seconds += clock() - start
        run.params, scalars = carry.params, racer.read(carry)
        if scalars:
            run.scalars.append(scalars)
        last = limits.seconds is not None and run.seconds >= limits.seconds
        if scalars or last or run.seconds - run.last.seconds >= pause:
            moment = Moment(run.seconds, int(carry.updates), run.cg_iterations)
            run.rows.append(measure(moment, carry.params))
        watch(run.seconds)
        keep(carry)
    return carry


def race_on(
    build: Callable[[], Racer],
    params: Any,
    measure: Measure[R],
    limits: Limits,
    run: Run[R],
    watch: Callable[[float], None],
    checkpoints: Checkpoints[R],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let a racer run as in `race`, from its newest checkpoint on.

    Args:
      build: compiles the racer; not called if the run had come to its end.
      params: where it starts.
      measure: as in `race`.
      limits: as in `race`.
      run: to fill in, with what the checkpoint holds first.
      watch: as in `race`.
      checkpoints: of the run; one is saved at the end in any case.
      clock: as in `race`.

    Raises:
      NotWholeError: if there are checkpoints, and none of them is whole.
    """
    racer = functools.cache(build)

    def like(finished: bool) -> Carry:
        return _ended(params, zero_updates()) if finished else racer().init(params)

    restored = checkpoints.restore(like, run)
    if restored is not None and restored.finished:
        return
    run.compile_seconds = racer().compile_seconds
    carry = race(
        racer(),
        params,
        measure,
        limits,
        run,
        watch,
        resumed=restored and restored.carry,
        keep=lambda carry: checkpoints.keep(carry, run),
        clock=clock,
    )
    checkpoints.save(_ended(carry.params, carry.updates), run, finished=True)


def _ended(params: Any, updates: jax.Array) -> Carry:
    """Return what is needed of a racer that has come to its end."""
    return Carry(params, None, updates)


def _over(run: Run, limits: Limits) -> bool:
    """Return whether a run has come to a limit, or to nothing."""
    row = run.last
    return (
        (limits.seconds is not None and run.seconds >= limits.seconds)
        or (limits.updates is not None and row.updates >= limits.updates)
        or (limits.error is not None and row.error < limits.error)
        or not math.isfinite(row.loss)
    )
