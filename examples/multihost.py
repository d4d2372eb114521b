r"""Train a network by Hessian-free in several processes, on one host or on many.

    python examples/multihost.py
    python examples/multihost.py --coordinator 10.0.0.1:1234 --processes 2 \
        --process-id 0 --out /data/run

A script to copy: replace `examples_from` and `model_fn` by your own. The same command runs
on every host, except for `--process-id`. Those three options are for hosts that know
nothing of each other: on TPU pods and under SLURM or Open MPI, JAX finds out itself. The
examples are shared out among all devices of all processes.

If a process is lost, the others end too: often at once, and after `--patience` seconds at
the latest. The same command, on as many hosts as there are then, goes on from the newest
checkpoint.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hfjax

Carry: TypeAlias = dict[str, Any]
"""Parameters and state: all that the next update needs."""

AXIS = "cases"
"""The axis of the mesh that examples are shared out along."""

_KEPT = 2
_BLOCK = 100  # examples that are drawn together
_LASTING = ("cases", "layers", "max_iterations", "seed")
"""Options that a run keeps when it goes on; processes and updates may be others."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on standard error, without the synopsis."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `None` is that of the process."""
    parser = Parser(prog="multihost.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--processes", type=_count, help="how many there are")
    add("--process-id", type=int, help="of this one, from 0")
    add(
        "--patience",
        type=_count,
        help="seconds after which a silent process counts as lost, and in which all "
        "must have come; default: JAX's, 100 and 300",
    )
    add("--fsdp", action="store_true", help="share out the parameters too")
    add("--cases", type=_count, default=20_000, help="examples; default: 20000")
    add(
        "--layers",
        type=lambda word: tuple(map(_count, word.split(","))),
        default=(64, 256, 256, 8),
        help="sizes from the inputs to the outputs; default: 64,256,256,8",
    )
    add("--updates", type=_count, default=100, help="default: 100")
    add("--max-iterations", type=_count, default=250, help="of CG; default: 250")
    add("--seed", type=int, default=0, help="of the start; default: 0")
    add("--save-every", type=_count, default=10, help="updates; default: 10")
    add(
        "--out",
        default="runs/multihost",
        help="folder that all hosts see, for checkpoints; default: runs/multihost",
    )
    return parser.parse_args(words)


def examples_from(start: int, stop: int, layers: tuple[int, ...]) -> np.ndarray:
    """Make examples `start` to `stop`, the same whichever process makes them.

    An example is a row of inputs and targets. The number of a block is its seed.
    """
    inputs, outputs = layers[0], layers[-1]
    teacher = np.random.default_rng(0).normal(size=(inputs, outputs))
    rows = []
    for first in range(start - start % _BLOCK, stop, _BLOCK):
        generator = np.random.default_rng(1 + first // _BLOCK)
        x = generator.normal(size=(_BLOCK, inputs))
        block = np.concatenate([x, np.sin(x @ teacher / inputs**0.5)], axis=1)
        rows.append(block[max(0, start - first) : stop - first])
    empty = np.zeros((0, inputs + outputs))
    return np.concatenate([empty, *rows]).astype(np.float32)


def model_fn(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Compute the outputs of a tanh network."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def share_out(
    cases: int, layers: tuple[int, ...], mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Make every device's share of the examples where the device is.

    All devices have the same number, so some of the last rows may be padding.

    Returns:
      Rows of inputs and targets, and their weights, which are 0 for padding.
    """
    total = -(-cases // mesh.size) * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    width = layers[0] + layers[-1]

    def rows(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        found = np.zeros((stop - start, width), np.float32)
        known = examples_from(start, max(start, min(stop, cases)), layers)
        found[: len(known)] = known
        return found

    def weights(index: Any) -> np.ndarray:
        return (np.arange(total)[index] < cases).astype(np.float32)

    return (
        jax.make_array_from_callback((total, width), sharding, rows),
        jax.make_array_from_callback((total,), sharding, weights),
    )


class Training(NamedTuple):
    """What a run is made of.

    Attributes:
      start: `() -> carry`, compiled.
      step: `(carry, rows, weights) -> carry`, compiled: one update.
      like: shapes, types and shardings of a carry.
    """

    start: Callable[[], Carry]
    step: Callable[[Carry, jax.Array, jax.Array], Carry]
    like: Carry


def build(args: argparse.Namespace, mesh: Mesh) -> Training:
    """Build start and update of a run."""
    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    tx = hfjax.recipes.martens2010(objective, max_iterations=args.max_iterations)

    def start() -> Carry:
        keys = jax.random.split(jax.random.key(args.seed), len(args.layers) - 1)
        params = [
            {
                "kernel": jax.random.normal(key, shape) * shape[0] ** -0.5,
                "bias": jnp.zeros(shape[1]),
            }
            for key, shape in zip(keys, itertools.pairwise(args.layers), strict=True)
        ]
        return {"params": params, "state": tx.init(params)}

    def step(carry: Carry, rows: jax.Array, weights: jax.Array) -> Carry:
        inputs, targets = jnp.split(rows, [args.layers[0]], axis=1)
        params, batch = carry["params"], (inputs, targets, weights)
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, carry["state"], params, batch=batch)
        return {"params": optax.apply_updates(params, updates), "state": state}

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        divided = args.fsdp and leaf.shape and leaf.shape[0] % mesh.size == 0
        spec = PartitionSpec(AXIS) if divided else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    like = jax.tree.map(placed, jax.eval_shape(start))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    start, step = (jax.jit(fn, out_shardings=shardings) for fn in (start, step))
    return Training(start, step, like)


def train(args: argparse.Namespace, folder: Path) -> Carry:
    """Train with all processes, each of which calls this with the same options.

    Raises:
      AssertionError: if another process has other options.
    """
    same = [value for name, value in sorted(vars(args).items()) if name != "process_id"]
    words = "The processes were given different options"
    multihost_utils.assert_equal(np.uint32(zlib.crc32(repr(same).encode())), words)
    devices, processes = jax.device_count(), jax.process_count()
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
    _say(
        f"{processes} processes, {devices} devices ({jax.devices()[0].device_kind}), "
        f"mesh {dict(mesh.shape)}: {args.cases:,} examples shared out, parameters "
        f"{'shared out' if args.fsdp else 'on every device'}"
    )
    examples = share_out(args.cases, args.layers, mesh)
    training = build(args, mesh)
    saving = ocp.CheckpointManagerOptions(
        max_to_keep=_KEPT,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    with ocp.CheckpointManager(folder / "checkpoints", options=saving) as manager:
        done = manager.latest_step() or 0
        if done:
            carry = manager.restore(done, args=ocp.args.StandardRestore(training.like))
            _say(f"Going on after update {done}")
        else:
            carry = training.start()
        while done < args.updates:
            begun = time.monotonic()
            carry = training.step(carry, *examples)
            row = hfjax.diagnostics.scalars(carry["state"])  # Waits for the update.
            done += 1
            _say(
                f"update {done}: f {row['value_after']:.6g}, λ {row['damping']:.3g}, "
                f"ρ {row['reduction_ratio']:.3f}, {row['cg_iterations']} CG iterations, "
                f"{time.monotonic() - begun:.2f} s"  # The first includes compiling.
            )
            if done % args.save_every == 0 or done == args.updates:
                manager.save(done, args=ocp.args.StandardSave(carry), force=True)
    return carry


def join(args: argparse.Namespace, words: "LastWords") -> None:
    """Join the other processes, if there are any; before JAX computes anything.

    Raises:
      RuntimeError: if JAX cannot find out what it needs from the cluster.
      ValueError: if the options do not go together.
    """
    given: dict[str, Any] = {
        "coordinator_address": args.coordinator,
        "num_processes": args.processes,
        "process_id": args.process_id,
    }
    if None in given.values() and set(given.values()) != {None}:
        msg = "give all of --coordinator, --processes and --process-id, or none of them"
        raise ValueError(msg)
    if args.coordinator and not args.coordinator.rpartition(":")[2].isdecimal():
        msg = f"--coordinator must be HOST:PORT, got {args.coordinator!r}"
        raise ValueError(msg)
    if args.processes and not 0 <= args.process_id < args.processes:
        msg = f"--process-id must be from 0 to {args.processes - 1}, got {args.process_id}"
        raise ValueError(msg)
    if args.patience:
        given["heartbeat_timeout_seconds"] = args.patience
        given["initialization_timeout"] = args.patience
    words.change(
        f"the processes did not come together at {args.coordinator or 'the coordinator'}. "
        "Start the same command on every host, and see that this port is free on the "
        "host of process 0 and open to the others."
    )
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        if args.coordinator or "coordinator_address" not in str(error):
            raise
        words.drop()  # There is no cluster.


class LastWords:
    """What is left to say if this process ends in the middle of something.

    When another process is lost, JAX ends this one from within, where Python has no
    say; the kernel does when memory runs out. A process of its own waits for the end of
    this one, and then writes the last words to standard error.
    """

    # On a line of their own: the last line of this process may have broken off.
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
        """Leave other words, in one line."""
        print(f"{self._name}: {words}", file=self._process.stdin, flush=True)

    def drop(self) -> None:
        """Leave none: there is nothing to say any more."""
        if self._process.returncode is None:
            self._process.communicate("\n")


def main(given: list[str] | None = None) -> int:
    """Train, from the newest checkpoint on; end so that other processes notice.

    A usual exit would wait for the others, and they for what does not come.

    Returns:
      The exit status: 0; 2 if there is no such run; 1 if it failed beside others.
    """
    args, words = arguments(given), LastWords("multihost.py")
    try:
        status = _run(args, words)
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


def _run(args: argparse.Namespace, words: LastWords) -> int:
    folder = Path(args.out).absolute()
    try:
        join(args, words)
        _open(folder, {name: getattr(args, name) for name in _LASTING})
    except (OSError, RuntimeError, ValueError) as error:
        print(f"multihost.py: {error}", file=sys.stderr)
        return 2
    if jax.process_count() > 1:
        words.change(
            f"process {jax.process_index()} of {jax.process_count()} ended before its "
            "time: it failed, or another process was lost. The same command on all "
            f"hosts goes on from the newest checkpoint in {folder}."
        )
    train(args, folder)
    return 0


def _open(folder: Path, lasting: dict[str, Any]) -> None:
    """Make the folder, or see that it is of the same run."""
    path, lasting = folder / "settings.json", json.loads(json.dumps(lasting))
    found = json.loads(path.read_text()) if path.exists() else lasting
    for name, value in lasting.items():
        if found.get(name) != value:
            msg = f"{folder} is of a run with {name} {found.get(name)}, not {value}"
            raise ValueError(msg)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name("settings.json.part")
        part.write_text(json.dumps(lasting))
        os.replace(part, path)


def _count(word: str) -> int:
    """Read a whole number of at least 1."""
    if not word.isdecimal() or int(word) < 1:
        msg = f"must be a whole number of at least 1, got {word!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(word)


def _say(line: str) -> None:
    """Print a line, in one of the processes."""
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
