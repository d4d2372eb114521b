"""What an update's time goes to, part by part.

    python -m benchmarks shares

Each part of an update of `recipes.kronecker_factored` is compiled alone and timed, in
turn with the others; an update takes some of them several times. What is left of the
whole update's time is the vector work of conjugate gradients and of the search for λ,
and what the parts do not share when they are compiled alone.

The network is the autoencoder of curves, some updates after a sparse start.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import data, options
from benchmarks.history import write_json
from benchmarks.network import autoencoder
from benchmarks.problem import SETUPS, machine
from benchmarks.product import Calls, time_rounds
from benchmarks.racers import compile_ahead

_FEW, _MANY = 1, 9  # of what is timed by the difference of two chains
_EVALUATIONS = 4  # f at θ, and at three or four λ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--cases", type=options.count, default=2000, help="images; default: 2000")
    add("--updates", type=options.count, default=15, help="before; default: 15")
    add("--rounds", type=options.count, default=7, help="of timing; default: 7")
    add("--out", default="runs/shares.json", help="default: runs/shares.json")


def run(args: argparse.Namespace) -> int:
    """Train a little, time, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if the numbers cannot be written.
    """
    console, path = Console(), Path(args.out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except OSError as error:
        return options.refuse("shares", error)
    with console.status("compiling and timing"):
        calls, info = _calls(args.cases, args.updates)
        rounds = time_rounds(calls, args.rounds)
    iterations = int(info.cg_iterations)
    result = shares(
        {name: statistics.median(x[name] for x in rounds) for name in calls}, iterations
    )
    measured = {"arguments": vars(args), **machine(), "rounds": rounds}
    write_json(path, {**measured, "iterations": iterations, "shares": result})
    console.print(_table(result, iterations))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def shares(seconds: dict[str, float], iterations: int) -> dict[str, dict[str, float]]:
    """Put together what an update's parts take.

    Args:
      seconds: of each call that was timed.
      iterations: of conjugate gradients in the update.

    Returns:
      Of each part the seconds, how often an update has it, and its share.

    Example:
      >>> times = dict.fromkeys(
      ...     ("gradient", "value", "build", "few_products", "few_solves"), 1.0
      ... )
      >>> times |= {"many_products": 9.0, "many_solves": 1.8, "update": 25.0}
      >>> found = shares(times, iterations=10)
      >>> print(round(found["product"]["share"], 2), round(found["rest"]["share"], 2))
      0.4 0.32
    """

    def of_chain(name: str) -> float:
        return (seconds[f"many_{name}"] - seconds[f"few_{name}"]) / (_MANY - _FEW)

    product, solve = of_chain("products"), of_chain("solves")
    parts = {
        "gradient": (seconds["gradient"], 1),
        "linearisation": (seconds["few_products"] - _FEW * product, 1),
        "factors and inverses": (seconds["build"] - _FEW * solve, 1),
        "product": (product, iterations),
        "P⁻¹r": (solve, iterations + 2),
        "value": (seconds["value"], _EVALUATIONS),
    }
    whole = seconds["update"]
    rest = whole - sum(each * often for each, often in parts.values())
    return {
        name: {"seconds": each, "times": often, "share": each * often / whole}
        for name, (each, often) in {**parts, "rest": (rest, 1)}.items()
    }


def _calls(cases: int, updates: int) -> tuple[Calls, Any]:
    """Compile what is timed, some updates after the start."""
    images = jnp.asarray(data.curves(cases, 1).train)
    batch = (images, images)
    init, model_fn = autoencoder(SETUPS["curves"].encoder)
    objective = hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy())
    tx = hfjax.recipes.kronecker_factored(objective)
    params = jax.jit(init)(jax.random.key(0))

    def step(params: Any, state: Any, batch: tuple) -> Any:
        _, grads = objective.value_and_grad(params, batch)
        moves, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, moves), state

    state: Any = tx.init(params)
    update, _ = compile_ahead(step, params, state, batch)
    for _ in range(updates):
        params, state = update(params, state, batch)
    _, last = update(params, state, batch)

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
    chained, _ = compile_ahead(products, params, batch, few)
    solved, _ = compile_ahead(solves, params, batch, state.damping, few)
    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: gradient(params, batch),
        "value": lambda: value(params, batch),
        "few_products": lambda: chained(params, batch, few),
        "many_products": lambda: chained(params, batch, many),
        "build": lambda: solved(params, batch, state.damping, few),
        "few_solves": lambda: solved(params, batch, state.damping, few),
        "many_solves": lambda: solved(params, batch, state.damping, many),
        "update": lambda: update(params, state, batch),
    }
    return calls, last.info


def _table(result: dict[str, dict[str, float]], iterations: int) -> Table:
    table = Table(title=f"An update of {iterations} iterations", box=SIMPLE_HEAD)
    for name in ("", "ms", "times", "share"):
        table.add_column(name, justify="right" if name else "left")
    for name, part in result.items():
        table.add_row(
            name,
            f"{1000 * part['seconds']:.0f}",
            f"{part['times']:.0f}",
            f"{100 * part['share']:.0f} %",
        )
    return table
