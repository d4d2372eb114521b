"""What a loss is; how a loss of arrays becomes one of trees, and values one a case."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hfjax._types import Tree

LinearMap: TypeAlias = Callable[[Tree], Tree]


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
    """

    value: Callable[[Tree, Tree], jax.Array]
    hessian: Callable[[Tree, Tree], LinearMap]
    factor: Callable[[Tree, Tree], LinearMap]
    predict: Callable[[Tree], Tree]


def by_leaf(
    value: Callable[[jax.Array, jax.Array], jax.Array],
    hessian: Callable[[jax.Array, jax.Array], LinearMap],
    factor: Callable[[jax.Array, jax.Array], LinearMap],
    predict: Callable[[jax.Array], jax.Array],
    *,
    label_axes: int = 0,
) -> Loss:
    """Lift a loss of arrays to pytrees: values are summed, curvature is by leaf.

    Targets have the shape of the outputs without its last `label_axes` axes.
    """

    def leaf_value(z: jax.Array, t: jax.Array) -> jax.Array:
        shape = z.shape[: z.ndim - label_axes]
        if jnp.shape(t) != shape:
            msg = (
                f"Targets for outputs of shape {z.shape} must have shape {shape}, got "
                f"shape {jnp.shape(t)}: they would be broadcast."
            )
            raise ValueError(msg)
        return sum_to_cases(value(z, t), z, "the loss")

    def summed(outputs: Tree, targets: Tree) -> jax.Array:
        values = jax.tree.map(leaf_value, outputs, targets)
        return jax.tree.reduce(jnp.add, values)

    def lift(
        build: Callable[[jax.Array, jax.Array], LinearMap],
    ) -> Callable[[Tree, Tree], LinearMap]:
        def by_leaf(outputs: Tree, targets: Tree) -> LinearMap:
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

    return Loss(summed, lift(hessian), lift(factor), predictions)


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
