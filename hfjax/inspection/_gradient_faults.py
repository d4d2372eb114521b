"""Explain how a user's gradient differs from ∇f, by trying the usual mistakes."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hfjax._core.types import Params
from hfjax.inspection._setup import TINY, Setup, flat, relative


class Facts(NamedTuple):
    """The correct gradient, and what is needed to recognise wrong ones.

    Vectors are flat float64 NumPy arrays.

    Attributes:
      data: gradient of the mean loss: ∇f = data + decay · θ.
      params: θ.
      decay: the objective's weight decay of each parameter.
      cases: number of examples.
      weight: sum of the example weights.
      output_shape: shape of one example's outputs; only their number if they are a tree.
      tolerance: relative error that rounding may cause.
    """

    data: np.ndarray
    params: np.ndarray
    decay: np.ndarray
    cases: int
    weight: float
    output_shape: tuple[int, ...]
    tolerance: float

    @classmethod
    def of(cls, given: Setup, setup: Setup, grads: Params) -> "Facts":
        """Compute the facts from a set-up in the user's precision and one in float64."""
        exact = flat(setup.gradient(setup.params))
        # Near an optimum, ∇f is a small difference of larger terms and mostly rounding.
        # The gradient in the user's precision shows by how much, and so does one at
        # rounded θ.
        noise = max(
            relative(flat(given.gradient(given.params)), exact),
            relative(flat(setup.gradient(setup.rounded(given.rounding))), exact),
        )
        coarsest = max(jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(grads))
        # A compiled gradient sums in another order. If the model does not run in float64,
        # the size of that effect is unknown: allow 1e-3.
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

    @property
    def written(self) -> str:
        """The weight decay, for a sentence."""
        betas = sorted(set(self.decay.tolist())) or [0.0]
        ends = dict.fromkeys(f"{beta:.4g}" for beta in (betas[0], betas[-1]))
        return " to ".join(ends)


def explain(grads: np.ndarray, facts: Facts) -> str | None:
    """Return one sentence on how `grads` differs from ∇f, or `None` if it does not."""
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
    """Yield what `grads` might be instead of ∇f, with a sentence for each."""
    # Candidates without a fitted number come first: they are more specific.
    yield 0 * grads, "`grads` is zero where the gradient of the objective is not."
    decay = facts.decay * facts.params
    for factor, reason in _factors(facts):
        says = f"`grads` is {factor:.4g} times the gradient of"
        yield factor * facts.gradient, f"{says} this objective: {reason}"
        if np.any(facts.decay):
            # The loss is scaled wrongly, but weight decay was added correctly.
            yield factor * facts.data + decay, f"{says} the mean loss: {reason}"
    yield from _decays(grads, facts)
    # One or two numbers could be fitted to any gradient.
    if grads.size > 2:
        yield from _scaled(grads, facts)
        # If it was clipped at all, its largest entry is the bound.
        bound = np.max(np.abs(grads))
        sentence = f"`grads` was clipped by value, to ±{bound:.4g}: pass it unchanged."
        yield np.clip(facts.gradient, -bound, bound), sentence
        yield _nearest(grads, facts)


def _factors(facts: Facts) -> Iterator[tuple[float, str]]:
    """Yield factors by which a gradient may be wrong, and the reasons."""
    yield -1.0, "its sign is reversed."
    if facts.weight != 1:
        yield (
            facts.weight,
            "a sum over the cases, where the objective is their mean (divide by the "
            "total weight).",
        )
        yield -facts.weight, "a sum over the cases, and its sign is reversed."
    if facts.weight != facts.cases:
        reason = "it was divided by the number of cases, not by their total weight."
        yield facts.weight / facts.cases, reason
    shape = facts.output_shape
    for units in dict.fromkeys((int(np.prod(shape)), *shape)):
        if units > 1:
            mean = f"an additional mean over {units} output units or time steps"
            yield 1 / units, f"{mean}, which the objective sums."
            yield 2 / units, f"{mean}, and the ½ of the squared error is missing."
    yield 2.0, "is the ½ of the squared error missing?"


def _decays(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the correct gradient of the loss with a wrong weight decay."""
    square = facts.params @ facts.params
    if np.any(facts.decay):
        lacks = "`grads` lacks the weight decay of the objective,"
        yield facts.data, f"{lacks} {facts.written} θ."
        yield (
            facts.data + 2 * facts.decay * facts.params,
            f"`grads` has the objective's weight decay {facts.written} twice: leave "
            "it to `Objective(weight_decay=…)` alone.",
        )
    if square and grads.size > 2:
        # The least-squares fit of c in grads = data + c θ.
        found = facts.params @ (grads - facts.data) / square
        has = facts.written if np.any(facts.decay) else "none"
        yield (
            facts.data + found * facts.params,
            f"`grads` has weight decay of coefficient {found:.4g}, the objective "
            f"{has}: set `Objective(weight_decay=…)`, and add none to `grads`.",
        )


def _scaled(grads: np.ndarray, facts: Facts) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the multiple of ∇f that is nearest to `grads`."""
    gradient = facts.gradient
    square = gradient @ gradient
    if not square:
        return
    factor = grads @ gradient / square
    lengths = f"{np.linalg.norm(grads):.4g} instead of {np.linalg.norm(gradient):.4g}"
    if 0 < factor < 1:
        sentence = (
            f"`grads` is parallel to the gradient but shorter, of norm {lengths}: "
            "clipped by norm? Pass it unchanged."
        )
    else:
        sentence = (
            f"`grads` is {factor:.4g} times the gradient of this objective, of norm "
            f"{lengths}."
        )
    yield factor * gradient, sentence


def _nearest(grads: np.ndarray, facts: Facts) -> tuple[np.ndarray, str]:
    """Return the nearest linear combination of the mean loss's gradient and θ."""
    matrix = np.stack([facts.data, facts.params], axis=1)
    scale, decay = np.linalg.lstsq(matrix, grads)[0]
    return (
        matrix @ [scale, decay],
        f"`grads` is {scale:.4g} times the gradient of the mean loss plus {decay:.4g} "
        f"θ; for this objective the factors are 1 and {facts.written}.",
    )


def _same(x: np.ndarray, y: np.ndarray, facts: Facts) -> bool:
    return bool(np.linalg.norm(x - y) <= facts.tolerance * np.linalg.norm(y))
