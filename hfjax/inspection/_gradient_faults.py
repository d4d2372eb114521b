"""What was done to a gradient: which slip turns ∇f into the one that was handed in.

All on flat float64 vectors of NumPy: `data` is the gradient without weight decay, so that
∇f = data + decay · θ.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core.types import Params
from hfjax.inspection._setup import TINY, Setup, flat, relative


class Facts(NamedTuple):
    """What is known of the gradient that was to be.

    Attributes:
      data: gradient of the mean loss, without weight decay.
      params: θ.
      decay: the objective's weight decay.
      cases: how many.
      weight: sum of the case weights.
      output_shape: of one case, where the outputs are one array; else its size alone.
      tolerance: relative error that rounding may make.
    """

    data: np.ndarray
    params: np.ndarray
    decay: float
    cases: int
    weight: float
    output_shape: tuple[int, ...]
    tolerance: float

    @classmethod
    def of(cls, given: Setup, setup: Setup, grads: Params) -> "Facts":
        """Gather the facts in float64, `setup`, and in the precision that is given."""
        exact = flat(setup.gradient(setup.params))
        # Near an optimum ∇f is what rounding leaves of larger terms: θ, rounded, shows
        # how much, as does the precision it is given in.
        noise = max(
            relative(flat(given.gradient(given.params)), exact),
            relative(flat(setup.gradient(setup.rounded(given.rounding))), exact),
        )
        coarsest = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(grads))
        # Compiled, sums round otherwise; where no float64 tells how much, 1e-3.
        floor = 1e-3 if setup is given else max(1e-6, 100 * float(coarsest))
        with setup.precision():
            shapes = jax.eval_shape(setup.outputs, setup.params, setup.batch[0])
        shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(shapes)]
        total = sum(int(np.prod(shape)) for shape in shapes)
        weights = np.asarray(setup.batch[2])
        return cls(
            data=flat(setup.data_gradient(setup.params)),
            params=flat(setup.params),
            decay=setup.decay,
            cases=len(weights),
            weight=float(np.sum(weights)),
            output_shape=shapes[0] if len(shapes) == 1 else (total,),
            tolerance=max(floor, 10 * noise),
        )

    @property
    def gradient(self) -> np.ndarray:
        return self.data + self.decay * self.params


def explain(grads: np.ndarray, facts: Facts) -> str | None:
    """Return one sentence on how `grads` differs from ∇f, `None` if it does not."""
    if _same(grads, facts.gradient, facts):
        return None
    for suspect, sentence in _suspects(grads, facts):
        if _same(grads, suspect, facts):
            return sentence
    size, wrong = np.linalg.norm(facts.gradient), np.linalg.norm(grads - facts.gradient)
    cosine = grads @ facts.gradient / max(np.linalg.norm(grads) * size, TINY)
    return (
        "`grads` is not the gradient of this objective at these parameters on this "
        f"batch: cosine {cosine:.4f}, relative error {wrong / max(size, TINY):.2g}. If "
        "it comes from a larger batch that holds this one, that is fine; else λ climbs."
    )


def _suspects(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield what `grads` might be, the plain slips before the fitted ones."""
    yield 0 * grads, "`grads` is zero where the gradient of the objective is not."
    decay = facts.decay * facts.params
    for factor, reason in _factors(facts):
        says = f"`grads` is {factor:.4g} times the gradient of"
        yield factor * facts.gradient, f"{says} this objective: {reason}"
        if facts.decay:
            # Weight decay was added afterwards, as it should be.
            yield factor * facts.data + decay, f"{says} the mean loss: {reason}"
    yield from _decays(grads, facts)
    if grads.size > 2:  # Fewer numbers would fit by chance.
        yield from _scaled(grads, facts)
        yield from _clipped_by_value(grads, facts)
        yield from _both(grads, facts)


def _factors(facts: Facts) -> Iterator[tuple[float, str]]:
    """Yield factors that a gradient is off by, and why."""
    yield -1.0, "its sign is reversed."
    if facts.weight != 1:
        yield (
            facts.weight,
            "a sum over the cases, where the objective is their mean (divide by the "
            "total weight).",
        )
        yield -facts.weight, "a sum over the cases, and its sign is reversed."
    if facts.weight != facts.cases:
        yield (
            facts.weight / facts.cases,
            "it was divided by the number of cases, not by their total weight.",
        )
    shape = facts.output_shape
    for units in dict.fromkeys((int(np.prod(shape)), *shape)):
        if units > 1:
            mean = f"a mean over {units} output units or time steps too"
            yield 1 / units, f"{mean}, which the objective sums."
            yield 2 / units, f"{mean}, and of the square without its ½."
    yield 2.0, "the square without its ½?"


def _decays(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the right gradient of the loss, with the wrong weight decay."""
    square = facts.params @ facts.params
    if facts.decay:
        yield (
            facts.data,
            f"`grads` lacks the weight decay of the objective, {facts.decay:.4g} θ.",
        )
        yield (
            facts.data + 2 * facts.decay * facts.params,
            f"`grads` has the objective's weight decay {facts.decay:.4g} twice: leave "
            "it to `Objective(weight_decay=…)` alone.",
        )
    if square and grads.size > 2:
        found = facts.params @ (grads - facts.data) / square
        has = f"{facts.decay:.4g}" if facts.decay else "none"
        yield (
            facts.data + found * facts.params,
            f"`grads` has weight decay of coefficient {found:.4g}, the objective "
            f"{has}: set `Objective(weight_decay=…)`, and add none to `grads`.",
        )


def _scaled(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the multiple of the gradient that is nearest."""
    gradient = facts.gradient
    square = gradient @ gradient
    if not square:
        return
    factor = grads @ gradient / square
    lengths = f"{np.linalg.norm(grads):.4g} instead of {np.linalg.norm(gradient):.4g}"
    if 0 < factor < 1:
        sentence = (
            f"`grads` is parallel to the gradient but shorter, of norm {lengths}: "
            "clipped by norm? Hand it in as it is."
        )
    else:
        sentence = (
            f"`grads` is {factor:.4g} times the gradient of this objective, of norm "
            f"{lengths}."
        )
    yield factor * gradient, sentence


def _clipped_by_value(
    grads: np.ndarray, facts: Facts
) -> Iterator[tuple[np.ndarray, str]]:
    bound = np.max(np.abs(grads))
    yield (
        np.clip(facts.gradient, -bound, bound),
        f"`grads` was clipped by value, to ±{bound:.4g}: hand it in as it is.",
    )


def _both(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the nearest multiple of the loss's gradient and of θ together."""
    matrix = np.stack([facts.data, facts.params], axis=1)
    scale, decay = np.linalg.lstsq(matrix, grads)[0]
    yield (
        matrix @ [scale, decay],
        f"`grads` is {scale:.4g} times the gradient of the mean loss plus {decay:.4g} "
        f"θ; of this objective it is 1 and {facts.decay:.4g}.",
    )


def _same(x: np.ndarray, y: np.ndarray, facts: Facts) -> bool:
    return bool(np.linalg.norm(x - y) <= facts.tolerance * np.linalg.norm(y))
