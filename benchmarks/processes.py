"""Several processes of one run: how they join, and how they end when one is lost.

JAX is what connects them. It also notices when one is lost, and ends the others: often
at once, by an error of what they compute together, and at the latest when as many
seconds have passed without a sign of life as it is told to wait.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax


def join(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    patience: int | None,
    words: "LastWords",
) -> None:
    """Join the other processes, if there are any; before JAX computes anything.

    Args:
      coordinator: `HOST:PORT`, where process 0 listens.
      processes: how many there are.
      process_id: of this one, from 0. If all three are `None`, JAX asks the cluster;
        where there is none, this is the only process.
      patience: seconds after which a silent process counts as lost, and in which all
        must have come; `None` leaves both to JAX.
      words: to leave while waiting, as JAX does not return if that fails.

    Raises:
      RuntimeError: if JAX cannot find out what it needs from the cluster.
      ValueError: if the arguments do not go together.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process_id,
    }
    if None in given.values() and set(given.values()) != {None}:
        msg = "give all of --coordinator, --processes and --process-id, or none of them"
        raise ValueError(msg)
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        msg = f"--coordinator must be HOST:PORT, got {coordinator!r}"
        raise ValueError(msg)
    if processes and process_id is not None and not 0 <= process_id < processes:
        msg = f"--process-id must be from 0 to {processes - 1}, got {process_id}"
        raise ValueError(msg)
    if patience:
        given["heartbeat_timeout_seconds"] = patience
        given["initialization_timeout"] = patience
    words.change(
        f"the processes did not come together at {coordinator or 'the coordinator'}. "
        "Start the same command on every host, and see that this port is free on the "
        "host of process 0 and open to the others."
    )
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        if coordinator or "coordinator_address" not in str(error):
            raise
        words.drop()  # There is no cluster.


def end_together(go: Callable[[], int], words: "LastWords") -> int:
    """Run this process's part; if it fails, end so that the others notice.

    A usual exit would wait for the others, and they for what does not come.

    Args:
      go: returns an exit status.
      words: to leave for other failures than an exit status.

    Returns:
      The exit status; not 0 only if this is the only process.
    """
    try:
        status = go()
    except BaseException:
        if not jax.distributed.is_initialized():
            words.drop()
            raise
        traceback.print_exc()
        status = 1
    else:
        words.drop()
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


class LastWords:
    """What is left to say if this process ends in the middle of something.

    When another process is lost, JAX ends this one from within, where Python has no
    say; the kernel does when memory runs out. A process of its own waits for the end of
    this one, and then writes the last words to standard error.
    """

    # On a line of their own: what this process wrote last may have broken off in one.
    _WAIT = (
        "import sys; words = ['', *sys.stdin][-1].lstrip(); "
        "sys.stderr.write(words and '\\n' + words)"
    )

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-ISc", self._WAIT],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Spared by an interrupt from the keyboard.
        )

    def change(self, words: str) -> None:
        """Leave other words.

        Args:
          words: one line.
        """
        print(f"{self._name}: {words}", file=self._process.stdin, flush=True)

    def drop(self) -> None:
        """Leave none: there is nothing to say any more."""
        if self._process.returncode is None:
            self._process.communicate("\n")
