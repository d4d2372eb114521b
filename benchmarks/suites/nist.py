"""NIST's Statistical Reference Datasets for nonlinear regression: 27 curves to fit.

Each problem has data, a formula with 2 to 9 parameters b, two starts (the second is
nearer to the solution), and certified results: parameters, their standard deviations and
the sum of squared residuals, which NIST computed with 128-bit numbers and rounded to 11
digits. `nist.json` holds them as in NIST's files at
https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml, which are in the public domain.

    from benchmarks.suites import nist

    problem = nist.load()["Thurber"]
    problem.residuals(problem.starts[0], *problem.data)
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.numpy import exp

Model: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`(b, x) -> y`; if there are two predictors, x has a column for each."""


class Problem(NamedTuple):
    """A curve to fit, and the certified results.

    Attributes:
      level: how hard it is, in NIST's opinion: `"lower"`, `"average"` or `"higher"`.
      model: the formula.
      x: the predictors.
      y: the response. In `Nelson` it is the logarithm of what was measured.
      starts: two starts for b.
      certified: b at the solution.
      deviations: the standard deviation of each entry of `certified`.
      sum_of_squares: that of the residuals at the solution.
    """

    level: str
    model: Model
    x: np.ndarray
    y: np.ndarray
    starts: np.ndarray
    certified: np.ndarray
    deviations: np.ndarray
    sum_of_squares: float

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """What `residuals` takes after b."""
        return self.x, self.y

    def residuals(self, b: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return model − y."""
        return self.model(b, x) - y

    def digits(self, b: np.ndarray, deviations: np.ndarray | None = None) -> float:
        """Count the digits that are right in all parameters: 11 at most, as certified.

        Args:
          b: the parameters of a fit.
          deviations: count the digits of these standard deviations instead.

        Returns:
          A number from 0 to 11, with decimals.
        """
        order, signs = _certified_order(self.model, b)
        found, certified = (b * signs)[order], self.certified
        if deviations is not None:
            found, certified = deviations[order], self.deviations
        error = np.max(np.abs(found / certified - 1))
        return float(np.clip(-np.log10(max(error, 1e-11)), 0, 11))


def _certified_order(model: Model, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return in which order, with which signs, b is to be compared.

    Some formulas have terms that may change places, or parameters that may change their
    signs together.
    """
    order, signs = np.arange(len(b)), np.ones(len(b))
    if model is _mgh17 and b[3] > b[4]:
        order = np.array([0, 2, 1, 4, 3])
    if model is _lanczos:
        order = order.reshape(3, 2)[np.argsort(b[1::2])].ravel()
    if model is _eckerle4:
        signs[:2] = np.sign(b[1])
    return order, signs


def _misra1a(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - exp(-b[1] * x))


def _misra1b(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def _misra1c(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5)


def _misra1d(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * b[1] * x / (1 + b[1] * x)


def _chwirut(b: jax.Array, x: jax.Array) -> jax.Array:
    return exp(-b[0] * x) / (b[1] + b[2] * x)


def _lanczos(b: jax.Array, x: jax.Array) -> jax.Array:
    b1, b2, b3, b4, b5, b6 = b
    return b1 * exp(-b2 * x) + b3 * exp(-b4 * x) + b5 * exp(-b6 * x)


def _gauss(b: jax.Array, x: jax.Array) -> jax.Array:
    b1, b2, b3, b4, b5, b6, b7, b8 = b
    peaks = b3 * exp(-(((x - b4) / b5) ** 2)) + b6 * exp(-(((x - b7) / b8) ** 2))
    return b1 * exp(-b2 * x) + peaks


def _dan_wood(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * x ** b[1]


def _kirby2(b: jax.Array, x: jax.Array) -> jax.Array:
    b1, b2, b3, b4, b5 = b
    return (b1 + b2 * x + b3 * x**2) / (1 + b4 * x + b5 * x**2)


def _cubics(b: jax.Array, x: jax.Array) -> jax.Array:
    b1, b2, b3, b4, b5, b6, b7 = b
    above = b1 + b2 * x + b3 * x**2 + b4 * x**3
    return above / (1 + b5 * x + b6 * x**2 + b7 * x**3)


def _nelson(b: jax.Array, x: jax.Array) -> jax.Array:
    time, temperature = x.T
    return b[0] - b[1] * time * exp(-b[2] * temperature)


def _mgh17(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] + b[1] * exp(-x * b[3]) + b[2] * exp(-x * b[4])


def _roszman1(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi


def _enso(b: jax.Array, x: jax.Array) -> jax.Array:
    b1, b2, b3, b4, b5, b6, b7, b8, b9 = b
    month = 2 * jnp.pi * x
    return (
        b1
        + (b2 * jnp.cos(month / 12) + b3 * jnp.sin(month / 12))
        + (b5 * jnp.cos(month / b4) + b6 * jnp.sin(month / b4))
        + (b8 * jnp.cos(month / b7) + b9 * jnp.sin(month / b7))
    )


def _mgh09(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def _rat42(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / (1 + exp(b[1] - b[2] * x))


def _rat43(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / (1 + exp(b[1] - b[2] * x)) ** (1 / b[3])


def _mgh10(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * exp(b[1] / (x + b[2]))


def _eckerle4(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] / b[1] * exp(-0.5 * ((x - b[2]) / b[1]) ** 2)


def _bennett5(b: jax.Array, x: jax.Array) -> jax.Array:
    return b[0] * (b[1] + x) ** (-1 / b[2])


MODELS: dict[str, Model] = {
    "Misra1a": _misra1a,
    "Chwirut2": _chwirut,
    "Chwirut1": _chwirut,
    "Lanczos3": _lanczos,
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "DanWood": _dan_wood,
    "Misra1b": _misra1b,
    "Kirby2": _kirby2,
    "Hahn1": _cubics,
    "Nelson": _nelson,
    "MGH17": _mgh17,
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Gauss3": _gauss,
    "Misra1c": _misra1c,
    "Misra1d": _misra1d,
    "Roszman1": _roszman1,
    "ENSO": _enso,
    "MGH09": _mgh09,
    "Thurber": _cubics,
    "BoxBOD": _misra1a,
    "Rat42": _rat42,
    "MGH10": _mgh10,
    "Eckerle4": _eckerle4,
    "Rat43": _rat43,
    "Bennett5": _bennett5,
}
"""The formulas, in NIST's order: the easiest first."""


@functools.cache
def load() -> dict[str, Problem]:
    """Read all problems, in NIST's order.

    Returns:
      The problems by name.
    """
    read = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {name: _problem(model, read[name]) for name, model in MODELS.items()}


def _problem(model: Model, read: dict) -> Problem:
    y = np.asarray(read["y"], float)
    x = [np.asarray(read[name], float) for name in ("x", "x1", "x2") if name in read]
    return Problem(
        level=read["level"],
        model=model,
        x=x[0] if len(x) == 1 else np.stack(x, axis=1),
        y=np.log(y) if model is _nelson else y,
        starts=np.asarray([read["start_1"], read["start_2"]], float),
        certified=np.asarray(read["certified"], float),
        deviations=np.asarray(read["deviations"], float),
        sum_of_squares=read["sum_of_squares"],
    )
