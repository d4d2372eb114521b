"""What a curvature product of a convolutional network costs within a loop, in gradients.

    python -m benchmarks convolutions

The network is the one of Flax's MNIST example: two 3 × 3 convolutions, each with average
pooling, then two dense layers; the images are random. Products are timed as conjugate
gradients run them, in a loop, by hfjax and by `jax.linearize` alone, which leaves the
convolutions in the layout that JAX's derivatives give them. The gradient is timed
outside of a loop. Seconds are of the processor, all its cores together.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import options
from benchmarks.history import write_json
from benchmarks.problem import machine
from benchmarks.racers import compile_ahead

_SIDE, _CLASSES = 28, 10
_FEW, _MANY = 1, 3  # products of the two chains whose difference is timed

LAYOUTS = {"NHWC": ("NHWC", "HWIO", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--cases", type=options.count, default=500, help="images; default: 500")
    add(
        "--channels",
        type=options.count,
        nargs=3,
        default=(32, 64, 256),
        help="of both convolutions, and units of the dense layer; default: 32 64 256",
    )
    add("--layout", choices=sorted(LAYOUTS), default="NHWC", help="default: NHWC")
    add("--rounds", type=options.count, default=3, help="of timing; default: 3")
    add(
        "--out",
        default="runs/convolutions.json",
        help="default: runs/convolutions.json",
    )


def run(args: argparse.Namespace) -> int:
    """Time, print and write down.

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
        return options.refuse("convolutions", error)
    with console.status("compiling and timing"):
        seconds = costs(args.cases, tuple(args.channels), args.layout, args.rounds)
    write_json(path, {"arguments": vars(args), **machine(), "seconds": seconds})
    console.print(_table(seconds, args.cases, args.layout))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def costs(
    cases: int, channels: tuple[int, ...], layout: str, rounds: int
) -> dict[str, float]:
    """Time a gradient, and products within a loop.

    Args:
      cases: images.
      channels: of both convolutions, and units of the dense layer.
      layout: a name of `LAYOUTS`.
      rounds: of timing, of which the median counts.

    Returns:
      Processor seconds of one gradient and of one product each, by name.
    """
    objective = hfjax.Objective(
        lambda params, images: _network(params, images, layout),
        hfjax.losses.softmax_cross_entropy(),
    )
    shape = (_SIDE, _SIDE, 1) if layout == "NHWC" else (1, _SIDE, _SIDE)
    images = jax.random.normal(jax.random.key(0), (cases, *shape))
    labels = jax.nn.one_hot(jnp.arange(cases) % _CLASSES, _CLASSES)
    params, batch = _params(jax.random.key(1), channels, layout), (images, labels)
    gradient, _ = compile_ahead(objective.value_and_grad, params, batch)
    seconds = {"gradient": _seconds(lambda: gradient(params, batch), rounds)}
    for name, curvature in (
        ("hfjax", hfjax.curvature.ggn),
        ("JAX alone", _plain),
    ):

        def chain(params: Any, batch: Any, count: Any, make: Any = curvature) -> Any:
            product = make(objective, params, batch)
            return jax.lax.fori_loop(0, count, lambda _, v: product(v), params)

        chained, _ = compile_ahead(chain, params, batch, jnp.array(1))
        few, many = (
            _seconds(lambda n=n, f=chained: f(params, batch, jnp.array(n)), rounds)
            for n in (_FEW, _MANY)
        )
        seconds[name] = (many - few) / (_MANY - _FEW)
    return seconds


def _plain(objective: hfjax.Objective, params: Any, batch: Any) -> Callable[[Any], Any]:
    """Return the Gauss-Newton product as JAX makes it."""
    images, labels = batch
    outputs, tangent = jax.linearize(lambda p: objective.model_fn(p, images), params)
    transpose = jax.linear_transpose(tangent, params)
    curved = objective.loss.hessian(outputs, labels)
    return lambda v: jax.tree.map(
        lambda x: x / len(images), transpose(curved(tangent(v)))[0]
    )


def _params(key: jax.Array, channels: tuple[int, ...], layout: str) -> dict[str, Any]:
    one, two, units = channels
    flat = two * (_SIDE // 4) ** 2
    kernels = {"first": (3, 3, 1, one), "second": (3, 3, one, two)}
    if layout == "NCHW":
        kernels = {k: (s[3], s[2], s[0], s[1]) for k, s in kernels.items()}
    shapes = {**kernels, "third": (flat, units), "fourth": (units, _CLASSES)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: 0.05 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _network(params: dict[str, Any], x: jax.Array, layout: str) -> jax.Array:
    window = (1, 2, 2, 1) if layout == "NHWC" else (1, 1, 2, 2)
    for name in ("first", "second"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=LAYOUTS[layout]
        )
        x = jax.nn.relu(x)
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["third"])
    return x @ params["fourth"]


def _seconds(call: Callable[[], Any], rounds: int) -> float:
    jax.block_until_ready(call())
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        jax.block_until_ready(call())
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def _table(seconds: dict[str, float], cases: int, layout: str) -> Table:
    table = Table(title=f"{layout} network, {cases:,} random images", box=SIMPLE_HEAD)
    for name in ("", "processor seconds", "gradients"):
        table.add_column(name, justify="right" if name else "left")
    for name, taken in seconds.items():
        title = name if name == "gradient" else f"G v in a loop, {name}"
        ratio = taken / seconds["gradient"]
        table.add_row(title, f"{taken:.3f}", f"{ratio:.2f}")
    return table
