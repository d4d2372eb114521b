"""What the time of updates goes to, part by part: `costs --shares`.

Some updates of `hessian_free` with its defaults are timed as a whole. Each part of an
update is compiled alone and timed, in turn with the others, and counted as often as those
updates had it. f(θ) and the forward pass of the linearisation are the gradient's, which
XLA finds out in one compiled step, so they are not counted again. If there are twice as
many examples as `damping.searched` looks at, candidates and θ are evaluated on that part,
and the step that is taken on all. The rest is the vector work of conjugate gradients and
of the search for λ.

The network is the autoencoder of curves, some updates after a sparse start.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
from benchmarks.micro.product import Calls, time_rounds
from benchmarks.suites.curves import curves
from benchmarks.suites.images import CURVES, autoencoder

_FEW, _MANY = 1, 9  # of what is timed by the difference of two chains
_FACTOR, _TRIES, _CASES = 4.0, 8, 2000  # of `damping.searched`
_BEFORE, _UPDATES = 15, 20  # updates before those that count, and those


def run(cases: int, rounds: int, path: Path, console: Console) -> int:
    """Train a little, time, print and write down."""
    with console.status("compiling and timing"):
        calls, spent, runs = _measured(cases, _BEFORE, _UPDATES)
        taken = time_rounds(calls, rounds)
    seconds = {name: statistics.median(x[name] for x in taken) for name in calls}
    result = shares(seconds, spent, runs)
    measured = {"cases": cases, **machine.describe(), "rounds": taken}
    runs_ = [run._asdict() for run in runs]
    write_json(path, {**measured, "seconds": spent, "runs": runs_, "shares": result})
    console.print(_table(result, spent, runs))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


class Run(NamedTuple):
    """What an update had.

    Attributes:
      iterations: of conjugate gradients.
      evaluations: of f at candidates; at θ, too, if they are of a part.
      whole: evaluations on all examples, for the step that is taken.
    """

    iterations: int
    evaluations: int
    whole: int = 0


def evaluations(before: float, after: float) -> int:
    """Return how many λ a search looked at: the one found, and where it turned.

    Example:
      >>> [evaluations(1.0, after) for after in (1.0, 4.0, 16.0, 0.25)]
      [3, 3, 4, 4]
    """
    power = round(math.log(after / before) / math.log(_FACTOR)) if before > 0 else 0
    return min(_TRIES, power + 2 if power > 0 else 3 - power)


def shares(
    seconds: dict[str, float], whole: float, runs: list[Run]
) -> dict[str, dict[str, float]]:
    """Put together what the parts of some updates take.

    Returns:
      Of each part the seconds, how often the updates had it, and its share.

    Example:
      >>> times = dict.fromkeys(
      ...     ("gradient", "value", "looks", "build", "few_products", "few_solves"), 1.0
      ... )
      >>> times |= {"many_products": 9.0, "many_solves": 1.8}
      >>> found = shares(times, 25.0, [Run(10, 3)])
      >>> print(round(found["product"]["share"], 2), round(found["rest"]["share"], 2))
      0.4 0.36
    """
    updates = len(runs)
    iterations = sum(run.iterations for run in runs)

    def of_chain(name: str) -> float:
        return (seconds[f"many_{name}"] - seconds[f"few_{name}"]) / (_MANY - _FEW)

    product, solve = of_chain("products"), of_chain("solves")
    parts = {
        "product": (product, iterations),
        "gradient": (seconds["gradient"], updates),
        "linearisation": (
            max(seconds["few_products"] - _FEW * product - seconds["value"], 0.0),
            updates,
        ),
        "factors and inverses": (seconds["build"] - _FEW * solve, updates),
        "P⁻¹r": (solve, iterations + updates),
        "f at candidates": (seconds["looks"], sum(run.evaluations for run in runs)),
        "f at the step": (seconds["value"], sum(run.whole for run in runs)),
    }
    rest = whole - sum(each * often for each, often in parts.values())
    return {
        name: {"seconds": each, "times": often, "share": each * often / whole}
        for name, (each, often) in {**parts, "rest": (rest, 1)}.items()
    }


def _measured(cases: int, before: int, updates: int) -> tuple[Calls, float, list[Run]]:
    """Time updates some way from the start, and compile their parts."""
    images = jnp.asarray(curves(cases))
    batch = (images, images)
    init, model_fn = autoencoder(CURVES)
    objective = hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy())
    tx = hfjax.hessian_free(objective)
    params = jax.jit(init)(jax.random.key(0))

    def step(params: Any, state: Any, batch: tuple) -> Any:
        _, grads = objective.value_and_grad(params, batch)
        moves, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, moves), state

    stride = max(1, cases // _CASES)
    some = (images[::stride], images[::stride])
    partly = int(stride > 1)

    state: Any = tx.init(params)
    update, _ = compile_ahead(step, params, state, batch)
    for _ in range(before):
        params, state = update(params, state, batch)
    runs, spent = [], 0.0
    for _ in range(updates):
        damping, before_it = float(state.damping), (params, state)
        (params, state), taken = timed(lambda its=before_it: update(*its, batch))
        spent += taken.wall
        looked = evaluations(damping, float(state.damping)) + partly
        runs.append(Run(int(state.info.cg_iterations), looked, partly))

    def products(params: Any, batch: tuple, count: jax.Array) -> Any:
        product = hfjax.curvature.ggn(objective, params, batch)
        return jax.lax.fori_loop(0, count, lambda _, v: product(v), params)

    rule = hfjax.preconditioners.kronecker()

    def solves(params: Any, batch: tuple, damping: Any, count: jax.Array) -> Any:
        key = jax.random.key(0)
        precondition = rule.build(objective, params, batch, damping, key)
        return jax.lax.fori_loop(0, count, lambda _, r: precondition(r), params)

    few, many = jnp.array(_FEW), jnp.array(_MANY)
    gradient, _ = compile_ahead(objective.value_and_grad, params, batch)
    value, _ = compile_ahead(objective.value, params, batch)
    look, _ = compile_ahead(objective.value, params, some)
    chained, _ = compile_ahead(products, params, batch, few)
    solved, _ = compile_ahead(solves, params, batch, state.damping, few)
    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: gradient(params, batch),
        "value": lambda: value(params, batch),
        "looks": lambda: look(params, some),
        "few_products": lambda: chained(params, batch, few),
        "many_products": lambda: chained(params, batch, many),
        "build": lambda: solved(params, batch, state.damping, few),
        "few_solves": lambda: solved(params, batch, state.damping, few),
        "many_solves": lambda: solved(params, batch, state.damping, many),
    }
    return calls, spent, runs


def _table(result: dict[str, dict[str, float]], spent: float, runs: list[Run]) -> Table:
    iterations = statistics.mean(run.iterations for run in runs)
    title = (
        f"{len(runs)} updates of {iterations:.1f} iterations on average, "
        f"{spent / len(runs):.2f} s each"
    )
    cells = [["", "ms", "times", "share"]]
    for name, part in result.items():
        ms, often, share = 1000 * part["seconds"], part["times"], 100 * part["share"]
        cells.append([name, f"{ms:.0f}", f"{often:.0f}", f"{share:.0f} %"])
    return rich_table(cells, title=title)
