"""Checkpoints of a run, by Orbax: the same call goes on where a run was killed.

Orbax writes a checkpoint beside its final place and renames it when it is whole, so that
a kill at any moment leaves the one before.
"""

import time
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core.types import Tree

_EVERY = 30.0
"""Seconds from one checkpoint to the next, at least."""
_SHARE = 0.02
"""The largest share of the time that writing them may take."""
_KEPT = 2


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      tree: arrays.
      columns: the history: lists of numbers by name, of any float dtype.
      seconds: how long the run had taken.
    """

    tree: Tree
    columns: dict[str, Any]
    seconds: float


class Checkpoints:
    """The newest two checkpoints of a run, in a folder: a context manager.

    Args:
      folder: a path, or a URL that Orbax understands.

    Raises:
      ImportError: if Orbax is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            msg = "`checkpoint` needs Orbax: pip install hfjax[checkpoint]"
            raise ImportError(msg) from error
        self.ocp, self.folder = ocp, str(folder)
        if "://" not in self.folder:
            self.folder = str(Path(folder).expanduser().absolute())
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT,
            cleanup_tmp_directories=True,
            # In the background it would take time from the run all the same.
            enable_async_checkpointing=False,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.ended, self.took = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.manager.close()

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self.ended >= max(_EVERY, self.took / _SHARE)

    def save(self, updates: int, saved: Saved) -> None:
        """Save now, unless these updates have been saved."""
        if self.manager.latest_step() == updates:
            return
        begun, ocp = time.monotonic(), self.ocp
        columns = {k: [float(x) for x in v] for k, v in saved.columns.items()}
        dtypes = {k: str(v[-1].dtype) for k, v in saved.columns.items()}
        about = {"arrays": _arrays(saved.tree), "columns": columns, "dtypes": dtypes}
        about["seconds"] = saved.seconds
        # A list: leaves of any tree have an order, and not always names.
        leaves = ocp.args.StandardSave(jax.tree.leaves(saved.tree))
        items = {"leaves": leaves, "about": ocp.args.JsonSave(about)}
        self.manager.save(updates, args=ocp.args.Composite(**items), force=True)
        self.ended = time.monotonic()
        self.took = self.ended - begun

    def restore(self, like: Tree) -> Saved | None:
        """Restore the newest, if there is one.

        Args:
          like: a tree of arrays with its structure, shapes, dtypes and places.

        Raises:
          ValueError: if what is there is something else.
        """
        step, ocp = self.manager.latest_step(), self.ocp
        if step is None:
            return None
        try:
            only = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = self.manager.restore(step, args=only)["about"]
            there = about["arrays"]
        except Exception as error:  # Orbax raises of many kinds.
            msg = f"{self.folder} has checkpoints that are not of `hfjax.fit`: {error}"
            raise ValueError(msg) from error
        here = _arrays(like)
        for name in [*here, *there]:
            if here.get(name) != there.get(name):
                was, now = (x.get(name, "missing") for x in (there, here))
                words = f"{name} is {was} there and {now} here"
                raise other(self.folder, words)
        wanted = ocp.args.StandardRestore([*map(_wanted, jax.tree.leaves(like))])
        found = self.manager.restore(step, args=ocp.args.Composite(leaves=wanted))
        tree = jax.tree.unflatten(
            jax.tree.structure(like), [*map(jnp.asarray, found["leaves"])]
        )
        columns = {
            name: [np.asarray(x, jnp.dtype(about["dtypes"][name])) for x in column]
            for name, column in about["columns"].items()
        }
        return Saved(tree, columns, about["seconds"])


def other(folder: str, words: str) -> ValueError:
    """Return the error for a checkpoint of another problem."""
    msg = (
        f"The checkpoint in {folder} is of another problem or optimizer: {words}. Choose "
        "another folder, or remove this one."
    )
    return ValueError(msg)


def _arrays(tree: Tree) -> dict[str, str]:
    """Describe the leaves, by name."""
    return {
        f"{name}{jax.tree_util.keystr(path)}": f"{leaf.dtype}{[*leaf.shape]}"
        for name, part in zip(("params", "state", "best"), tree, strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
    }


def _wanted(leaf: Any) -> Any:
    """Return what Orbax is to restore: an array in the same place.

    One that JAX may move to other devices must stay so: it is read into NumPy's memory.
    """
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if not is_key and not getattr(leaf, "committed", False):
        return np.zeros(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
