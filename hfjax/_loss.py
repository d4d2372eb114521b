"""What a loss is; how a loss of arrays becomes one of trees, and values one a case."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._types import Tree

LinearMap: TypeAlias = Callable[[Tree], Tree]


class Targets(NamedTuple):
    """What the targets of a loss are meant to be; looked at by `hfjax.verify` alone.

    Attributes:
      words: for people.
      allowed: `(outputs, targets) -> [cases]`, whether each case's are such.
    """

    words: str
    allowed: Callable[[Tree, Tree], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss, with its curvature at the outputs.

    Attributes:
      value: `(outputs, targets) -> [cases]`, the loss of each case.
      hessian: `(outputs, targets) -> (v -> L″ v)`; whatever depends on the outputs
        alone is computed once, outside the product.
      factor: `(outputs, targets) -> (v -> S v)` with `S Sᵀ = L″`, `v` like the
        outputs.
      predict: outputs to predictions, the matching link (identity, logistic,
        softmax).
      targets: what they are meant to be, `None` if anything goes.
      coarse: `(outputs, targets) -> str | None`, of one case: where `factor` is only
        nearly S, and why, in words; `None` where it is exact.
    """

    value: Callable[[Tree, Tree], jax.Array]
    hessian: Callable[[Tree, Tree], LinearMap]
    factor: Callable[[Tree, Tree], LinearMap]
    predict: Callable[[Tree], Tree]
    targets: Targets | None = None
    coarse: Callable[[Tree, Tree], str | None] = lambda outputs, targets: None


def by_leaf(
    value: Callable[[jax.Array, jax.Array], jax.Array],
    hessian: Callable[[jax.Array, jax.Array], LinearMap],
    factor: Callable[[jax.Array, jax.Array], LinearMap],
    predict: Callable[[jax.Array], jax.Array],
    *,
    label_axes: int = 0,
    targets: Targets | None = None,
) -> Loss:
    """Lift a loss of arrays to pytrees: values are summed, curvature is by leaf.

    Targets have the shape of the outputs without its last `label_axes` axes.
    """

    def leaf_value(z: jax.Array, t: jax.Array) -> jax.Array:
        return sum_to_cases(value(z, t), z, "the loss")

    def summed(outputs: Tree, targets: Tree) -> jax.Array:
        _check_targets(outputs, targets, label_axes)
        values = jax.tree.map(leaf_value, outputs, targets)
        return jax.tree.reduce(jnp.add, values)

    def lift(
        build: Callable[[jax.Array, jax.Array], LinearMap],
    ) -> Callable[[Tree, Tree], LinearMap]:
        def by_leaf(outputs: Tree, targets: Tree) -> LinearMap:
            _check_targets(outputs, targets, label_axes)
            structure = jax.tree.structure(outputs)
            maps = [
                build(z, t)
                for z, t in zip(
                    structure.flatten_up_to(outputs),
                    structure.flatten_up_to(targets),
                    strict=True,
                )
            ]

            def product(v: Tree) -> Tree:
                leaves = structure.flatten_up_to(v)
                return structure.unflatten(
                    [apply(leaf) for apply, leaf in zip(maps, leaves, strict=True)]
                )

            return product

        return by_leaf

    def predictions(outputs: Tree) -> Tree:
        return jax.tree.map(predict, outputs)

    meant = None if targets is None else _on_trees(targets)
    return Loss(summed, lift(hessian), lift(factor), predictions, meant)


def _on_trees(targets: Targets) -> Targets:
    def leaf(z: jax.Array, t: jax.Array) -> jax.Array:
        fits = targets.allowed(z, t)
        return jnp.all(fits, axis=range(1, fits.ndim))

    def allowed(outputs: Tree, targets: Tree) -> jax.Array:
        return jax.tree.reduce(jnp.logical_and, jax.tree.map(leaf, outputs, targets))

    return Targets(targets.words, allowed)


def _check_targets(outputs: Tree, targets: Tree, label_axes: int) -> None:
    ours, theirs = jax.tree.structure(outputs), jax.tree.structure(targets)
    if ours != theirs:
        msg = (
            "`targets` must be a tree like what `model_fn` returns, got "
            f"{theirs} for outputs {ours}."
        )
        raise ValueError(msg)
    for z, t in zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True):
        shape = z.shape[: z.ndim - label_axes]
        if jnp.shape(t) != shape:
            msg = (
                f"`targets` must have shape {list(shape[1:])} a case, for outputs of "
                f"shape {list(z.shape[1:])} a case, got {list(jnp.shape(t)[1:])}: they "
                "would be broadcast."
            )
            raise ValueError(msg)


def sum_to_cases(values: jax.Array, outputs: Tree, source: object) -> jax.Array:
    """Sum every axis but the first, which must be the outputs' case axis."""
    cases = jax.tree.leaves(outputs)[0].shape[:1]
    if values.shape[:1] != cases or not cases:
        name = getattr(source, "__name__", source)
        msg = (
            f"{name} must return one value per case (leading axis {cases or 'missing'}"
            f"), got shape {values.shape}: do not average or sum over the cases, "
            "`Objective` does."
        )
        raise ValueError(msg)
    return jnp.sum(values, axis=range(1, values.ndim))
