r"""Train the autoencoder by Hessian-free in several processes, on one host or on many.

    python -m benchmarks multihost
    python -m benchmarks multihost --coordinator 10.0.0.1:1234 --processes 2 \
        --process-id 0 --out /shared/run

The same command runs on every host, but for `--process-id`. Those three options are for
hosts that know nothing of each other: on TPU pods and under SLURM or Open MPI, JAX finds
out itself. Cases are shared out among all devices of all processes.

If a process is lost, the others end too: often at once, and after `--patience` seconds
at the latest. The same command, on as many hosts as there are then, goes on from the
newest checkpoint.
"""

import argparse
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import hfjax
from benchmarks import checkpoint, options
from benchmarks.history import write_json
from benchmarks.network import autoencoder
from benchmarks.problem import SETUPS
from benchmarks.processes import LastWords, end_together, join
from benchmarks.shared_images import AXIS, share_out

Carry: TypeAlias = dict[str, Any]
"""Parameters and state: all that the next update needs."""

_CURVES = SETUPS["curves"]
_CASES = 20_000  # as Martens had
_KEPT = 2
_NAME = "multihost"
_LASTING = ("cases", "layers", "max_iterations", "seed")
"""Options that a run keeps when it goes on; processes and updates may be others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--processes", type=options.count, help="how many there are")
    add("--process-id", type=int, help="of this one, from 0")
    add(
        "--patience",
        type=options.count,
        help="seconds after which a silent process counts as lost, and in which all "
        "must have come; default: JAX's, 100 and 300",
    )
    add("--fsdp", action="store_true", help="share out the parameters too")
    add("--cases", type=options.count, default=_CASES, help=f"default: {_CASES}")
    add(
        "--layers",
        type=options.layers,
        default=_CURVES.encoder,
        help="sizes from the pixels to the code; default: Martens'",
    )
    add("--updates", type=options.count, default=100, help="default: 100")
    add(
        "--max-iterations",
        type=options.count,
        default=250,
        help="of conjugate gradients in an update; default: 250",
    )
    add("--seed", type=int, default=0, help="of the start; default: 0")
    add(
        "--save-every",
        type=options.count,
        default=10,
        help="updates between checkpoints; default: 10",
    )
    add(
        "--out",
        default="runs/multihost",
        help="folder that all hosts see, for checkpoints; default: runs/multihost",
    )


def run(args: argparse.Namespace) -> int:
    """Train, from the newest checkpoint on.

    Args:
      args: the options.

    Returns:
      The exit status: 0; 2 if there is no such run.
    """
    words = LastWords(f"python -m benchmarks {_NAME}")
    return end_together(lambda: _run(args, words), words)


def _run(args: argparse.Namespace, words: LastWords) -> int:
    folder = Path(args.out).absolute()
    try:
        join(
            args.coordinator,
            args.processes,
            args.process_id,
            patience=args.patience,
            words=words,
        )
        _open(folder, {name: getattr(args, name) for name in _LASTING})
    except (OSError, RuntimeError, ValueError) as error:
        return options.refuse(_NAME, error)
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
    checkpoint.check(folder, lasting)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "settings.json", lasting)


def train(args: argparse.Namespace, folder: Path) -> Any:
    """Train with all processes, each of which calls this with the same options.

    Args:
      args: the options.
      folder: for the checkpoints.

    Returns:
      Parameters and state, as `{"params": …, "state": …}`.

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
        f"mesh {dict(mesh.shape)}: {args.cases:,} cases shared out, parameters "
        f"{'shared out' if args.fsdp else 'on every device'}"
    )
    cases = share_out(args.cases, mesh)
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
            carry = training.step(carry, *cases)
            row = hfjax.diagnostics.scalars(carry["state"])  # Waits for the update.
            done += 1
            _say(
                f"update {done}: f {row['value_after']:.6g}, λ {row['damping']:.3g}, "
                f"ρ {row['reduction_ratio']:.3f}, {row['cg_iterations']} CG iterations, "
                f"{time.monotonic() - begun:.2f} s"  # Of the first, compiling too.
            )
            if done % args.save_every == 0 or done == args.updates:
                manager.save(done, args=ocp.args.StandardSave(carry), force=True)
    return carry


class Training(NamedTuple):
    """What a run is made of.

    Attributes:
      start: `() -> carry`, compiled.
      step: `(carry, images, weights) -> carry`, compiled: one update.
      like: shapes, types and shardings of a carry.
    """

    start: Callable[[], Carry]
    step: Callable[[Carry, jax.Array, jax.Array], Carry]
    like: Carry


def build(args: argparse.Namespace, mesh: Mesh) -> Training:
    """Build start and update of a run.

    Args:
      args: the options.
      mesh: of the devices.
    """
    network = autoencoder(args.layers)
    loss, decay = hfjax.losses.sigmoid_cross_entropy(), _CURVES.weight_decay
    objective = hfjax.Objective(network.model_fn, loss, weight_decay=decay)
    tx = hfjax.recipes.martens2010(objective, max_iterations=args.max_iterations)

    def start() -> Carry:
        params = network.init(jax.random.key(args.seed))
        return {"params": params, "state": tx.init(params)}

    def step(carry: Carry, images: jax.Array, weights: jax.Array) -> Carry:
        params, batch = carry["params"], (images, images, weights)
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


def _say(line: str) -> None:
    """Print a line, in one of the processes."""
    if jax.process_index() == 0:
        print(line, flush=True)
