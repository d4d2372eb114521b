"""How many iterations of conjugate gradients each preconditioner needs to the same M.

    python -m benchmarks preconditioners --problem autoencoder
    python -m benchmarks preconditioners --problem addition

A network is trained by the method of M&S (2012). Every few updates the system of that
update, with its λ, is solved from 0 with each preconditioner, until M is as low as with
the recipe's (empirical Fisher, ξ = 0.75) when Martens' rule stops it. Means over the run;
a solve that does not get there counts as the limit of iterations.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import hfjax
from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.table import rich_table
from benchmarks.suites import sequences
from benchmarks.suites.curves import curves
from benchmarks.suites.images import CURVES, DAMPING, autoencoder
from hfjax.update.system import damped

_RECIPE = "empirical Fisher, ξ = 0.75"
_WEIGHT_DECAY = 2e-5  # of Martens' program


class Setting(NamedTuple):
    """What is trained.

    Attributes:
      objective: f.
      params: where training starts.
      batch: `key -> batch`, of an update.
      damping: first λ.
      exact: whether an example has few enough outputs for the exact diagonal.
    """

    objective: hfjax.Objective
    params: Any
    batch: Callable[[jax.Array], tuple]
    damping: float
    exact: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--problem", choices=("autoencoder", "addition"), default="autoencoder")
    add("--updates", type=cli.count, default=40, help="to train; default: 40")
    add("--every", type=cli.count, default=4, help="updates; default: 4")
    add("--cases", type=cli.count, default=500, help="in a batch; default: 500")
    add("--limit", type=cli.count, default=300, help="iterations; default: 300")
    add("--seed", type=cli.seed, default=0, help="of start and data; default: 0")
    add("--out", default="runs/preconditioners.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Train, solve, print and write down."""
    console, path = Console(), cli.output_file(args.out)
    setting = (_autoencoder if args.problem == "autoencoder" else _addition)(args)
    rows = []
    for row in compare(setting, args.updates, args.every, args.limit):
        rows.append(row)
        counts = ", ".join(f"{name} {n}" for name, n in row["iterations"].items())
        console.print(
            f"update {row['update']}: f {row['value']:.4g}, λ {row['damping']:.2g}: "
            f"{counts}",
            highlight=False,
            soft_wrap=True,
        )
        write_json(path, {"arguments": vars(args), **machine.describe(), "rows": rows})
    console.print(_table(rows, args.limit))
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def rules(*, exact: bool) -> dict[str, hfjax.preconditioners.PreconditionerRule | None]:
    """Return the preconditioners that are compared."""
    diagonal, diagonals = hfjax.preconditioners.diagonal, hfjax.diagonals
    probes = functools.partial(diagonals.ggn_rademacher, num_probes=8)
    found = {
        "none": None,
        _RECIPE: diagonal(exponent=0.75),
        "empirical Fisher, ξ = 1": diagonal(exponent=1.0),
        "Rademacher, 1 probe, ξ = 0.75": diagonal(
            diagonals.ggn_rademacher, exponent=0.75
        ),
        "Rademacher, 8 probes, ξ = 0.75": diagonal(probes, exponent=0.75),
        "Rademacher, 8 probes, ξ = 1": diagonal(probes, exponent=1.0),
        "Kronecker factors": hfjax.preconditioners.kronecker(),
        "Nyström, rank 50": hfjax.preconditioners.nystrom(rank=50),
    }
    # With few outputs G has few large eigenvalues.
    rank = 10 if exact else 200
    found[f"Nyström, rank {rank}"] = hfjax.preconditioners.nystrom(rank=rank)
    if exact:
        found["exact diag(G), ξ = 0.75"] = diagonal(diagonals.ggn_exact, exponent=0.75)
        found["exact diag(G), ξ = 1"] = diagonal(diagonals.ggn_exact, exponent=1.0)
    return found


def compare(setting: Setting, updates: int, every: int, limit: int) -> Any:
    """Train, and compare the preconditioners every few updates.

    Yields:
      A dict in JSON's types for each comparison.
    """
    objective = setting.objective
    tx = hfjax.hessian_free(
        objective,
        damping=hfjax.damping.levenberg_marquardt(init=setting.damping),
        solver=hfjax.cg.conjugate_gradient(
            stopping=hfjax.stopping.martens2010(),
            keep=hfjax.iterates.grid(),
            warm_start_decay=0.95,
        ),
        preconditioner=hfjax.preconditioners.diagonal(),
        backtracking=hfjax.backtracking.early_stop(),
    )
    compared = rules(exact=setting.exact)

    @jax.jit
    def train(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        batch = setting.batch(key)
        _, grads = objective.value_and_grad(params, batch)
        steps, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, steps), state

    @functools.partial(jax.jit, static_argnames=("name", "stopped"))
    def models(
        params: Any, damping: jax.Array, key: jax.Array, *, name: str, stopped: bool
    ) -> tuple[jax.Array, jax.Array]:
        batch = setting.batch(key)
        value, grads = objective.value_and_grad(params, batch)
        product = hfjax.curvature.ggn(objective, params, batch)
        rule = compared[name]
        precondition = None
        if rule is not None:
            known = (objective, params, batch, damping)
            precondition = rule.build(*known, jax.random.fold_in(key, 1))
        run = hfjax.cg.solve(
            damped(product, damping),
            jax.tree.map(jnp.negative, grads),
            preconditioner=precondition,
            max_iterations=limit,
            stopping=hfjax.stopping.martens2010() if stopped else None,
            keep=hfjax.iterates.every(limit),
        )
        return value, run.model_values

    params: Any = setting.params
    state: Any = tx.init(params)
    for update in range(updates):
        key = jax.random.fold_in(jax.random.key(1), update)
        if update % every == 0:
            # A program for each: together they would not fit into memory.
            solve = functools.partial(models, params, state.damping, key)
            value, recipe = solve(name=_RECIPE, stopped=True)
            runs = {
                name: np.asarray(solve(name=name, stopped=False)[1])
                for name in compared
            }
            yield {
                "update": update,
                "value": float(value),
                "damping": float(state.damping),
                "iterations": {
                    name: iterations_to(float(recipe[-1]), run, limit)
                    for name, run in runs.items()
                },
            }
        params, state = train(params, state, key)


def iterations_to(target: float, model_values: np.ndarray, limit: int) -> int:
    """Return after how many iterations M is at the target, at most `limit`.

    Example:
      >>> iterations_to(-2.0, np.array([0.0, -1.0, -1.9, -2.5]), 3)
      3
    """
    # M of two runs that found the same minimum differs by rounding.
    reached = np.nonzero(model_values <= target * (1 - 1e-5))[0]
    return int(reached[0]) if len(reached) else limit


def _autoencoder(args: argparse.Namespace) -> Setting:
    images = jnp.asarray(curves(args.cases))
    init, model_fn = autoencoder(CURVES)
    return Setting(
        hfjax.Objective(
            model_fn, hfjax.losses.sigmoid_cross_entropy(), weight_decay=_WEIGHT_DECAY
        ),
        jax.jit(init)(jax.random.key(args.seed)),
        lambda key: (images, images),
        DAMPING,
        exact=False,
    )


def _addition(args: argparse.Namespace) -> Setting:
    problem = sequences.drawn("addition", 30, args.cases)
    return Setting(
        problem.objective,
        jax.jit(problem.start)(jax.random.key(args.seed)),
        lambda key: problem.batch(key, jnp.int32(0)),
        problem.damping,
        exact=True,
    )


def _table(rows: list[dict[str, Any]], limit: int) -> Table:
    cells = [["preconditioner", "mean iterations", "median", "at the limit"]]
    for name in rows[0]["iterations"]:
        counts = [row["iterations"][name] for row in rows]
        ended = str(sum(count == limit for count in counts))
        cells.append(
            [name, f"{np.mean(counts):.1f}", f"{np.median(counts):.0f}", ended]
        )
    return rich_table(
        cells, f"Of {len(rows)} systems along the run; at most {limit} iterations."
    )
