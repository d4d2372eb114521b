"""Sums of objectives, Σₖ cₖ fₖ(θ): taken apart, and put together.

What is linear in f (value, gradient, products with its curvature, diagonals) is computed
term by term, each on cases of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax import _options, _tree
from hfjax._arguments import as_params
from hfjax._objective import Objective
from hfjax._types import Batch, NumberOrSchedule, Params, Tree


class Term(NamedTuple):
    """One of the functions that an objective is the sum of.

    Attributes:
      weight: c ≥ 0.
      objective: of one batch.
      batch: its own.
    """

    weight: Any
    objective: Objective
    batch: Batch


def terms_of(objective: Objective, batch: Batch) -> list[Term]:
    """Take a `weighted_sum` apart, those within it too.

    Args:
      objective: any; of one that is no sum it is the only term.
      batch: its batch, of a sum the tuple of its terms' batches.

    Returns:
      The terms.
    """
    if not isinstance(objective, WeightedSum):
        return [Term(1, objective, batch)]
    objective.check_batch(batch)
    return [
        Term(weight * inner, part, data)
        for (weight, whole), own in zip(objective.parts, batch, strict=True)
        for inner, part, data in terms_of(whole, own)
    ]


def sum_of_terms(objective: Objective, batch: Batch, compute: Callable) -> Tree:
    """Compute Σₖ cₖ of what is linear in the objective.

    Args:
      objective: any.
      batch: its batch.
      compute: `(objective, batch, k) -> tree` of the k-th term.

    Returns:
      The sum, in float32 or wider; of an objective that is no sum, its own.
    """
    terms = terms_of(objective, batch)
    if not isinstance(objective, WeightedSum):
        return compute(objective, batch, 0)
    trees = [
        _tree.widen(compute(term, own, k)) for k, (_, term, own) in enumerate(terms)
    ]

    def leaf(*leaves: jax.Array) -> jax.Array:
        dtype = _tree.widest(*(x.dtype for x in leaves))
        scaled = [
            jnp.asarray(weight, dtype) * x.astype(dtype)
            for (weight, _, _), x in zip(terms, leaves, strict=True)
        ]
        return sum(scaled[1:], scaled[0])

    return jax.tree.map(leaf, *trees)


class WeightedSum(Objective):
    """Σₖ cₖ fₖ(θ), of objectives with batches of their own; see `weighted_sum`.

    Attributes:
      parts: pairs (cₖ, fₖ).
    """

    parts: tuple[tuple[NumberOrSchedule, Objective], ...]

    def __init__(self, parts: Sequence[tuple[NumberOrSchedule, Objective]]) -> None:
        object.__setattr__(self, "parts", tuple(parts))
        # What rooms ask of any objective; the rest they ask of its terms.
        object.__setattr__(self, "hidden_loss", None)
        axes = {part.axis_name for _, part in self.parts} - {None}
        object.__setattr__(self, "axis_name", next(iter(axes), None))

    def __repr__(self) -> str:
        return f"WeightedSum({list(self.parts)!r})"

    def at(self, count: jax.Array | int) -> "WeightedSum":
        """Return f as it is at an update, where a cₖ or a weight decay is a schedule."""
        return WeightedSum(
            [
                (
                    _options.read(weight, jnp.asarray(count))
                    if callable(weight)
                    else weight,
                    part.at(count),
                )
                for weight, part in self.parts
            ]
        )

    def value(self, params: Params, batch: Batch) -> jax.Array:
        """Compute f(θ) on the tuple of the terms' batches."""
        return sum_of_terms(self, batch, lambda part, own, _: part.value(params, own))

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        """Compute f(θ) and ∇f(θ) on the tuple of the terms' batches."""
        params = as_params(params)
        value, gradient = sum_of_terms(
            self, batch, lambda part, own, _: part.value_and_grad(params, own)
        )
        return value, _tree.cast_like(gradient, params)

    def case_values(self, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
        """Compute each term's `case_values`: a tuple, as their cases differ."""
        self.check_batch(batch)
        return tuple(
            part.case_values(params, own)
            for (_, part), own in zip(self.parts, batch, strict=True)
        )

    def without_decay(self) -> "WeightedSum":
        """Return f without its terms' weight decay."""
        return WeightedSum([(c, part.without_decay()) for c, part in self.parts])

    def check_batch(self, batch: Batch, name: str = "batch") -> None:
        """Raise unless `batch` holds a batch for each term; `name` is for the error."""
        if not isinstance(batch, tuple | list) or len(batch) != len(self.parts):
            came = type(batch).__name__
            came += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            msg = (
                f"`{name}` of a weighted sum must be a tuple of its terms' "
                f"{len(self.parts)} batches, each (inputs, targets) or (inputs, "
                f"targets, weights), got {came}."
            )
            raise ValueError(msg)
        for k, ((_, part), own) in enumerate(zip(self.parts, batch, strict=True)):
            part.check_batch(own, f"{name}[{k}]")

    def thinned(self, batch: Batch, cases: int) -> Batch:
        """Thin each term's batch; return the batch as it came where none has enough."""
        thinner = tuple(
            part.thinned(own, cases)
            for (_, part), own in zip(self.parts, batch, strict=True)
        )
        same = all(new is own for new, own in zip(thinner, batch, strict=True))
        return batch if same else thinner

    @property
    def decay(self) -> jax.Array | None:
        """The weight decay, Σₖ cₖ of the terms', `None` where it is known to be zero."""
        decays = [
            (jnp.asarray(weight), part.decay)
            for weight, part in self.parts
            if part.decay is not None
        ]
        if not decays:
            return None
        dtype = _tree.widest(*(x.dtype for pair in decays for x in pair))
        terms = [weight.astype(dtype) * decay.astype(dtype) for weight, decay in decays]
        return sum(terms[1:], terms[0])
