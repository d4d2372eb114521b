"""The problems whose updates `costs` compiles: shapes alone, as nothing is run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks import pinn_problems
from benchmarks.data import PIXELS
from benchmarks.network import autoencoder, mirrored
from benchmarks.problem import SETUPS

_POINTS, _UNITS = 500, 16


class Problem(NamedTuple):
    """What an update is compiled for.

    Attributes:
      title: in a few words.
      objective: f.
      params: their shapes.
      batch: its shapes.
      options: of `hessian_free`, but for what a set-up has of its own.
      writers: the functions that the model's exponentials or tanhs are written in,
        `file.function`.
      units: how many layers of these there are in one evaluation of f.
    """

    title: str
    objective: hfjax.Objective
    params: Any
    batch: Any
    options: Mapping[str, Any]
    writers: tuple[str, ...]
    units: int


def readme(cases: int | None, encoder: tuple[int, ...] | None) -> Problem:
    """Return the README's example: 500 points of the plane, 16 tanh units.

    Args:
      cases: points, if not as many.
      encoder: not asked for.
    """
    del encoder

    def readme_model(params: Any, x: jax.Array) -> jax.Array:
        first, second = params
        x = jnp.tanh(x @ first["kernel"] + first["bias"])
        return x @ second["kernel"] + second["bias"]

    params = [
        {"kernel": _shape(2, _UNITS), "bias": _shape(_UNITS)},
        {"kernel": _shape(_UNITS, 1), "bias": _shape(1)},
    ]
    cases = cases or _POINTS
    return Problem(
        f"the README's example, {cases:,} points",
        hfjax.Objective(readme_model, hfjax.losses.squared_error()),
        params,
        (_shape(cases, 2), _shape(cases, 1)),
        {},
        ("cost_problems.readme_model",),
        1,
    )


def curves(cases: int | None, encoder: tuple[int, ...] | None) -> Problem:
    """Return the autoencoder of 2,000 curves: 12 kernels and 12 biases.

    Args:
      cases: images, if not as many.
      encoder: sizes from the pixels to the code, if others.
    """
    cases = cases or 2000
    encoder = encoder or SETUPS["curves"].encoder
    init, model_fn = autoencoder(encoder)
    images = _shape(cases, PIXELS)
    return Problem(
        f"{'-'.join(map(str, encoder))}, {cases:,} images",
        hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy()),
        jax.eval_shape(init, jax.random.key(0)),
        (images, images),
        {},
        ("network.model_fn",),
        len(mirrored(encoder)) - 3,  # The code is linear, and so are the logits.
    )


def poisson(cases: int | None, encoder: tuple[int, ...] | None) -> Problem:
    """Return Poisson's equation on the unit square, and the solver that fits it.

    Args:
      cases: points inside, if not as many as in `pinn`.
      encoder: not asked for.
    """
    del encoder
    problem = pinn_problems.PROBLEMS["poisson2d"]
    (inside, zeros), given = jax.eval_shape(problem.batch, jax.random.key(0))
    if cases:
        inside, zeros = (x.update(shape=(cases, *x.shape[1:])) for x in (inside, zeros))
    return Problem(
        f"{problem.equation.title}, {len(zeros):,} points inside",
        problem.objective,
        jax.eval_shape(problem.init, jax.random.key(0)),
        ((inside, zeros), given),
        {"solver": "auto"},
        ("pinn_operators._tanh", "pinn_operators.network"),
        2 * len(problem.hidden),
    )


PROBLEMS: dict[str, Callable[[int | None, tuple[int, ...] | None], Problem]] = {
    "autoencoder": curves,
    "readme": readme,
    "poisson": poisson,
}
"""By the name on the command line."""


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.zeros(()).dtype)
