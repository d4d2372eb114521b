"""Curve fits to NIST's certified digits: `hfjax.least_squares` beside other packages.

    python -m benchmarks least_squares
    python -m benchmarks least_squares --problem Thurber,MGH17 --solvers hfjax,leastsq

Each of NIST's 27 problems is fitted from both starts, in float64. All packages have the
same residuals, J by JAX's forward mode, compiled functions, and tolerances at rounding.
Of two solutions that are the same curve, either is right.
"""

import argparse
import functools
import importlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import hfjax
from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json
from benchmarks.harness.machine import timed
from benchmarks.harness.table import rich_table
from benchmarks.suites import nist

RIGHT = 7
"""Digits in every parameter that make a fit right."""

_MOST = 1000  # updates
_TOLERANCE = 1e-14

Residuals = Callable[..., jax.Array]
"""`(b, x, y) -> r`."""
Fit = Callable[[np.ndarray], tuple[Any, Any]]
"""`start -> (b, updates)`."""


def _hfjax(residuals: Residuals, data: tuple) -> Fit:
    def fit(start: np.ndarray) -> tuple[Any, Any]:
        found = hfjax.least_squares(residuals, start, *data, max_updates=_MOST)
        return found.params, len(found.history.value)

    return fit


def _leastsq(residuals: Residuals, data: tuple) -> Fit:
    """Fit by MINPACK's `lmder`."""
    leastsq = importlib.import_module("scipy.optimize").leastsq
    r, jacobian = _compiled(residuals, data)
    tolerances = {"ftol": _TOLERANCE, "xtol": _TOLERANCE, "gtol": 0.0}

    def fit(start: np.ndarray) -> tuple[Any, Any]:
        options = {"Dfun": jacobian, "full_output": True, "maxfev": 10 * _MOST}
        b, _, info, *_ = leastsq(r, start, **options, **tolerances)
        return b, info["njev"]

    return fit


def _least_squares(residuals: Residuals, data: tuple) -> Fit:
    """Fit by SciPy's trust-region method."""
    least_squares = importlib.import_module("scipy.optimize").least_squares
    r, jacobian = _compiled(residuals, data)
    tolerances = {"ftol": _TOLERANCE, "xtol": _TOLERANCE, "gtol": _TOLERANCE}

    def fit(start: np.ndarray) -> tuple[Any, Any]:
        options = {"jac": jacobian, "x_scale": "jac", "max_nfev": _MOST}
        found = least_squares(r, start, **options, **tolerances)
        return found.x, found.njev

    return fit


def _compiled(residuals: Residuals, data: tuple) -> tuple[Callable, Callable]:
    """Return r and J of NumPy's arrays."""
    r, jacobian = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
    return (
        lambda b: np.asarray(r(b, *data)),
        lambda b: np.asarray(jacobian(b, *data)),
    )


def _optimistix(name: str, residuals: Residuals, data: tuple) -> Fit:
    optimistix = importlib.import_module("optimistix")
    solver = getattr(optimistix, name)(rtol=_TOLERANCE, atol=_TOLERANCE)

    def unpacked(b: jax.Array, data: tuple) -> jax.Array:
        return residuals(b, *data)

    def fit(start: np.ndarray) -> tuple[Any, Any]:
        options = {"args": data, "max_steps": _MOST, "throw": False}
        at = jnp.asarray(start)
        found = optimistix.least_squares(unpacked, solver, at, **options)
        return found.value, found.stats["num_steps"]

    return fit


def _jaxopt(residuals: Residuals, data: tuple) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        jaxopt = importlib.import_module("jaxopt")
    solver = jaxopt.LevenbergMarquardt(
        residuals,
        maxiter=_MOST,
        stop_criterion="madsen-nielsen",
        xtol=_TOLERANCE,
        gtol=_TOLERANCE,
        solver="qr",
        materialize_jac=True,
    )

    # Without `jit`, each run is compiled anew.
    run = jax.jit(solver.run)

    def fit(start: np.ndarray) -> tuple[Any, Any]:
        found = run(jnp.asarray(start), *data)
        return found.params, found.state.iter_num

    return fit


SOLVERS: dict[str, Callable[[Residuals, tuple], Fit]] = {
    "hfjax": _hfjax,
    "leastsq": _leastsq,
    "least_squares": _least_squares,
    "optimistix-lm": functools.partial(_optimistix, "LevenbergMarquardt"),
    "optimistix-dogleg": functools.partial(_optimistix, "Dogleg"),
    "jaxopt-lm": _jaxopt,
}
"""What is compared."""


class Row(NamedTuple):
    """A fit from a start.

    Attributes:
      problem: its name.
      start: 1 or 2.
      digits: those that are right in every parameter, at most 11, as certified.
      updates: each has one J.
      evaluations: of r, with those that came with J.
      first: seconds of the first fit of a problem, with compiling; only of start 1.
      again: seconds of another fit.
    """

    problem: str
    start: int
    digits: float
    updates: int
    evaluations: int
    first: float | None
    again: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    known = functools.partial(cli.among, nist.MODELS)
    add("--problem", type=known, default=tuple(nist.MODELS), help="default: all")
    known = functools.partial(cli.among, SOLVERS)
    add("--solvers", type=known, default=tuple(SOLVERS), help="default: all")
    add("--out", default="runs/least_squares.json", help="a JSON file")


def run(args: argparse.Namespace) -> int:
    """Fit, print and write down."""
    console, path = Console(), cli.output_file(args.out)
    table, rows = [_HEAD], {}
    with jax.enable_x64(True):
        for name in args.solvers:
            try:
                rows[name] = list(fits(SOLVERS[name], args.problem))
            except ImportError as error:
                console.print(f"{name} is left out: {error}")
                continue
            table.append(summary(name, rows[name]))
            found = {name: [row._asdict() for row in its] for name, its in rows.items()}
            document = {"arguments": vars(args), **machine.describe(), "rows": found}
            write_json(path, document)
    console.print(rich_table(table, _CAPTION))
    for name, its in rows.items():
        wrong = (f"{row.problem} {row.start}" for row in its if row.digits < RIGHT)
        console.print(f"{name} is not right in: {', '.join(wrong) or 'none'}.")
    console.print(f"Written to {path}", highlight=False, soft_wrap=True)
    return 0


def fits(build: Callable[..., Fit], problems: Sequence[str]) -> Iterator[Row]:
    """Fit problems from both starts.

    Yields:
      A row for each fit.
    """
    for name in problems:
        problem, calls = nist.load()[name], [0]
        data = tuple(map(jnp.asarray, problem.data))

        def counted(
            b: jax.Array,
            *data: jax.Array,
            problem: nist.Problem = problem,
            calls: list[int] = calls,
        ) -> jax.Array:
            jax.debug.callback(functools.partial(_count, calls))
            return problem.residuals(b, *data)

        fit, counting = build(problem.residuals, data), build(counted, data)
        for start, b in enumerate(problem.starts, 1):
            first = timed(lambda b=b, fit=fit: fit(b))[1].wall if start == 1 else None
            (found, updates), again = timed(lambda b=b, fit=fit: fit(b))
            calls[0] = 0
            jax.block_until_ready(counting(b))
            jax.effects_barrier()
            digits = problem.digits(np.asarray(found))
            row = name, start, digits, int(updates), calls[0], first, again.wall
            yield Row(*row)


def _count(calls: list[int]) -> None:
    calls[0] += 1


_HEAD = ["solver", "right", "digits", "updates", "evaluations", "first", "again"]
_CAPTION = (
    f"Right: fits with {RIGHT} digits in every parameter; the other columns are medians of "
    "these. First: seconds of a problem's first fit, with compiling; again: milliseconds "
    "of another fit. Evaluations are those of r, with one for each J."
)


def summary(name: str, rows: Sequence[Row]) -> list[str]:
    """Lay out a solver's line of the table."""
    right = [row for row in rows if row.digits >= RIGHT]
    line = [name, f"{len(right)} of {len(rows)}"]
    if not right:
        return line + ["–"] * 5
    middle = statistics.median
    first = [row.first for row in right if row.first is not None]
    return [
        *line,
        f"{middle(row.digits for row in right):.1f}",
        f"{middle(row.updates for row in right):.0f}",
        f"{middle(row.evaluations for row in right):.0f}",
        f"{middle(first):.2f} s" if first else "–",
        f"{1000 * middle(row.again for row in right):.1f} ms",
    ]
