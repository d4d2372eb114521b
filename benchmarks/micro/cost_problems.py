"""The problems whose updates `costs` compiles: shapes only, because nothing is run."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import hfjax
from benchmarks import cli
from benchmarks.suites import derivatives
from benchmarks.suites.curves import PIXELS
from benchmarks.suites.equations import EXPERIMENTS
from benchmarks.suites.images import CURVES, autoencoder, mirrored

_POINTS, _UNITS = 500, 16
_SEQUENCES, _STEPS, _FEATURES, _HIDDEN = 100, 256, 2, 100


class Problem(NamedTuple):
    """What an update is compiled for.

    Attributes:
      title: in a few words.
      objective: f.
      params: their shapes.
      batch: its shapes.
      writers: the functions that contain the model's exponentials or tanhs, as
        `file.function`.
      units: how many layers of these there are in one evaluation of f.
      options: of `hessian_free`, in addition to those of a set-up.
      checkpointed: f with a scan that keeps the states of √T steps only.
    """

    title: str
    objective: Any
    params: Any
    batch: Any
    writers: tuple[str, ...]
    units: int
    options: Mapping[str, Any] = {}
    checkpointed: Any = None


def readme(cases: int | None) -> Problem:
    """Return the README's example: 500 points of the plane, 16 tanh units."""

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
        ("cost_problems.readme_model",),
        1,
    )


def curves(cases: int | None, encoder: tuple[int, ...] = CURVES) -> Problem:
    """Return the autoencoder of 2,000 curves: 12 kernels and 12 biases."""
    cases = cases or 2000
    init, model_fn = autoencoder(encoder)
    images = _shape(cases, PIXELS)
    return Problem(
        f"{'-'.join(map(str, encoder))}, {cases:,} images",
        hfjax.Objective(model_fn, hfjax.losses.sigmoid_cross_entropy()),
        jax.eval_shape(init, jax.random.key(0)),
        (images, images),
        ("images.model_fn",),
        len(mirrored(encoder)) - 3,  # The code is linear, and so are the logits.
    )


def poisson(cases: int | None) -> Problem:
    """Return Poisson's equation on the unit square, with the solver that suits it."""
    experiment = EXPERIMENTS["poisson2d"]
    (inside, zeros), given = jax.eval_shape(experiment.batch, jax.random.key(0))
    if cases:
        inside, zeros = (x.update(shape=(cases, *x.shape[1:])) for x in (inside, zeros))
    start = functools.partial(derivatives.init, sizes=experiment.sizes)
    return Problem(
        f"{experiment.equation.title}, {len(zeros):,} points inside",
        experiment.objective,
        jax.eval_shape(start, jax.random.key(0)),
        ((inside, zeros), given),
        ("derivatives._tanh", "derivatives.network"),
        2 * len(experiment.hidden),
        {"solver": "auto"},
    )


def recurrent(cases: int | None) -> Problem:
    """Return a network of 100 tanh units on sequences of 256 steps."""

    def over(scan: Callable[..., Any]) -> hfjax.Objective:
        def recurrent_model(params: Any, inputs: jax.Array) -> jax.Array:
            def recurrent_step(h: jax.Array, x: jax.Array) -> tuple[Any, Any]:
                h = jnp.tanh(x @ params["in"] + h @ params["recurrent"])
                return h, h @ params["out"]

            first = jnp.zeros((len(inputs), _HIDDEN), inputs.dtype)
            return scan(recurrent_step, first, inputs.swapaxes(0, 1))[1].swapaxes(0, 1)

        return hfjax.Objective(recurrent_model, hfjax.losses.squared_error())

    cases = cases or _SEQUENCES
    return Problem(
        f"{_HIDDEN} recurrent units, {cases:,} sequences of {_STEPS} steps",
        over(jax.lax.scan),
        {
            "in": _shape(_FEATURES, _HIDDEN),
            "recurrent": _shape(_HIDDEN, _HIDDEN),
            "out": _shape(_HIDDEN, 1),
        },
        (_shape(cases, _STEPS, _FEATURES), _shape(cases, _STEPS, 1)),
        ("cost_problems.recurrent_step",),
        1,
        checkpointed=over(hfjax.scan.checkpointed),
    )


def transformer(blocks: int, cases: int | None, *, scanned: bool = True) -> Problem:
    """Return a transformer whose blocks are in a scan, or written out."""
    try:  # Only these problems need Flax.
        from benchmarks.micro import transformers
    except ImportError as error:
        msg = f"{error}: pip install 'hfjax[flax]'"
        raise cli.RefusedError(msg) from error
    model, cases = transformers.Blocks(blocks, scanned), cases or 100
    steps = _shape(cases, transformers.STEPS, transformers.SYMBOLS + 2)
    params = jax.eval_shape(model.init, jax.random.key(0), steps)
    return Problem(
        f"a transformer of {blocks} blocks{' in a scan' * scanned}, {cases:,} sequences",
        hfjax.Objective(
            model.apply, hfjax.losses.softmax_cross_entropy_with_integer_labels()
        ),
        params,
        (steps, jax.ShapeDtypeStruct(steps.shape[:2], int)),
        (),  # How often its softmax is in a program depends on how XLA writes it.
        1,
    )


PROBLEMS: dict[str, Callable[[int | None], Problem]] = {
    "autoencoder": curves,
    "readme": readme,
    "poisson": poisson,
    "recurrent": recurrent,
    "transformer2": functools.partial(transformer, 2),
    "transformer4": functools.partial(transformer, 4),
    "transformer12": functools.partial(transformer, 12),
    "transformer4_unrolled": functools.partial(transformer, 4, scanned=False),
}
"""By the name on the command line."""

FLOAT64 = frozenset(["poisson"])
"""Problems that are solved in float64."""


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.zeros(()).dtype)
