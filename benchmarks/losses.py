"""What an update costs with a plain loss, beside the closed form of the same loss.

    python -m benchmarks losses

Each of Optax's cross-entropies, and half the squared error, against its closed form in
`hfjax.losses`, on a network of one hidden layer with 10 to 5,000 outputs; and Flax's
example of a variational autoencoder (784 pixels, 20 latent variables: 824 outputs a case),
whose loss has no closed form. One compiled update, conjugate gradients held to five
iterations, and the medians of processor seconds, taken in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options
from benchmarks.history import write_json
from benchmarks.problem import machine

_ITERATIONS = 5
_LOSSES = ("sigmoid", "softmax", "labels", "square", "vae")
_INPUTS, _HIDDEN = 50, 64


class Row(NamedTuple):
    """One update.

    Attributes:
      problem: loss and outputs.
      form: "plain" or "closed".
      seconds: of a processor, the median.
      compile_seconds: of a processor.
      mebibytes: of intermediate results.
    """

    problem: str
    form: str
    seconds: float
    compile_seconds: float
    mebibytes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--cases", type=options.count, default=256, help="of a batch; default: 256")
    add("--vae-cases", type=options.count, default=64, help="default: 64")
    add("--losses", choices=_LOSSES, nargs="+", default=_LOSSES, help="default: all")
    add("--outputs", type=options.count, nargs="+", default=[10, 500, 5000])
    add("--rounds", type=options.count, default=7, help="of timing; default: 7")
    add("--out", default="runs/losses.json", help="default: runs/losses.json")


def run(args: argparse.Namespace) -> int:
    """Time, print and write down.

    Args:
      args: as declared.

    Returns:
      0.
    """
    console, rows = Console(), []
    table = Table("problem", "form", "s", "compile s", "MiB", "ratio", box=SIMPLE_HEAD)
    for outputs in args.outputs:
        for name, forms, targets in _losses(args.cases, outputs):
            if name not in args.losses:
                continue
            rows += _race(
                f"{name}, {outputs} outputs",
                {form: _updater(_objective(loss)) for form, loss in forms.items()},
                _network(outputs),
                (_inputs(args.cases), targets),
                args.rounds,
            )
    if "vae" in args.losses:
        vae = {"plain": _updater(hfjax.Objective(_vae, _vae_loss))}
        rows += _race("VAE", vae, *_vae_problem(args.vae_cases), args.rounds)
    closed = {row.problem: row.seconds for row in rows if row.form == "closed"}
    for row in rows:
        ratio = row.seconds / closed.get(row.problem, row.seconds)
        numbers = (row.seconds, row.compile_seconds, row.mebibytes, ratio)
        table.add_row(row.problem, row.form, *(f"{x:.3g}" for x in numbers))
    console.print(table)
    results = {"machine": machine(), "rows": [row._asdict() for row in rows]}
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    return 0


def _losses(cases: int, outputs: int) -> list[tuple[str, dict[str, Any], jax.Array]]:
    plain, closed = optax.losses, hfjax.losses
    key = jax.random.key(1)
    normal = jax.random.normal(key, (cases, outputs))
    labels = jax.random.randint(key, (cases,), 0, outputs)
    softmax, with_labels = (
        {"plain": getattr(plain, name), "closed": getattr(closed, name)()}
        for name in (
            "softmax_cross_entropy",
            "softmax_cross_entropy_with_integer_labels",
        )
    )
    sigmoid = {
        "plain": plain.sigmoid_binary_cross_entropy,
        "closed": closed.sigmoid_cross_entropy(),
    }
    square = {"plain": plain.l2_loss, "closed": closed.squared_error()}
    return [
        ("sigmoid", sigmoid, (normal > 0) * 1.0),
        ("softmax", softmax, jax.nn.softmax(normal)),
        ("labels", with_labels, labels),
        ("square", square, normal),
    ]


def _inputs(cases: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (cases, _INPUTS))


def _network(outputs: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(2))
    return {
        "in": jax.random.normal(keys[0], (_INPUTS, _HIDDEN)) * _INPUTS**-0.5,
        "out": jax.random.normal(keys[1], (_HIDDEN, outputs)) * _HIDDEN**-0.5,
    }


def _objective(loss: Any) -> hfjax.Objective:
    return hfjax.Objective(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], loss)


def _updater(objective: hfjax.Objective) -> Callable[..., Any]:
    solver = hfjax.cg.conjugate_gradient(max_iterations=_ITERATIONS, stopping=None)
    tx = hfjax.hessian_free(objective, solver=solver)

    def update(params: Any, batch: Any) -> Any:
        grads = objective.value_and_grad(params, batch)[1]
        return tx.update(grads, tx.init(params), params, batch=batch)[0]

    return update


def _race(
    problem: str, updaters: dict[str, Any], params: Any, batch: Any, rounds: int
) -> list[Row]:
    compiled, compile_seconds = {}, {}
    for form, update in updaters.items():
        start = time.process_time()
        compiled[form] = jax.jit(update).lower(params, batch).compile()
        compile_seconds[form] = time.process_time() - start
        jax.block_until_ready(compiled[form](params, batch))
    seconds: dict[str, list[float]] = {form: [] for form in updaters}
    for _ in range(rounds):
        for form, update in compiled.items():
            start = time.process_time()
            jax.block_until_ready(update(params, batch))
            seconds[form].append(time.process_time() - start)
    return [
        Row(
            problem,
            form,
            statistics.median(seconds[form]),
            compile_seconds[form],
            update.memory_analysis().temp_size_in_bytes / 2**20,
        )
        for form, update in compiled.items()
    ]


def _vae(params: Any, inputs: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
    x, noise = inputs
    hidden = jax.nn.relu(x @ params["in"])
    mean, log_var = hidden @ params["mean"], hidden @ params["log_var"]
    latent = mean + noise * jnp.exp(0.5 * log_var)
    logits = jax.nn.relu(latent @ params["latent"]) @ params["out"]
    return {"logits": logits, "mean": mean, "log_var": log_var}


def _vae_loss(outputs: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    pixels = optax.losses.sigmoid_binary_cross_entropy(outputs["logits"], images)
    mean, log_var = outputs["mean"], outputs["log_var"]
    divergence = -0.5 * (1 + log_var - mean**2 - jnp.exp(log_var))
    return jnp.sum(pixels, axis=-1) + jnp.sum(divergence, axis=-1)


def _vae_problem(cases: int) -> tuple[Any, Any]:
    sizes = {
        "in": (784, 500),
        "mean": (500, 20),
        "log_var": (500, 20),
        "latent": (20, 500),
        "out": (500, 784),
    }
    keys = jax.random.split(jax.random.key(0), len(sizes) + 2)
    params = {
        name: jax.random.normal(key, size) * size[0] ** -0.5
        for key, (name, size) in zip(keys[2:], sizes.items(), strict=True)
    }
    images = (jax.random.uniform(keys[0], (cases, 784)) > 0.8) * 1.0
    noise = jax.random.normal(keys[1], (cases, 20))
    return params, ((images, noise), images)
