"""How exact M is in float32: summed gains beside ½(r − b)ᵀx, on hard spectra.

Conjugate gradients run in float32, and the truth is M at the same iterates in float64.
The stopping rules read M's decrease over a window of ten iterations.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cli
from benchmarks.harness import machine
from benchmarks.harness.history import write_json

WINDOW = 10


class Errors(NamedTuple):
    """Largest errors over a run, of M relative to |M| and of its decrease."""

    value: float
    decrease: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--size", type=cli.count, default=2000, help="unknowns; default: 2000")
    add("--iterations", type=cli.count, default=250, help="default: 250")
    add("--out", default="runs/precision.json", help="default: runs/precision.json")


def run(args: argparse.Namespace) -> int:
    """Measure both ways for several condition numbers; print and write down."""
    if args.iterations <= WINDOW:
        msg = f"--iterations must be more than {WINDOW}, got {args.iterations}"
        raise cli.RefusedError(msg)
    path, rows = cli.output_file(args.out), {}
    print(f"{'condition':>10} {'way':>14} {'M':>9} {'decrease over 10':>17}")
    for power in (2, 4, 6, 8):
        gains, residuals = measure(args.size, 10.0**power, args.iterations)
        rows[f"1e{power}"] = {"gains": gains._asdict(), "residual": residuals._asdict()}
        for way, errors in (("summed gains", gains), ("½(r − b)ᵀx", residuals)):
            numbers = f"{errors.value:9.1e} {errors.decrease:17.1e}"
            print(f"{10.0**power:10.0e} {way:>14} {numbers}")
    write_json(path, {"arguments": vars(args), **machine.describe(), "rows": rows})
    return 0


def measure(size: int, condition: float, iterations: int) -> tuple[Errors, Errors]:
    """Run conjugate gradients once and compare two ways to know M.

    Returns:
      The errors of summed gains, and of ½(r − b)ᵀx.
    """
    generator = np.random.default_rng(0)
    spectrum = np.geomspace(1 / condition, 1, size)
    basis, _ = np.linalg.qr(generator.standard_normal((size, size)))
    matrix = (basis * spectrum) @ basis.T
    b = matrix @ generator.standard_normal(size)
    low = jnp.asarray(matrix, jnp.float32), jnp.asarray(b, jnp.float32)
    xs, gains, residuals = jax.jit(_descend, static_argnums=2)(*low, iterations)
    exact = np.asarray(low[0], np.float64), np.asarray(low[1], np.float64)
    x = np.asarray(xs, np.float64)
    truth = 0.5 * np.einsum("ki,ij,kj->k", x, exact[0], x, optimize=True) - x @ exact[1]
    return _errors(gains, truth), _errors(residuals, truth)


def _descend(
    matrix: jax.Array, b: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return x, M by gains and M by residuals at every iterate (M&S 2012, algorithm 2)."""

    def step(carry: tuple, _: None) -> tuple[tuple, tuple]:
        x, r, p, rr, model = carry
        product = matrix @ p
        curvature = jnp.sum(p * product)
        alpha = rr / curvature
        x, r = x + alpha * p, r + alpha * product
        model = model - (alpha * rr - 0.5 * alpha**2 * curvature)
        new = jnp.sum(r * r)
        p = -r + (new / rr) * p
        return (x, r, p, new, model), (x, model, 0.5 * jnp.sum((r - b) * x))

    start = (jnp.zeros_like(b), -b, b, jnp.sum(b * b), jnp.zeros((), b.dtype))
    return jax.lax.scan(step, start, length=iterations)[1]


def _errors(measured: jax.Array, truth: np.ndarray) -> Errors:
    found = np.asarray(measured, np.float64)
    value = np.max(np.abs(found - truth) / np.abs(truth))
    decrease, true_decrease = (m[:-WINDOW] - m[WINDOW:] for m in (found, truth))
    error = np.abs(decrease - true_decrease) / np.abs(truth[WINDOW:])
    return Errors(float(value), float(np.max(error)))
