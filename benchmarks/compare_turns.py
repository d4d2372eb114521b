"""Runs that take turns: what disturbs the machine for a while then hits them all."""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import checkpoint, probe
from benchmarks.checkpoint import Checkpoints
from benchmarks.compare_history import Plan, Row, RunFile
from benchmarks.history import Moment, Run
from benchmarks.race import Limits, race
from benchmarks.racers import Carry, Racer


class Course(NamedTuple):
    """What all runs from one start have in common.

    Attributes:
      params: where they start.
      measure: `params -> measurements`, those of a row between its moment and the probe:
        (f, f − floor).
      pause: seconds of training between measurements of small updates.
      seconds: of training for each run.
      turn: seconds of training until the next has its turn.
      clock: tells the seconds of training.
      settings: of the runs, in JSON's types.
      recorded: settings and what they ran on, for the files.
      folder: for files and checkpoints.
      row: kind of the runs' rows.
    """

    params: Any
    measure: Callable[[Any], tuple[float, ...]]
    pause: float
    seconds: float
    turn: float
    clock: Callable[[], float]
    settings: dict[str, Any]
    recorded: dict[str, Any]
    folder: Path
    row: Callable[..., Any] = Row

    def file(self, plan: Plan) -> Path:
        """Return the path of a run's file."""
        return run_file(self.folder, plan)


def run_file(folder: Path, plan: Plan) -> Path:
    """Return the path of a run's file.

    Args:
      folder: of the comparison.
      plan: of the run.
    """
    return folder / "runs" / f"{plan.stem}.json"


def checkpoints_of(folder: Path, plan: Plan) -> Path:
    """Return the folder of a run's checkpoints.

    Args:
      folder: of the comparison.
      plan: of the run.
    """
    return folder / "checkpoints" / plan.stem


class Entrant:
    """A run that takes turns.

    Attributes:
      plan: of the run.
      run: what it has measured.
      over: whether it has come to its end.
    """

    def __init__(
        self,
        plan: Plan,
        build: Callable[[], Racer],
        course: Course,
        checkpoints: Checkpoints[Any],
    ) -> None:
        self.plan, self.over = plan, False
        self.run = Run[Any](plan.racer, plan.optimizer, 0.0)
        self._course, self._build = course, build
        self._checkpoints, self._probe = checkpoints, math.nan
        self._racer: Racer | None = None
        self._carry: Carry | None = None
        path = run_file(course.folder, plan)
        self._file = RunFile(path, course.recorded, [self.run], plan=plan)

    def prepare(self) -> None:
        """Compile, and go back to where a run that was killed stood.

        Raises:
          NotWholeError: if there are checkpoints, and none of them is whole.
        """
        racer = self._racer = self._build()

        def like(_: bool) -> Carry:
            return racer.init(self._course.params)

        restored = self._checkpoints.restore(like, self.run)
        self.run.compile_seconds = racer.compile_seconds
        self._carry = restored and restored.carry

    def take_turn(self, until: float) -> bool:
        """Train for a while, and keep what came of it.

        Args:
          until: seconds of training, all turns together.

        Returns:
          Whether there was anything to do: a run that goes on waits for the others.
        """
        if self._racer is None:
            self.prepare()
        assert self._racer is not None
        course, run = self._course, self.run
        until = min(until, course.seconds)
        if run.seconds >= until:
            return False
        self._probe = probe.seconds_of_a_product()
        self._carry = race(
            self._racer,
            course.params,
            self._measure,
            Limits(seconds=until),
            run,
            lambda seconds: None,
            resumed=self._carry,
            clock=course.clock,
            pause=course.pause,
        )
        diverged = not math.isfinite(run.last.loss)
        self.over = diverged or run.seconds >= course.seconds
        if self.over:
            self._file.finished = True
            self._racer = self._carry = run.params = None  # Their memory is for others.
        else:
            self._checkpoints.keep(self._carry, run)
        self._file.save()
        return True

    def _measure(self, moment: Moment, params: Any) -> Any:
        course = self._course
        return course.row(*moment, *course.measure(params), self._probe)


def go(
    builders: Sequence[tuple[Plan, Callable[[], Racer]]],
    course: Course,
    watch: Callable[[Entrant], None],
) -> None:
    """Let runs from one start take turns until all have come to their end.

    Args:
      builders: plan of each, and what compiles it when it is its first turn.
      course: what they have in common.
      watch: called after each turn.

    Raises:
      NotWholeError: if there are checkpoints of one, and none of them is whole.
    """
    (course.folder / "runs").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        entrants = []
        for plan, build in builders:
            folder = checkpoints_of(course.folder, plan)
            its = stack.enter_context(Checkpoints(folder, course.settings, course.row))
            entrants.append(Entrant(plan, build, course, its))
        until = 0.0
        while entrants:
            until += course.turn
            for entrant in entrants:
                if entrant.take_turn(until):
                    watch(entrant)
            entrants = [entrant for entrant in entrants if not entrant.over]
    for plan, _ in builders:
        checkpoint.remove(checkpoints_of(course.folder, plan))
