"""What the constants of the defaults are worth: each changed alone, by units of work.

    python -m benchmarks constants --suite images --problem curves2000 --seeds 0,1
    python -m benchmarks constants --suite equations --problem poisson2d --units 100,400

A unit is a product with the curvature: an update counts its iterations of conjugate
gradients, and six for all the rest. An exact update counts as one. So other work on the
machine does not matter. `docs/defaults.md` cites what comes out.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

import hfjax
from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.table import rich_table
from benchmarks.optimizers import MOMENTUM, ours
from benchmarks.suites import equations, images
from benchmarks.suites.problem import Problem, everything
from hfjax import cg, damping, linesearch, preconditioners, sample_space, stopping

SUITES = {"images": images.SUITE, "equations": equations.SUITE}
UPDATE = {"images": 6, "equations": 1}
"""Units of an update besides its iterations."""


def _exact(momentum: float | None, corrections: int) -> dict[str, Any]:
    return {"solver": sample_space.cholesky(momentum=momentum, corrections=corrections)}


def _whatever_f_does(
    along: linesearch.Along, value: Any, slope: Any, first: Any, known: Any
) -> linesearch.StepSize:
    del value, slope, known
    found = along(first)
    return linesearch.StepSize(first, found, jnp.isfinite(found))


def _fixed(
    momentum: float, share: float = 0.1, weight: float = 1e-7, bound: float = jnp.inf
) -> dict[str, Any]:
    """Take a share of a step that is hardly damped, of bounded norm, as SPRING does."""
    return _exact(momentum, 0) | {
        "damping": damping.constant(weight),
        "learning_rate": share,
        "line_search": linesearch.LineSearch(_whatever_f_does),
        "backtracking": None,
        "bound": bound,
    }


FACTORS = {
    "damping_share=1/3": preconditioners.kronecker(damping_share=1 / 3),
    "damping_share=1": preconditioners.kronecker(damping_share=1.0),
    "interval=3": preconditioners.kronecker(interval=3),
    "kronecker(cases=500)": preconditioners.kronecker(cases=500),
}
SOLVERS = {
    "cost=12": {"stopping": stopping.marginal(cost=12.0)},
    "window=1": {"stopping": stopping.marginal(window=1)},
    "window=8": {"stopping": stopping.marginal(window=8)},
    "warm_start_decay=0.95": {"warm_start_decay": 0.95},
}
DAMPING = {
    "levenberg_marquardt()": damping.levenberg_marquardt(),
    "searched(cases=500)": damping.searched(cases=500),
    "searched(factor=2)": damping.searched(factor=2.0),
    "searched(tolerance=0)": damping.searched(tolerance=0.0),
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "images": {
        "defaults": {},
        **{name: {"damping": rule} for name, rule in DAMPING.items()},
        **{name: {"preconditioner": rule} for name, rule in FACTORS.items()},
        **{
            name: {"solver": cg.conjugate_gradient(**changed)}
            for name, changed in SOLVERS.items()
        },
    },
    "equations": {
        f"corrections={count}": _exact(MOMENTUM, count) for count in (0, 4, 8, 16, 32)
    }
    | {"corrections=16, momentum=None": _exact(None, 16)}
    | {
        f"searched, momentum={share}": _exact(share, 16)
        for share in (0.5, 0.8, 0.9, 0.98)
    }
    | {f"fixed, momentum={share}": _fixed(share) for share in (0.8, 0.9, 0.98)}
    | {f"fixed, bound={bound}": _fixed(0.9, bound=bound) for bound in (0.3, 0.1, 0.03)}
    | {f"fixed, weight={weight}": _fixed(0.9, weight=weight) for weight in (1e-5, 1e-3)}
    | {f"fixed, share={share}": _fixed(0.9, share=share) for share in (0.05, 0.5)}
    | {
        f"longest={share}": {"damping": damping.searched(longest=share)}
        for share in (None, 0.25, 0.5, 0.75)
    },
}
"""Options of `hessian_free` in each run, and a bound on the norm of an update."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--suite", choices=tuple(SUITES), default="images")
    add("--problem", help="one or more of the suite's; default: the suite's")
    add("--units", type=lambda word: cli.listed(cli.count, word), default=(300, 600))
    add("--seeds", type=lambda word: cli.listed(cli.seed, word), default=(0,))
    add("--only", help="part of the name of the changes to try; default: all")
    add("--out", default="runs/constants.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Train with each change; print and write down what was reached."""
    suite, rows = SUITES[args.suite], []
    cells = [["problem", "change", *(f"{n} units" for n in sorted(args.units))]]
    changes = {n: c for n, c in CHANGES[args.suite].items() if (args.only or "") in n}
    path = cli.output_file(args.out)
    try:
        names = suite.named(args.problem)
        with jax.enable_x64(suite.float64):
            for name, change in itertools.product(names, changes):
                problem = suite.problems[name].build("")
                reached = [
                    list(lowest(problem, changes[change], seed, args))
                    for seed in args.seeds
                ]
                rows.append({"problem": name, "change": change, "lowest": reached})
                each = zip(*reached, strict=True)
                words = ("; ".join(f"{value:.2g}" for value in cell) for cell in each)
                cells.append([name, change, *words])
    except (OSError, ValueError) as error:
        raise cli.RefusedError(error) from error
    write_json(path, {"arguments": vars(args), **machine.describe(), "rows": rows})
    Console().print(rich_table(cells, f"the lowest value; seeds {args.seeds}"))
    return 0


def lowest(
    problem: Problem, options: dict[str, Any], seed: int, args: argparse.Namespace
) -> Iterator[float]:
    """Train, and yield the lowest value after each number of units."""
    params = jax.jit(problem.start)(jax.random.key(seed))
    measure = problem.measurer(params, seed)
    tx = optimizer(problem.objective, {**problem.options, **options})
    racer = ours(tx, problem, params, seed, everything(problem.parts))
    carry, spent, updates, best = racer.init(params), 0.0, 0, float("inf")
    for units in sorted(args.units):
        while spent < units:
            carry = racer.step(carry)
            updates += 1
            iterations = racer.read(carry)["cg_iterations"]
            spent += UPDATE[args.suite] + (iterations if args.suite == "images" else 0)
            best = min(best, measure(carry.params, updates)[1])
        yield best


def optimizer(objective: Any, options: Any) -> optax.GradientTransformationExtraArgs:
    """Build `hessian_free`; `bound` is of the norm of an update.

    The momentum is that of the whole step.
    """
    kept = {name: option for name, option in options.items() if name != "bound"}
    tx = hfjax.hessian_free(objective, **kept)
    clip = optax.clip_by_global_norm(options.get("bound", jnp.inf))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, state = tx.update(updates, state, params, **extra)
        return clip.update(updates, clip.init(params))[0], state

    return optax.GradientTransformationExtraArgs(tx.init, update)
