"""How many iterations of conjugate gradients each preconditioner needs to the same M.

    python -m benchmarks preconditioners --problem autoencoder
    python -m benchmarks preconditioners --problem attention --updates 20 --every 2

A network is trained: the autoencoder and the recurrent network by the method of M&S
(2012), the two transformers by `hessian_free` with its defaults. Every few updates the
system of that update, with its λ, is solved from 0 with each preconditioner, until M is
as low as where a target run stops: that of the recipe (empirical Fisher, ξ = 0.75) by
Martens' rule, or that of the defaults (Kronecker factors) by `stopping.marginal`.
Means over the run; a solve that does not get there counts as the limit of iterations.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
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
from benchmarks.harness.race import Carry
from benchmarks.harness.table import rich_table
from benchmarks.suites import sequences
from benchmarks.suites.curves import curves
from benchmarks.suites.images import CURVES, DAMPING, autoencoder
from hfjax.preconditioners import PreconditionerRule as Rule
from hfjax.update._damped import damped

_TARGETS = {
    "recipe": ("empirical Fisher, ξ = 0.75", hfjax.stopping.martens2010()),
    "default": ("Kronecker factors", hfjax.stopping.marginal()),
}
_WEIGHT_DECAY = 2e-5  # of Martens' program


class Setting(NamedTuple):
    """What is trained.

    Attributes:
      objective: f.
      params: where training starts.
      batch: `key -> batch`, of an update.
      tx: what trains.
      exact: whether an example has few enough outputs for the exact diagonal.
    """

    objective: hfjax.Objective
    params: Any
    batch: Callable[[jax.Array], tuple]
    tx: optax.GradientTransformationExtraArgs
    exact: bool


class At(NamedTuple):
    """What a system is made at: θ, λ, and the key of the update."""

    params: Any
    damping: jax.Array
    key: jax.Array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--problem", choices=tuple(_SETTINGS), default="autoencoder")
    add("--updates", type=cli.count, default=40, help="to train; default: 40")
    add("--every", type=cli.count, default=4, help="updates; default: 4")
    add("--cases", type=cli.count, default=500, help="in a batch; default: 500")
    add(
        "--only",
        type=lambda word: tuple(word.split(",")),
        default=("",),
        help="those with one of these in their name; default: all",
    )
    add("--target", choices=tuple(_TARGETS), default="recipe", help="default: recipe")
    add("--limit", type=cli.count, default=300, help="iterations; default: 300")
    add("--seed", type=cli.seed, default=0, help="of start and data; default: 0")
    add("--out", default="runs/preconditioners.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Train, solve, print and write down."""
    console, path, rows = Console(), cli.output_file(args.out), []
    setting = _SETTINGS[args.problem](args)
    for row in compare(setting, args):
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


def rules(*, exact: bool) -> dict[str, tuple[Rule | None, float | None]]:
    """Return what is compared: rules, and the exponents of those that are diagonal."""
    diagonals, kinds = hfjax.diagonals, hfjax.preconditioners
    probes = functools.partial(diagonals.ggn_rademacher, num_probes=8)
    estimates = {
        "empirical Fisher": diagonals.empirical_fisher,
        "Rademacher, 1 probe": diagonals.ggn_rademacher,
        "Rademacher, 8 probes": probes,
    } | ({"exact diag(G)": diagonals.ggn_exact} if exact else {})
    found: dict[str, tuple[Rule | None, float | None]] = {"none": (None, 1.0)}
    for name, estimate in estimates.items():
        rule = kinds.diagonal(estimate, exponent=1.0)
        found |= {f"{name}, ξ = {power:g}": (rule, power) for power in (0.75, 1.0)}
    found["Kronecker factors"] = (kinds.kronecker(), None)
    # With few outputs G has few large eigenvalues.
    for rank in (50, 10 if exact else 200):
        found[f"Nyström, rank {rank}"] = (kinds.nystrom(rank=rank), None)
    return found


def compare(setting: Setting, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train, and compare the preconditioners every few updates.

    Yields:
      A dict in JSON's types for each comparison.
    """
    objective, compared = setting.objective, rules(exact=setting.exact)
    names = [name for name in compared if any(part in name for part in args.only)]
    solve, (own, rule) = _solver(setting, args.limit), _TARGETS[args.target]

    @jax.jit
    def train(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        batch = setting.batch(key)
        _, grads = objective.value_and_grad(params, batch)
        steps, state = setting.tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, steps), state

    params: Any = setting.params
    state: Any = setting.tx.init(params)
    key = jax.random.key(1)
    for update in range(args.updates):
        if update:
            params, state = train(params, state, key)
        key = jax.random.fold_in(jax.random.key(1), update)
        if update % args.every == 0:
            at = At(params, state.damping, key)
            runs = {name: solve(at, *compared[name]) for name in {own, *names}}
            value, models = runs[own]
            goal = float(models[stop(models, rule)])
            yield {
                "update": update,
                "value": float(value),
                "damping": float(state.damping),
                "iterations": {
                    name: iterations_to(goal, np.asarray(runs[name][1]), args.limit)
                    for name in names
                },
            }


def stop(models: jax.Array, rule: hfjax.stopping.StoppingRule) -> int:
    """Return where a rule stops a run with these M; if nowhere, its end."""
    places, one = jnp.arange(len(models)), jnp.ones(())
    stops = jax.vmap(lambda j: rule(hfjax.stopping.Progress(j, models, one, one)))
    return int(jnp.argmax(stops(places).at[-1].set(True)))


def iterations_to(target: float, models: np.ndarray, limit: int) -> int:
    """Return after how many iterations M is at the target, at most `limit`.

    Example:
      >>> iterations_to(-2.0, np.array([0.0, -1.0, -1.9, -2.5]), 3)
      3
    """
    # M of two runs that found the same minimum differs by rounding.
    reached = np.nonzero(models <= target * (1 - 1e-5))[0]
    return int(reached[0]) if len(reached) else limit


def _solver(setting: Setting, limit: int) -> Callable[..., Any]:
    """Return `(at, rule, exponent) -> (f, M after each iteration)`."""

    def build(rule: Rule, at: At) -> Callable[[Any], Any]:
        known = (setting.objective, at.params, setting.batch(at.key), at.damping)
        return rule.build(*known, jax.random.fold_in(at.key, 1))

    @functools.partial(jax.jit, static_argnames="rule")
    def run(at: At, diagonal: Any, rule: Rule | None = None) -> Any:
        objective, batch = setting.objective, setting.batch(at.key)
        value, grads = objective.value_and_grad(at.params, batch)
        found = hfjax.cg.solve(
            damped(hfjax.curvature.ggn(objective, at.params, batch), at.damping),
            jax.tree.map(jnp.negative, grads),
            preconditioner=build(rule, at)
            if rule
            else lambda r: jax.tree.map(jnp.multiply, r, diagonal),
            max_iterations=limit,
            stopping=None,
            keep=hfjax.iterates.every(limit),
        )
        return value, found.model_values

    @functools.partial(jax.jit, static_argnames="rule")
    def inverse(at: At, rule: Rule) -> Any:
        return build(rule, at)(jax.tree.map(jnp.ones_like, at.params))

    def solve(at: At, rule: Rule | None, exponent: float | None) -> Any:
        # Each of the dense rules has a program, which together would not fit into memory,
        # and all diagonals share one.
        if exponent is None:
            return run(at, None, rule=rule)
        ones = jax.tree.map(jnp.ones_like, at.params)
        diagonal = ones if rule is None else inverse(at, rule=rule)
        return run(at, jax.tree.map(lambda x: x**exponent, diagonal))

    return solve


def _autoencoder(args: argparse.Namespace) -> Setting:
    images = jnp.asarray(curves(args.cases))
    init, model_fn = autoencoder(CURVES)
    objective = hfjax.Objective(
        model_fn, hfjax.losses.sigmoid_cross_entropy(), weight_decay=_WEIGHT_DECAY
    )
    return Setting(
        objective,
        jax.jit(init)(jax.random.key(args.seed)),
        lambda key: (images, images),
        hfjax.recipes.martens2010(objective, initial_damping=DAMPING),
        exact=False,
    )


def _addition(args: argparse.Namespace) -> Setting:
    problem = sequences.drawn("addition", 30, args.cases)
    start = Carry(None, None, jnp.int32(0))
    tx = hfjax.recipes.martens2010(problem.objective, initial_damping=problem.damping)
    return Setting(
        problem.objective,
        jax.jit(problem.start)(jax.random.key(args.seed)),
        lambda key: problem.batch(key, start)[0],
        tx,
        exact=True,
    )


def _transformer(args: argparse.Namespace) -> Setting:
    try:  # Only these problems need Flax.
        from benchmarks.micro import transformers
    except ImportError as error:
        msg = f"{error}: pip install 'hfjax[flax]'"
        raise cli.RefusedError(msg) from error
    key, experts = jax.random.key(args.seed), args.problem == "experts"
    objective, params, batch = transformers.problem(key, args.cases, experts=experts)
    tx = hfjax.hessian_free(objective)
    return Setting(objective, params, lambda key: batch, tx, exact=False)


_SETTINGS = {
    "autoencoder": _autoencoder,
    "addition": _addition,
    "attention": _transformer,
    "experts": _transformer,
}


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
