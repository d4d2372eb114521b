"""Checkpoints of a run, by Orbax: the same command goes on where a run was killed.

A checkpoint holds all that the next update needs, and the history so far. Batches depend
on the number of updates and on what the checkpoint holds only. On the same machine and
versions a run that was killed therefore makes the same updates as one that was not, bit
for bit. The clock decides when a run ends, and so how many updates there are.
"""

import contextlib
import gc
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.harness.history import Run, write_json

COST = 0.015
"""Largest fraction of the time that goes into writing checkpoints: after one that took
0.1 s, the next comes 7 s later."""

_KEPT = 2
_GUESS = 0.1  # seconds that one takes, before the first has been written


class NotWholeError(ValueError):
    """There are checkpoints, and none of them is whole."""


class Checkpoints:
    """The checkpoints of one run: the newest two, in a folder of their own.

    A context manager. Orbax writes into a temporary folder and renames it when all is
    written, so that a kill in the middle leaves the checkpoint before. A digest finds
    what a disk has spoiled.

    Attributes:
      folder: for them.
      cost: fraction of the time that `keep` may take.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], *, cost: float = COST
    ) -> None:
        check(folder, settings)
        self.folder, self.cost = folder, cost
        folder.mkdir(parents=True, exist_ok=True)
        write_json(_settings_file(folder), settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT,
            cleanup_tmp_directories=True,
            # In the background it would take time from the run, unseen.
            enable_async_checkpointing=False,
        )
        with _quiet():  # A kill may have left one that was half deleted.
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._opened = self._ended = time.monotonic()
        self._spent, self._took = 0.0, _GUESS

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def keep(self, carry: Any, run: Run) -> None:
        """Save, if it is time: see `cost`."""
        if self._is_time():
            self.save(carry, run)

    def save(self, carry: Any, run: Run) -> None:
        """Save now: whole or not at all, whenever the process may be killed."""
        begun = time.monotonic()
        document = run.document()
        document["digest"] = digest(carry, document)
        items = ocp.args.Composite(
            carry=ocp.args.StandardSave(carry), run=ocp.args.JsonSave(document)
        )
        # Numbered in the order of writing, so that a spoiled one is never in the way.
        latest = self._manager.latest_step() or 0
        self._manager.save(latest + 1, args=items, force=True)
        self._ended = time.monotonic()
        self._took = self._ended - begun
        self._spent += self._took

    def restore(self, like: Callable[[], Any]) -> tuple[Any, Run] | None:
        """Restore the newest that is whole; warn of those that are not.

        Returns:
          The carry and the history; `None` if there is no checkpoint.

        Raises:
          NotWholeError: if there are some, and none is whole.
        """
        spoiled = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                document = _attempt(self._document, step)
                # Not attempted: this may compile, and if it fails the checkpoint is whole.
                model = like()
                carry = _attempt(self._carry, step, document, model)
            except _SpoiledError as error:
                spoiled.append(f"{self.folder / str(step)} is not whole: {error}")
                continue
            for words in spoiled:
                print(
                    f"Warning: {words}; going on from the one before", file=sys.stderr
                )
            return carry, Run.of(_undigested(document))
        if spoiled:
            msg = f"{'; '.join(spoiled)}: remove {self.folder} to start anew"
            raise NotWholeError(msg)
        return None

    def _is_time(self) -> bool:
        """Return whether another costs no more than its share, so far and of late."""
        now = time.monotonic()
        lately = now - self._ended >= self._took / self.cost
        return lately and (now - self._opened) * self.cost >= self._spent + self._took

    def _document(self, step: int) -> dict[str, Any]:
        """Read the history of one."""
        item = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._manager.restore(step, args=item)["run"]

    def _carry(self, step: int, document: dict[str, Any], like: Any) -> Any:
        """Read the carry of one, and check that all is what was written."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        item = ocp.args.Composite(carry=ocp.args.StandardRestore(abstract))
        carry = self._manager.restore(step, args=item)["carry"]
        if document["digest"] != digest(carry, _undigested(document)):
            msg = "its digest is another"
            raise ValueError(msg)
        return carry


class _SpoiledError(Exception):
    """A checkpoint cannot be read."""


def _undigested(document: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in document.items() if name != "digest"}


def _attempt(read: Callable[..., Any], *args: Any) -> Any:
    """Read something from a checkpoint that may be spoiled."""
    with _quiet():
        try:
            return read(*args)
        except Exception as error:  # Orbax raises of many kinds.
            first = (str(error).splitlines() or [""])[0]
            words = f"{type(error).__name__}: {first[:100]}"
        gc.collect()  # Else what it was reading complains later, and loudly.
    raise _SpoiledError(words)


def check(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse checkpoints of a run with other settings.

    Raises:
      ValueError: if they are not those that the folder was made for.
    """
    path = _settings_file(folder)
    if not path.exists():
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        msg = f"{path} does not hold settings: {error}. Remove {folder}."
        raise ValueError(msg) from error
    for name, value in json.loads(json.dumps(settings)).items():
        if found.get(name) != value:
            msg = (
                f"{folder} is of an unfinished run with {name} {found.get(name)}, not "
                f"{value}: choose another --out, or remove it"
            )
            raise ValueError(msg)


def digest(tree: Any, document: dict[str, Any] | None = None) -> str:
    """Digest every bit: Orbax alone would not notice one that has flipped."""
    found = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for leaf in jax.tree.leaves(tree):
        typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if typed_key else leaf)
        found.update(f"{leaf.dtype}{leaf.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def remove(folder: Path) -> None:
    """Remove checkpoints that are no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def _settings_file(folder: Path) -> Path:
    return folder / "settings.json"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the pages that Orbax logs about spoiled files, besides raising."""
    hook, level = sys.unraisablehook, logging.getLogger("absl").level
    sys.unraisablehook = lambda _: None
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logging.getLogger("absl").setLevel(level)
