"""What a Gauss-Newton vector product costs, in gradients.

    python -m benchmarks product
    python -m benchmarks product --network convolutions

Products are timed in a loop, as conjugate gradients run them: by hfjax, and by JAX's
derivatives alone. The gradient is timed outside of a loop. Flops of the matrix products
alone set a limit for dense layers. Per image, with F for one pass through all layers and
F₁ for the first, whose inputs are data and need no derivative:

    gradient   3F − F₁     forward; cotangents of the weights, and of the inputs
    G v        4F − 2F₁    tangents of weights and inputs; the transposes of both
    diagonal   3F − F₁     as a gradient, with squares in place of the weights' cotangents

The networks are the autoencoder for MNIST, and the one of Flax's MNIST example: two 3 × 3
convolutions, each with average pooling, then two dense layers. The images are random.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.machine import compile_ahead, timed
from benchmarks.harness.table import rich_table
from benchmarks.suites.curves import PIXELS, SIDE
from benchmarks.suites.images import DIGITS, autoencoder, mirrored

_ITERATIONS = 50
_FEW, _MANY = 2, 10  # products of the two chains whose difference is timed
_CHANNELS = (32, 64, 256)  # of both convolutions, and units of the dense layer
_CLASSES = 10

Calls = dict[str, Callable[[], Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    networks = ("autoencoder", "convolutions")
    add("--network", choices=networks, default=networks[0], help="default: autoencoder")
    add("--cases", type=cli.count, default=1000, help="images; default: 1000")
    add("--rounds", type=cli.count, default=7, help="of timing; default: 7")
    add("--out", default="runs/product.json", help="default: runs/product.json")


def run(args: argparse.Namespace) -> int:
    """Time, print and write down."""
    console, path = Console(), cli.output_file(args.out)
    dense = args.network == "autoencoder"
    with console.status("compiling and timing"):
        problem = (_autoencoder if dense else _convolutions)(args.cases)
        calls = _calls(*problem)
        iterations = hfjax.diagnostics.scalars(calls["update"]())["cg_iterations"]
        result = costs(time_rounds(calls, args.rounds), int(iterations))
    limits = flop_limits(mirrored(DIGITS)) if dense else {}
    document = {"arguments": vars(args), **machine.describe(), **result}
    write_json(path, {**document, "flop_limits": limits})
    console.print(_table(result, limits, f"{args.network}, {args.cases:,} images"))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def flop_limits(sizes: Sequence[int]) -> dict[str, float]:
    """Compute what products should cost, in gradients, by their flops alone.

    Returns:
      The ratio of `product` and of `empirical_fisher` to the gradient.

    Example:
      If there are many equal layers, a product costs 4/3 gradients:

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
    """Time calls in turn, round after round, so that disturbances hit them all.

    Returns:
      For each round the seconds of each call.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    return [
        {name: timed(call)[1].wall for name, call in calls.items()}
        for _ in range(rounds)
    ]


def costs(seconds: Sequence[dict[str, float]], iterations: int) -> dict[str, Any]:
    """Compute medians over rounds: of seconds, and of ratios within a round.

    Returns:
      `seconds`, `in_gradients` and `update_over_its_products`, in JSON's types.
    """
    rounds = []
    for taken in seconds:
        chains = {
            name: (taken[f"many_{name}"] - taken[f"few_{name}"]) / (_MANY - _FEW)
            for name in ("product", "plain_product")
        }
        rounds.append({**taken, **chains})
    median = statistics.median
    return {
        "seconds": {name: median(taken[name] for taken in rounds) for name in _ROWS},
        "in_gradients": {
            name: median(taken[name] / taken["gradient"] for taken in rounds)
            for name in _ROWS
        },
        "cg_iterations": iterations,
        "update_over_its_products": median(
            taken["update"] / (iterations * taken["product"]) for taken in rounds
        ),
    }


_ROWS = {
    "gradient": "gradient",
    "product": "G v in a loop, hfjax",
    "plain_product": "G v in a loop, JAX alone",
    "one_product": "linearisation and one G v",
    "empirical_fisher": "diagonal of the empirical Fisher",
    "update": "update",
}


def _calls(objective: hfjax.Objective, params: Any, batch: tuple) -> Calls:
    """Compile what is timed."""

    def chain(make: Callable[..., Any]) -> Callable[..., Any]:
        def chained(params: Any, batch: tuple, count: jax.Array) -> Any:
            product = make(objective, params, batch)
            # Each product needs the one before. Overflow does not change the time.
            return jax.lax.fori_loop(0, count, lambda _, v: product(v), params)

        compiled, _ = compile_ahead(chained, params, batch, jnp.array(1))
        return lambda count: compiled(params, batch, jnp.array(count))

    def diagonal(params: Any, batch: tuple) -> Any:
        return hfjax.diagonals.empirical_fisher(objective, params, batch)

    gradient, _ = compile_ahead(objective.value_and_grad, params, batch)
    fisher, _ = compile_ahead(diagonal, params, batch)
    ours, plain = chain(hfjax.curvature.ggn), chain(_plain)
    return {
        "gradient": lambda: gradient(params, batch),
        "one_product": lambda: ours(1),
        "few_product": lambda: ours(_FEW),
        "many_product": lambda: ours(_MANY),
        "few_plain_product": lambda: plain(_FEW),
        "many_plain_product": lambda: plain(_MANY),
        "empirical_fisher": lambda: fisher(params, batch),
        "update": _update(objective, params, batch),
    }


def _plain(objective: hfjax.Objective, params: Any, batch: Any) -> Callable[[Any], Any]:
    """Return the Gauss-Newton vector product as JAX's derivatives make it."""
    inputs, targets = batch
    outputs, tangent = jax.linearize(lambda p: objective.model_fn(p, inputs), params)
    transpose = jax.linear_transpose(tangent, params)
    curved = objective.loss.hessian(outputs, targets)
    return lambda v: jax.tree.map(
        lambda x: x / len(inputs), transpose(curved(tangent(v)))[0]
    )


def _update(objective: hfjax.Objective, params: Any, batch: tuple) -> Callable[[], Any]:
    """Compile an update: the parts of `recipes.martens2010`, iterations fixed."""
    tx = hfjax.hessian_free(
        objective,
        # With λ = 45, as in the recipe, 28 iterations would solve to rounding.
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

    def update(params: Any, state: Any, batch: tuple) -> Any:
        _, grads = objective.value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    compiled, _ = compile_ahead(update, params, state, batch)
    return lambda: compiled(params, state, batch)


def _autoencoder(cases: int) -> tuple[hfjax.Objective, Any, tuple]:
    init, model_fn = autoencoder(DIGITS)
    loss = hfjax.losses.sigmoid_cross_entropy()
    images = jax.random.uniform(jax.random.key(1), (cases, PIXELS))
    params = jax.jit(init)(jax.random.key(0))
    return hfjax.Objective(model_fn, loss, weight_decay=1e-5), params, (images, images)


def _convolutions(cases: int) -> tuple[hfjax.Objective, Any, tuple]:
    one, two, units = _CHANNELS
    shapes = {
        "first": (3, 3, 1, one),
        "second": (3, 3, one, two),
        "third": (two * (SIDE // 4) ** 2, units),
        "fourth": (units, _CLASSES),
    }
    keys = jax.random.split(jax.random.key(1), len(shapes))
    params = {
        name: 0.05 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    images = jax.random.normal(jax.random.key(0), (cases, SIDE, SIDE, 1))
    labels = jax.nn.one_hot(jnp.arange(cases) % _CLASSES, _CLASSES)
    loss = hfjax.losses.softmax_cross_entropy()
    return hfjax.Objective(_convolutional, loss), params, (images, labels)


def _convolutional(params: dict[str, Any], x: jax.Array) -> jax.Array:
    window = (1, 2, 2, 1)
    for name in ("first", "second"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["third"])
    return x @ params["fourth"]


def _table(result: dict[str, Any], limits: dict[str, float], title: str) -> Table:
    iterations, over = result["cg_iterations"], result["update_over_its_products"]
    caption = (
        f"An update of {iterations} CG iterations takes {over:.3f} times what "
        f"{iterations} products take."
    )
    cells = [["", "seconds", "in gradients", "by flops alone"]]
    for name, words in _ROWS.items():
        limit = f"{limits[name]:.3f}" if name in limits else ""
        ratio = f"{result['in_gradients'][name]:.3f}"
        cells.append([words, f"{result['seconds'][name]:.4f}", ratio, limit])
    return rich_table(cells, caption, title)
