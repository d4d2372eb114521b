"""What a curvature product costs, in gradients.

    python -m benchmarks product

Flops of the matrix products alone set a limit. Per image, with F for one pass
through all layers and F₁ for the first, whose inputs are data and need no
derivative:

    gradient   3F − F₁     forward; cotangents of the weights, and of the inputs
    G v        4F − 2F₁    tangents of weights and inputs; the transposes of both
    diagonal   3F − F₁     as a gradient, with squares in place of the weights' cotangents

The network is the autoencoder for MNIST; the images are random.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options
from benchmarks.data import PIXELS
from benchmarks.history import write_json
from benchmarks.network import Layers, autoencoder, mirrored
from benchmarks.problem import SETUPS, machine
from benchmarks.racers import compile_ahead

_ITERATIONS = 50
_FEW, _MANY = 2, 10  # products of the two chains whose difference is timed

Calls = dict[str, Callable[[], Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--cases", type=options.count, default=1000, help="images; default: 1000")
    add("--rounds", type=options.count, default=7, help="of timing; default: 7")
    add("--out", default="runs/product.json", help="default: runs/product.json")


def run(args: argparse.Namespace) -> int:
    """Time, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if the numbers cannot be written.
    """
    console, path, setup = Console(), Path(args.out), SETUPS["mnist"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except OSError as error:
        return options.refuse("product", error)
    init, model_fn = autoencoder(setup.encoder)
    loss = hfjax.losses.sigmoid_cross_entropy()
    objective = hfjax.Objective(model_fn, loss, weight_decay=setup.weight_decay)
    images = jax.random.uniform(jax.random.key(1), (args.cases, PIXELS))
    with console.status("compiling and timing"):
        calls = _calls(objective, jax.jit(init)(jax.random.key(0)), images)
        iterations = hfjax.diagnostics.scalars(calls["update"]())["cg_iterations"]
        result = costs(time_rounds(calls, args.rounds), int(iterations))
    limits = flop_limits(mirrored(setup.encoder))
    measured = {"cases": args.cases, "rounds": args.rounds, **machine()}
    write_json(path, {**measured, **result, "flop_limits": limits})
    console.print(_table(result, limits, args.cases))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def flop_limits(sizes: Sequence[int]) -> dict[str, float]:
    """Compute what products should cost, in gradients, by their flops alone.

    Args:
      sizes: of all layers, the pixels first.

    Returns:
      The ratio of `product` and of `empirical_fisher` to the gradient.

    Example:
      For many equal layers the first is one of many, and a product 4/3 gradients:

      >>> print(round(flop_limits([100] * 1000)["product"], 2))
      1.33
    """
    layers = [inputs * units for inputs, units in itertools.pairwise(sizes)]
    whole, first = sum(layers), layers[0]
    gradient = 3 * whole - first
    return {
        "product": (4 * whole - 2 * first) / gradient,
        "empirical_fisher": 1.0,
    }


def time_rounds(calls: Calls, rounds: int) -> list[dict[str, float]]:
    """Time calls in turn, round after round: what disturbs one disturbs them all.

    Args:
      calls: by name.
      rounds: timings of each, after one call that warms up.

    Returns:
      For each round the seconds of each call.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        seconds.append({})
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[-1][name] = time.perf_counter() - start
    return seconds


def costs(seconds: Sequence[dict[str, float]], iterations: int) -> dict[str, Any]:
    """Compute medians over rounds: of seconds, and of ratios within a round.

    Args:
      seconds: of `time_rounds`.
      iterations: of conjugate gradients in the update.

    Returns:
      `seconds`, `in_gradients` and `update_over_its_products`, in JSON's types.
    """
    rounds = []
    for taken in seconds:
        chains = taken["many_products"] - taken["few_products"]
        rounds.append({**taken, "product": chains / (_MANY - _FEW)})

    names = ("gradient", "product", "one_product", "empirical_fisher", "update")
    median = statistics.median
    return {
        "seconds": {name: median(taken[name] for taken in rounds) for name in names},
        "in_gradients": {
            name: median(taken[name] / taken["gradient"] for taken in rounds)
            for name in names
        },
        "cg_iterations": iterations,
        "update_over_its_products": median(
            taken["update"] / (iterations * taken["product"]) for taken in rounds
        ),
    }


def _calls(objective: hfjax.Objective, params: Layers, images: jax.Array) -> Calls:
    """Compile what is timed."""
    batch = (images, images)

    def chain(params: Layers, batch: tuple, count: jax.Array) -> Any:
        product = hfjax.curvature.ggn(objective, params, batch)

        # Each product needs the one before; whether they overflow costs no time.
        return jax.lax.fori_loop(0, count, lambda _, v: product(v), params)

    gradient, _ = compile_ahead(objective.value_and_grad, params, batch)
    chained, _ = compile_ahead(chain, params, batch, jnp.array(1))
    fisher, _ = compile_ahead(
        lambda params, batch: hfjax.diagonals.empirical_fisher(
            objective, params, batch
        ),
        params,
        batch,
    )
    return {
        "gradient": lambda: gradient(params, batch),
        "one_product": lambda: chained(params, batch, jnp.array(1)),
        "few_products": lambda: chained(params, batch, jnp.array(_FEW)),
        "many_products": lambda: chained(params, batch, jnp.array(_MANY)),
        "empirical_fisher": lambda: fisher(params, batch),
        "update": _update(objective, params, batch),
    }


def _update(
    objective: hfjax.Objective, params: Layers, batch: tuple
) -> Callable[[], Any]:
    """Compile an update: the parts of `recipes.martens2010`, iterations fixed."""
    tx = hfjax.hessian_free(
        objective,
        # Of 45, as in the recipe, 28 iterations would solve the system to rounding.
        damping=hfjax.damping.levenberg_marquardt(init=1.0),
        solver=hfjax.cg.conjugate_gradient(
            max_iterations=_ITERATIONS,
            stopping=None,
            keep=hfjax.iterates.grid(),
            warm_start_decay=0.95,
        ),
        preconditioner=hfjax.preconditioners.diagonal(),
        backtracking=hfjax.backtracking.early_stop(),
    )

    def update(params: Layers, state: Any, batch: tuple) -> Any:
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    compiled, _ = compile_ahead(update, params, state, batch)
    return lambda: compiled(params, state, batch)


def _table(result: dict[str, Any], limits: dict[str, float], cases: int) -> Table:
    iterations, over = result["cg_iterations"], result["update_over_its_products"]
    table = Table(
        title=f"MNIST autoencoder, {cases:,} random images",
        caption=f"An update of {iterations} CG iterations takes {over:.3f} times what "
        f"{iterations} products take.",
        box=SIMPLE_HEAD,
    )
    table.add_column("")
    for name in ("seconds", "in gradients", "by flops alone"):
        table.add_column(name, justify="right")
    for title, name in (
        ("gradient", "gradient"),
        ("G v", "product"),
        ("linearisation and one G v", "one_product"),
        ("diagonal of the empirical Fisher", "empirical_fisher"),
        (f"update, {iterations} CG iterations", "update"),
    ):
        limit = f"{limits[name]:.3f}" if name in limits else ""
        ratio = f"{result['in_gradients'][name]:.3f}"
        table.add_row(title, f"{result['seconds'][name]:.4f}", ratio, limit)
    return table
