"""What a loss is; how a loss of arrays becomes one of trees, and values one a case."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import ShapeError, describe
from hfjax._core.types import Tree
from hfjax.losses import _case_axes

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

    Targets have the shape of the outputs without its last `label_axes` axes. Booleans
    and integers that are no labels count as floats: −t of an unsigned one is none.
    Outputs and targets of two dtypes meet in the wider one; products are like `v`.
    """

    def met(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, t = jnp.asarray(z), jnp.asarray(t)
        if label_axes:
            return z, t
        is_float = jnp.issubdtype(t.dtype, jnp.inexact)
        dtype = trees.widest(z.dtype, t.dtype) if is_float else z.dtype
        return z.astype(dtype), t.astype(dtype)

    def leaf_value(z: jax.Array, t: jax.Array) -> jax.Array:
        return sum_to_cases(value(*met(z, t)), z, "the loss")

    def leaf_product(
        build: Callable[[jax.Array, jax.Array], LinearMap], z: jax.Array, t: jax.Array
    ) -> LinearMap:
        z, t = met(z, t)
        apply = build(z, t)
        return lambda v: apply(v.astype(z.dtype)).astype(v.dtype)

    def summed(outputs: Tree, targets: Tree) -> jax.Array:
        _check_targets(outputs, targets, label_axes)
        values = jax.tree.map(leaf_value, outputs, targets)
        dtype = trees.widest(*(leaf.dtype for leaf in jax.tree.leaves(values)))
        return jax.tree.reduce(
            jnp.add, jax.tree.map(lambda leaf: leaf.astype(dtype), values)
        )

    def lift(
        build: Callable[[jax.Array, jax.Array], LinearMap],
    ) -> Callable[[Tree, Tree], LinearMap]:
        def by_leaf(outputs: Tree, targets: Tree) -> LinearMap:
            _check_targets(outputs, targets, label_axes)
            structure = jax.tree.structure(outputs)
            maps = [
                leaf_product(build, z, t)
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

    meant = None if targets is None else _on_trees(targets, met)
    return Loss(summed, lift(hessian), lift(factor), predictions, meant)


def _on_trees(targets: Targets, met: Callable[..., tuple]) -> Targets:
    def leaf(z: jax.Array, t: jax.Array) -> jax.Array:
        fits = targets.allowed(*met(z, t))
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
            raise ShapeError(msg)


PAIRS = (
    "A loss that compares cases with one another (pairs, contrastive learning) takes "
    "the whole batch as one case: give every leaf a leading axis of length 1."
)
"""What to do with a loss that mixes cases on purpose."""


def sum_to_cases(values: jax.Array, outputs: Tree, source: object) -> jax.Array:
    """Sum every axis but the first, which must be the outputs' case axis."""
    cases = jax.tree.leaves(outputs)[0].shape[:1]
    if values.shape[:1] != cases or not cases:
        msg = (
            f"{_name(source)} must return one value per case (leading axis "
            f"{cases or 'missing'}), got shape {values.shape}: do not average or sum "
            f"over the cases, `Objective` does. {PAIRS}"
        )
        raise ShapeError(msg)
    return jnp.sum(values, axis=range(1, values.ndim))


def case_by_case(
    fn: Callable[[Tree, Tree], jax.Array],
) -> Callable[[Tree, Tree], jax.Array]:
    """Return a function's values summed to one per case, unless shapes show that it mixes.

    It does where outputs `[cases, 1]` and targets `[cases]` are broadcast to
    `[cases, cases]`: two values meet with the cases on different axes, or axes beside
    the first depend on the number of cases.

    Args:
      fn: `(outputs, targets) -> [cases, …]`, of the user.
    """
    known: set = set()  # Shapes that passed: they are looked at once.

    def value(outputs: Tree, targets: Tree) -> jax.Array:
        values = fn(outputs, targets)
        summed = sum_to_cases(values, outputs, fn)
        given = jax.tree.map(jax.typeof, (outputs, targets))
        leaves, structure = jax.tree.flatten(given)
        shapes = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if shapes not in known:
            _check_unmixed(fn, given, values.shape)
            known.add(shapes)
        return summed

    return value


def _check_unmixed(
    fn: Callable[[Tree, Tree], jax.Array], given: tuple[Tree, Tree], shape: tuple
) -> None:
    """Raise if a loss mixes cases, by its program for one case more."""
    cases = shape[0]
    if any(leaf.shape[:1] != (cases,) for leaf in jax.tree.leaves(given)):
        return
    program = _program(fn, given, cases + 1)
    if program is None and cases > 1:
        # It is right, perhaps, for this number of cases alone.
        program = _program(fn, given, cases)
    if program is None:
        return
    (result,) = (atom.aval.shape for atom in program.jaxpr.outvars)
    if _case_axes.crosses(program):
        how = "sets the outputs or targets of one case against those of others"
    elif result[:1] == (cases + 1,) and result[1:] != shape[1:]:
        how = f"makes {list(shape)}, and of one case more {list(result)}"
    else:
        return
    outputs, targets = map(describe, given)
    msg = (
        f"`loss` must not mix cases: of outputs {outputs} and targets {targets} it "
        f"{how}. If they are broadcast, give both the same shape, by `squeeze(-1)` or "
        f"`targets[:, None]`. {PAIRS}"
    )
    raise ShapeError(msg)


def _program(
    fn: Callable[[Tree, Tree], jax.Array], given: tuple[Tree, Tree], cases: int
) -> Any:
    """Trace a loss for a number of cases; `None` if it is for no such number."""

    def resized(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cases, *leaf.shape[1:]), leaf.dtype)

    try:
        return jax.make_jaxpr(fn)(*jax.tree.map(resized, given))
    except Exception:
        return None


def _name(source: object) -> object:
    return getattr(source, "__name__", source)
