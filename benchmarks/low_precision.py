"""What curvature products in fewer digits cost and save, residuals replaced or not.

    python -m benchmarks low_precision
    python -m benchmarks low_precision --precision tensorfloat32   # on a GPU

Three measurements, of products in float32 and with `--precision`:

- **products**: seconds of the processor, temporary memory with the linearisation, and how
  far a product is from that of float32;
- **systems** of a trained autoencoder, for several λ: M as float32 knows it at iterates of
  conjugate gradients, and after how many it is where float32 is after `--target` of them;
- **runs**: f at the end of a few updates of the autoencoder, and of a small regression that
  can be fitted to rounding.
"""

import argparse
import functools
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
from benchmarks import data, options
from benchmarks.history import write_json
from benchmarks.network import autoencoder
from benchmarks.problem import SETUPS, machine
from benchmarks.racers import compile_ahead
from hfjax.update.system import damped

_PARTS = ("runs", "products", "systems")
_DAMPINGS = (10.0, 1.0, 0.1, 0.01)
_PRODUCTS = 10
_ROUNDS = 5


class Problem(NamedTuple):
    """What is fitted.

    Attributes:
      objective: f.
      params: where a run starts.
      batch: all of the data.
      damping: first λ.
    """

    objective: hfjax.Objective
    params: Any
    batch: tuple
    damping: float


class Way(NamedTuple):
    """How products are computed.

    Attributes:
      curvature: makes them.
      replace_every: iterations after which a residual is replaced, or `None`.
    """

    curvature: hfjax.curvature.Curvature
    replace_every: int | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options.

    Args:
      parser: to declare them to.
    """
    add = parser.add_argument
    add("--precision", default="bfloat16", help="of products; default: bfloat16")
    add("--replace-every", type=options.count, default=10, help="default: 10")
    add("--cases", type=options.count, default=300, help="images; default: 300")
    add("--layers", type=options.layers, default=(784, 100, 50, 25, 6))
    add("--updates", type=options.count, default=40, help="of a run; default: 40")
    add("--limit", type=options.count, default=200, help="iterations; default: 200")
    add("--target", type=options.count, default=50, help="iterations; default: 50")
    add(
        "--parts",
        type=functools.partial(options.among, _PARTS),
        default=_PARTS,
        help="with commas; without runs the network is as it starts; default: all",
    )
    add("--out", default="runs/low_precision.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write down.

    Args:
      args: the options.

    Returns:
      The exit status: 0, or 2 if an option is none or the numbers cannot be written.
    """
    console, path = Console(), Path(args.out)
    try:
        ways = ways_of(args.precision, args.replace_every)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {})
    except (OSError, ValueError) as error:
        return options.refuse("low_precision", error)
    images = _images(args)
    result: dict[str, Any] = {"arguments": vars(args), **machine(), "runs": {}}
    trained = images.params
    problems = {"autoencoder": images, "regression": _regression()}
    for title, problem in problems.items() if "runs" in args.parts else ():
        result["runs"][title] = {}
        for name, way in ways.items():
            params, row = train(problem, way, args.updates)
            if problem is images and name == "float32":
                trained = params
            result["runs"][title][name] = row
            console.print(f"{title}, {name}: {row}", highlight=False, soft_wrap=True)
            write_json(path, result)
    if "products" in args.parts:
        result["products"] = products(images, trained, ways)
        write_json(path, result)
    if "systems" in args.parts:
        result["systems"] = {
            name: systems(images, trained, way, args.limit)
            for name, way in ways.items()
        }
        result["iterations"] = iterations_to(result["systems"], args.target)
    write_json(path, result)
    for table in _tables(result, args.target):
        console.print(table)
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def ways_of(precision: str, replace_every: int) -> dict[str, Way]:
    """Return the ways that are compared, float32 first.

    Args:
      precision: as `hfjax.curvature.with_precision` takes.
      replace_every: of the last way.
    """
    exact = hfjax.curvature.with_precision("float32")  # On a GPU, too.
    fewer = hfjax.curvature.with_precision(precision, exact="float32")
    return {
        "float32": Way(exact, None),
        precision: Way(fewer, None),
        f"{precision}, replaced": Way(fewer, replace_every),
    }


def train(problem: Problem, way: Way, updates: int) -> tuple[Any, dict[str, Any]]:
    """Do some updates with the report's parts, and time them without compiling.

    Args:
      problem: what is fitted.
      way: how products are computed.
      updates: how many.

    Returns:
      The parameters; and f, seconds, iterations and what was rejected, in JSON's types.
    """
    objective, params, batch, damping = problem
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=damping),
        solver=hfjax.cg.conjugate_gradient(
            stopping=hfjax.stopping.martens2010(),
            keep=hfjax.iterates.grid(),
            warm_start_decay=0.95,
            replace_every=way.replace_every,
        ),
        preconditioner=hfjax.preconditioners.diagonal(),
        curvature=way.curvature,
    )

    def update(params: Any, state: Any) -> tuple[Any, Any]:
        _, grads = objective.value_and_grad(params, batch)
        steps, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, steps), state

    state: Any = tx.init(params)
    compiled, compiling = compile_ahead(update, params, state)
    iterations, rejected, start = 0, 0, time.process_time()
    for _ in range(updates):
        params, state = compiled(params, state)
        iterations += int(state.info.cg_iterations)
        rejected += not bool(state.info.accepted)
    return params, {
        "value": float(jax.jit(objective.value)(params, batch)),
        "damping": float(state.damping),
        "iterations": iterations,
        "rejected": rejected,
        "seconds": time.process_time() - start,
        "compile_seconds": compiling,
    }


def products(problem: Problem, params: Any, ways: dict[str, Way]) -> dict[str, Any]:
    """Time products in turn, and compare them with those of the first way.

    Args:
      problem: whose objective and data.
      params: where.
      ways: how.

    Returns:
      Of each way the median of processor seconds, the bytes of temporary memory, and the
      error along the gradient.
    """
    grads = jax.jit(problem.objective.value_and_grad)(params, problem.batch)[1]

    def once(make: Callable, params: Any, v: Any) -> Any:
        return make(problem.objective, params, problem.batch)(v)

    def chain(make: Callable, params: Any, v: Any) -> Any:
        product = make(problem.objective, params, problem.batch)

        def step(_: jax.Array, v: Any) -> Any:  # Each needs the one before.
            return jax.tree.map(lambda x, y: 1e-3 * x + y, product(v), grads)

        return jax.lax.fori_loop(0, _PRODUCTS, step, v)

    made = {n: way.curvature for n, way in ways.items() if way.replace_every is None}
    found = {
        name: jax.jit(lambda p, v, make=make: once(make, p, v))(params, grads)
        for name, make in made.items()
    }
    chains = {
        name: compile_ahead(lambda p, v, make=make: chain(make, p, v), params, grads)[0]
        for name, make in made.items()
    }
    seconds = {name: [] for name in made}
    for _ in range(_ROUNDS + 1):  # The first warms up.
        for name, call in chains.items():
            start = time.process_time()
            jax.block_until_ready(call(params, grads))
            seconds[name].append((time.process_time() - start) / _PRODUCTS)
    exact = found["float32"]

    def error(product: Any) -> float:
        off = jax.tree.map(jnp.subtract, product, exact)
        return float(optax.tree.norm(off) / optax.tree.norm(exact))

    return {
        name: {
            "seconds": statistics.median(seconds[name][1:]),
            "bytes": chains[name].memory_analysis().temp_size_in_bytes,
            "error": error(found[name]),
        }
        for name in made
    }


def systems(problem: Problem, params: Any, way: Way, limit: int) -> dict[str, Any]:
    """Solve (G + λI) x = −∇f from 0, and look at M by float32's products.

    Args:
      problem: whose objective and data.
      params: where.
      way: how products are computed.
      limit: iterations.

    Returns:
      For each λ, as text, how many iterations were done, M at every fifth and ‖A x − b‖
      / ‖b‖ at the last.
    """
    objective, batch = problem.objective, problem.batch

    def solve(damping: jax.Array, params: Any) -> tuple:
        _, grads = objective.value_and_grad(params, batch)
        b = jax.tree.map(jnp.negative, grads)
        truth = hfjax.curvature.with_precision("float32")(objective, params, batch)
        exact = damped(truth, damping)
        nearly = damped(way.curvature(objective, params, batch), damping)
        result = hfjax.cg.solve(
            nearly,
            b,
            max_iterations=limit,
            stopping=None,
            keep=hfjax.iterates.every(5),
            replace_every=way.replace_every,
        )

        def look(x: Any) -> tuple[jax.Array, jax.Array]:
            product = exact(x)
            r = jax.tree.map(jnp.subtract, product, b)
            half = jax.tree.map(lambda r, b: 0.5 * (r - b), r, b)
            return jnp.asarray(optax.tree.vdot(half, x)), optax.tree.norm(
                r
            ) / optax.tree.norm(b)

        models, residuals = jax.lax.map(look, result.kept.iterates)
        return result.num_iterations, result.kept.iterations, models, residuals

    compiled = jax.jit(solve)
    found = {}
    for damping in _DAMPINGS:
        count, iterations, models, residuals = jax.device_get(
            compiled(jnp.float32(damping), params)
        )
        there = iterations > 0
        found[str(damping)] = {
            "iterations": int(count),
            "at": iterations[there].tolist(),
            "models": models[there].tolist(),
            "residual": float(residuals[there][-1]),
        }
    return found


def iterations_to(systems: dict[str, Any], target: int) -> dict[str, Any]:
    """Count iterations to where float32 is after some.

    Args:
      systems: of each way, what `systems` returns.
      target: iterations of float32.

    Returns:
      Of each way, for each λ: how many, or `None`.

    Example:
      >>> there = {"1.0": {"at": [5, 10], "models": [-1.0, -2.0]}}
      >>> slower = {"1.0": {"at": [5, 10], "models": [-0.5, -1.0]}}
      >>> iterations_to({"float32": there, "bfloat16": slower}, 5)
      {'float32': {'1.0': 5}, 'bfloat16': {'1.0': 10}}
    """

    def first(row: dict[str, Any], value: float) -> int | None:
        # Of two runs that found the same minimum M differs by rounding.
        reached = [
            at
            for at, model in zip(row["at"], row["models"], strict=True)
            if model <= value * (1 - 1e-5)
        ]
        return reached[0] if reached else None

    goals = {
        damping: [
            m for at, m in zip(row["at"], row["models"], strict=True) if at <= target
        ][-1]
        for damping, row in systems["float32"].items()
    }
    return {
        name: {damping: first(row, goals[damping]) for damping, row in rows.items()}
        for name, rows in systems.items()
    }


def _images(args: argparse.Namespace) -> Problem:
    setup = SETUPS["curves"]
    images = jnp.asarray(data.curves(args.cases, 1).train)
    init, model_fn = autoencoder(args.layers)
    loss = hfjax.losses.sigmoid_cross_entropy()
    return Problem(
        hfjax.Objective(model_fn, loss, weight_decay=setup.weight_decay),
        jax.jit(init)(jax.random.key(0)),
        (images, images),
        45.0,
    )


def _regression() -> Problem:
    """Build the regression of the README: 500 cases, two inputs, 16 hidden units."""

    def model_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": jax.random.normal(keys[0], (2, 16)),
        "bias": jnp.zeros(16),
        "out": jax.random.normal(keys[1], (16, 1)) / 4,
    }
    x = jax.random.uniform(keys[2], (500, 2))
    batch = (x, jnp.sin(6 * x[:, :1]) * x[:, 1:])
    objective = hfjax.Objective(model_fn, hfjax.losses.squared_error())
    return Problem(objective, params, batch, 1.0)


def _tables(result: dict[str, Any], target: int) -> list[Table]:
    tables = []

    def add(title: str, header: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, box=SIMPLE_HEAD)
        for name in header:
            table.add_column(name, justify="right" if name else "left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)

    if "products" in result:
        add(
            "Products",
            ["", "ms", "MB", "error"],
            [
                [
                    name,
                    f"{1e3 * row['seconds']:.2f}",
                    f"{row['bytes'] / 1e6:.1f}",
                    f"{row['error']:.1e}",
                ]
                for name, row in result["products"].items()
            ],
        )
    if "systems" in result:
        add(
            f"Iterations to M of float32 after {target}; ‖Ax − b‖ / ‖b‖ at the end",
            ["", *[f"λ = {damping:g}" for damping in _DAMPINGS]],
            [
                [name]
                + [
                    f"{result['iterations'][name][damping] or '–'}; {row['residual']:.0e}"
                    for damping, row in rows.items()
                ]
                for name, rows in result["systems"].items()
            ],
        )
    for title, rows in result["runs"].items():
        add(
            f"Run: {title}",
            ["", "f", "λ", "iterations", "rejected", "seconds"],
            [
                [
                    name,
                    f"{row['value']:.4g}",
                    f"{row['damping']:.1e}",
                    str(row["iterations"]),
                    str(row["rejected"]),
                    f"{row['seconds']:.1f}",
                ]
                for name, row in rows.items()
            ],
        )
    return tables
