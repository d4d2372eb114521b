"""The run that `restart` kills: Hessian-free with everything that has a state.

    python -m benchmarks.restart_run FOLDER UPDATES

λ by Levenberg-Marquardt, warm starts, a preconditioner of random signs (so there is a
key), and batches in turn of a size that does not divide the data.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import hfjax
from benchmarks import checkpoint, data
from benchmarks.checkpoint import Checkpoints
from benchmarks.history import Row, Run
from benchmarks.network import Layers, autoencoder
from benchmarks.race import Limits, measurer, race_on
from benchmarks.racers import Carry, Racer, compile_ahead, zero_updates

COST = 0.5
"""Of the time goes into checkpoints: they come every few updates, and kills hit them."""

_CASES, _BATCH = 200, 64
_LAYERS = (data.PIXELS, 60, 6)
_PROGRESS = "update"


def start() -> tuple[hfjax.Objective, Layers]:
    """Return f, and the parameters to start from."""
    network = autoencoder(_LAYERS)
    loss = hfjax.losses.sigmoid_cross_entropy()
    objective = hfjax.Objective(network.model_fn, loss, weight_decay=2e-5)
    return objective, jax.jit(network.init)(jax.random.key(0))


def checkpoints(folder: Path) -> Checkpoints[Row]:
    """Open the run's checkpoints.

    Args:
      folder: for them.
    """
    return Checkpoints(folder, {"cases": _CASES, "batch": _BATCH}, Row, cost=COST)


def empty_run() -> Run[Row]:
    """Return a run to fill in."""
    return Run[Row]("hf", "hf", 0.0)


def read_end(folder: Path) -> Run[Row]:
    """Read a run that has come to its end.

    Args:
      folder: of its checkpoints.

    Raises:
      ValueError: if it has not.
    """
    run = empty_run()
    _, params = start()
    with checkpoints(folder) as its:
        ended = its.restore(lambda _: Carry(params, None, zero_updates()), run)
    if ended is None or not ended.finished:
        msg = f"The run in {folder} has not come to its end"
        raise ValueError(msg)
    return run


def _racer(objective: hfjax.Objective, params: Layers, images: jax.Array) -> Racer:
    """Build the racer; its `order` are the cases of its last batch."""
    signs = functools.partial(hfjax.diagonals.ggn_rademacher, num_probes=1)
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=10.0),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=20,
            stopping=hfjax.stopping.martens2010(),
            keep=hfjax.iterates.grid(),
            warm_start_decay=0.95,
        ),
        preconditioner=hfjax.preconditioners.diagonal(signs),
        backtracking=hfjax.backtracking.early_stop(),
        seed=1,
    )

    def step(carry: Carry, images: jax.Array) -> Carry:
        everything = (images, jnp.arange(_CASES))
        part, cases = hfjax.minibatching.in_turn(everything, _BATCH, carry.updates)
        batch = (part, part)
        _, grads = objective.value_and_grad(carry.params, batch)
        updates, state = tx.update(grads, carry.state, carry.params, batch=batch)
        moved: Any = optax.apply_updates(carry.params, updates)
        return Carry(moved, state, carry.updates + 1, cases)

    def init(params: Layers) -> Carry:
        order = jnp.arange(_BATCH)
        return Carry(params, tx.init(params), zero_updates(), order)

    def read(carry: Carry) -> dict[str, Any]:
        cases = jax.device_get(carry.order).tolist()
        state = checkpoint.digest(carry)
        return hfjax.diagnostics.scalars(carry.state) | {"cases": cases, "all": state}

    compiled, seconds = compile_ahead(step, init(params), images)
    return Racer("hf", "hf", init, lambda carry: compiled(carry, images), read, seconds)


def main(folder: Path, updates: int) -> None:
    """Run to the end, from the newest checkpoint on; print where it is.

    Args:
      folder: for the checkpoints.
      updates: of the whole run.
    """
    objective, params = start()
    images = jnp.asarray(data.curves(_CASES, 1).train)
    measure = measurer(objective, images, images[:1], params)
    run = empty_run()

    def watch(_: float) -> None:
        print(_PROGRESS, run.last.updates, flush=True)

    with checkpoints(folder) as its:
        build = functools.partial(_racer, objective, params, images)
        race_on(build, params, measure, Limits(updates=updates), run, watch, its)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
