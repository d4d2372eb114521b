"""What the time of an exact update goes to, part by part: `costs --exact`.

Updates of `solver="auto"` are timed as a whole, some way from the start, and each part is
compiled alone and timed in turn with them, in seconds of the processor, or of the clock on
the wall where an accelerator computes. The flops are those that a part cannot do without:
three forward passes for a gradient or for J̃, n² (rows or columns) for a square of J̃ of n
rows, n³/3 for a Cholesky factor, 2 rows · columns for a product with J̃. The limit is what
they take at the speed of a product of two float64 matrices, measured beside the rest; a
part that is bound by memory stays far above it.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.machine import compile_ahead, timed
from benchmarks.harness.table import rich_table
from benchmarks.optimizers import MOMENTUM
from benchmarks.suites import equations
from hfjax import sample_space
from hfjax.curvature import jacobian
from hfjax.curvature.damped_jacobian import Problem, decomposed

_SIDE = 1500  # of the matrices whose product tells how fast the processor is


def run(
    name: str,
    updates: int,
    rounds: int,
    stored: int | None,
    path: Path,
    console: Console,
) -> int:
    """Train for some updates, time, print and write down.

    With `stored`, a J of more numbers is not stored in the updates.
    """
    with console.status("compiling and timing"):
        calls, flops, size = _measured(name, updates, stored)
        for call in calls.values():
            jax.block_until_ready(call())
        clock = "processor" if jax.default_backend() == "cpu" else "wall"
        taken = [
            {part: getattr(timed(call)[1], clock) for part, call in calls.items()}
            for _ in range(rounds)
        ]
    seconds = {part: statistics.median(x[part] for x in taken) for part in calls}
    speed = 2 * _SIDE**3 / seconds.pop("a product of matrices")
    limits = {part: flops[part] / speed for part in flops}
    measured = {
        "problem": name,
        "updates": updates,
        "stored": stored,
        **size,
        **machine.describe(),
    }
    measured |= {"speed": speed, "seconds": seconds, "limits": limits}
    write_json(path, {**measured, "rounds": taken})
    console.print(_table(measured))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def _measured(
    name: str, updates: int, stored: int | None
) -> tuple[dict[str, Callable[[], Any]], dict[str, float], dict[str, Any]]:
    experiment = equations.EXPERIMENTS[name]
    f, params = experiment.objective, experiment.start(jax.random.key(0))
    batch = experiment.batch(jax.random.key(0))
    solver = "auto"
    if stored is not None:
        solver = sample_space.cholesky(momentum=MOMENTUM, stored=stored)
    tx = hfjax.hessian_free(f, solver=solver)

    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = f.value_and_grad(params, batch)
        moves, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, moves), state

    state: Any = tx.init(params)
    update, _ = compile_ahead(step, params, state, batch)
    for _ in range(updates):
        params, state = update(params, state, batch)

    def of_j(params: Any, batch: Any) -> Any:
        return jacobian.jacobian(f, params, batch)[:2]

    def whole(rows: Any, residuals: jax.Array) -> jacobian.Jacobian:
        return jacobian.Jacobian(rows, residuals, lambda v: residuals)

    def square(rows: Any, residuals: jax.Array) -> jax.Array:
        j = whole(rows, residuals)
        return j.of_samples() if rows_ <= columns else j.of_parameters()

    def values(rows: Any, residuals: jax.Array) -> Any:
        no_decay = jnp.zeros((), residuals.dtype)
        j = whole(rows, residuals)
        given = Problem(j, no_decay, None, j.transpose(-residuals), None)
        return decomposed(given)[:2]

    def correction(rows: Any, residuals: jax.Array, params: Any, batch: Any) -> Any:
        j, made = whole(rows, residuals), jacobian.jacobian(f, params, batch)
        u = made.residuals_at(params) - j.product(params)
        return j.transpose(u)

    rows, residuals = jax.jit(of_j)(params, batch)
    rows_, columns = len(residuals), optax.tree.size(params)
    least, most = sorted((rows_, columns))
    matrix = jnp.eye(least) + jax.jit(square)(rows, residuals)
    parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "gradient": (f.value_and_grad, (params, batch)),
        "J": (of_j, (params, batch)),
        "its square": (square, (rows, residuals)),
        "its singular values": (values, (rows, residuals)),
        "a Cholesky factor": (jnp.linalg.cholesky, (matrix,)),
        "a correction": (correction, (rows, residuals, params, batch)),
        "f": (f.value, (params, batch)),
        "a product of matrices": (jnp.matmul, (jnp.ones((_SIDE, _SIDE)),) * 2),
    }
    calls: dict[str, Callable[[], Any]] = {
        "an update": lambda: update(params, state, batch)
    }
    for part, (fn, args) in parts.items():
        compiled, _ = compile_ahead(fn, *args)
        calls[part] = lambda compiled=compiled, args=args: compiled(*args)
    forward = 2 * jacobian.size(f, params, batch).forward
    flops = {
        "gradient": 3.0 * forward,
        "J": 3.0 * forward,
        "its square": float(most * least**2),
        "a Cholesky factor": least**3 / 3,
        "a correction": forward + 4.0 * rows_ * columns + 2.0 * least**2,
        "f": float(forward),
    }
    size = {"rows": rows_, "columns": columns, "damping": float(state.damping)}
    return calls, flops, size


def _table(measured: dict[str, Any]) -> Table:
    cells = [["", "ms", "limit, ms", "times"]]
    for part, seconds in measured["seconds"].items():
        limit = measured["limits"].get(part)
        known = (
            [] if limit is None else [f"{1000 * limit:.1f}", f"{seconds / limit:.1f}"]
        )
        cells.append([part, f"{1000 * seconds:.1f}", *known, *[""] * (2 - len(known))])
    title = "{problem} after {updates} updates, λ = {damping:.1e}, J of {rows:,} × {columns:,}"
    speed = f"{measured['speed'] / 1e9:.0f} Gflops per second"
    return rich_table(cells, title=f"{title.format(**measured)}; {speed}")
