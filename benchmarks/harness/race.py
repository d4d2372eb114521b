"""Runs that take turns, so that what disturbs the machine for a while hits them all."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.harness import checkpoint, machine
from benchmarks.harness.checkpoint import Checkpoints
from benchmarks.harness.history import Plan, Row, Run, RunFile
from benchmarks.harness.machine import Taken


class Carry(NamedTuple):
    """Where an optimizer stands.

    Attributes:
      params: θ.
      state: of the optimizer, a tree of arrays.
      updates: of the parameters so far, int32.
      kept: what the next batch depends on besides the data: the order of the examples in
        this epoch, or the batch before.
    """

    params: Any
    state: Any
    updates: jax.Array
    kept: Any = None


class Racer(NamedTuple):
    """An optimizer at the start.

    Attributes:
      init: `params -> carry`.
      step: `carry -> carry`, compiled: one update, or several if they are small.
      compiling: how long tracing and compiling took.
      read: `carry -> scalars`, what the last update did; empty if it does not say.
    """

    init: Callable[[Any], Carry]
    step: Callable[[Carry], Carry]
    compiling: Taken
    read: Callable[[Carry], dict[str, Any]] = lambda carry: {}


class Course(NamedTuple):
    """What all runs from one start have in common.

    Attributes:
      params: where they start.
      measure: `(params, updates) -> (f, value)`.
      pause: seconds of training between measurements of small updates.
      seconds: of training for each run.
      turn: seconds of training before it is the next run's turn.
      clock: a name of `machine.CLOCKS`.
      startup: from the start of Python until a run could be compiled.
      goal: a run ends when the value is below it.
      settings: of the runs, in JSON's types: a run goes on under the same ones only.
      recorded: settings and the machine, for the files.
      folder: for files and checkpoints.
    """

    params: Any
    measure: Callable[[Any, int], tuple[float, float]]
    pause: float
    seconds: float
    turn: float
    clock: str
    startup: Taken
    goal: float
    settings: dict[str, Any]
    recorded: dict[str, Any]
    folder: Path


class Entrant:
    """A run that takes turns.

    Attributes:
      plan: of the run.
      run: what it has measured.
      over: whether it has ended.
    """

    def __init__(
        self,
        plan: Plan,
        build: Callable[[], Racer],
        course: Course,
        checkpoints: Checkpoints,
    ) -> None:
        self.plan, self.over, self.run = plan, False, Run()
        self._course, self._build = course, build
        self._checkpoints, self._probe = checkpoints, math.nan
        self._racer: Racer | None = None
        self._carry: Carry | None = None

    def prepare(self) -> Racer:
        """Compile, and go back to where a run that was killed stood.

        Raises:
          NotWholeError: if there are checkpoints, and none of them is whole.
        """
        racer, course = self._build(), self._course
        restored = self._checkpoints.restore(lambda: racer.init(course.params))
        if restored is not None:
            self._carry, self.run = restored
        self.run.startup_seconds = getattr(course.startup, course.clock)
        self.run.compile_seconds = getattr(racer.compiling, course.clock)
        return racer

    def take_turn(self, until: float) -> bool:
        """Train for a while, and save what was measured.

        Returns:
          Whether the run trained. If an update took long, it waits for the others.
        """
        course = self._course
        self._racer = self._racer or self.prepare()
        until = min(until, course.seconds)
        if self.run.rows and self.run.seconds >= until and not self._is_over():
            return False
        self._probe = machine.probe()
        self._carry = self._race(self._racer, until)
        self.over = self._is_over()
        if self.over:
            self._racer = self._carry = None  # Others need the memory.
        else:
            self._checkpoints.keep(self._carry, self.run)
        RunFile(self.plan, course.recorded, self.over, self.run).save(course.folder)
        return True

    def _race(self, racer: Racer, until: float) -> Carry:
        """Train until then, or until the run is over."""
        course, run = self._course, self.run
        clock = machine.CLOCKS[course.clock]
        carry = self._carry or racer.init(course.params)
        if not run.rows:
            run.rows.append(self._measure(0.0, 0, 0, course.params))
        while run.seconds < until and not self._is_over():
            start = clock()
            carry = jax.block_until_ready(racer.step(carry))
            run.seconds += clock() - start
            scalars = racer.read(carry)
            if scalars:
                run.scalars.append(scalars)
            due = run.seconds - run.last.seconds >= course.pause
            if scalars or due or run.seconds >= until:
                iterations = run.last.cg_iterations + scalars.get("cg_iterations", 0)
                moment = run.seconds, int(carry.updates), iterations
                run.rows.append(self._measure(*moment, carry.params))
        return carry

    def _measure(
        self, seconds: float, updates: int, iterations: int, params: Any
    ) -> Row:
        loss, value = self._course.measure(params, updates)
        return Row(seconds, updates, iterations, loss, value, self._probe)

    def _is_over(self) -> bool:
        """Return whether the run has come to its end, to its goal, or to nothing."""
        run, course = self.run, self._course
        diverged = not math.isfinite(run.last.loss)
        return diverged or run.seconds >= course.seconds or run.last.value < course.goal


def go(
    builders: Sequence[tuple[Plan, Callable[[], Racer]]],
    course: Course,
    watch: Callable[[Entrant], None],
) -> None:
    """Let runs from one start take turns until all have ended.

    Raises:
      NotWholeError: if there are checkpoints of one, and none of them is whole.
    """
    with contextlib.ExitStack() as stack:
        entrants = []
        for plan, build in builders:
            folder = plan.checkpoints(course.folder)
            its = stack.enter_context(Checkpoints(folder, course.settings))
            entrants.append(Entrant(plan, build, course, its))
        until = 0.0
        while entrants:
            until += course.turn
            for entrant in entrants:
                if entrant.take_turn(until):
                    watch(entrant)
            entrants = [entrant for entrant in entrants if not entrant.over]
    for plan, _ in builders:
        checkpoint.remove(plan.checkpoints(course.folder))
