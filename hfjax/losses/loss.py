"""What a `Loss` is; lifts losses of arrays to pytrees, checks that examples do not mix."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import ShapeError, describe
from hfjax._core.types import Tree
from hfjax.losses import _case_axes, _coupling, positions

LinearMap: TypeAlias = Callable[[Tree], Tree]
_Curvature: TypeAlias = Callable[[jax.Array, jax.Array], LinearMap]
_Values: TypeAlias = Callable[[Tree, Tree], jax.Array]


class Targets(NamedTuple):
    """Targets that a loss is meant for: in words, and `(outputs, targets) -> [cases]`."""

    words: str
    allowed: _Values


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A loss, with its curvature with respect to the outputs.

    `hfjax.losses.from_function` makes one from a function. Write one yourself if you know
    its curvature in closed form. `cases` is the number of examples, the first axis of
    every leaf.

    Attributes:
      value: `(outputs, targets) -> [cases]`, the loss of each example.
      hessian: `(outputs, targets) -> (v -> L″ v)`, where `v` is like the outputs. It is
        called once and the product many times, so compute in advance what does not depend
        on `v`. If L″ is indefinite, this may be a positive matrix that takes its place in
        G, as in `gaussian`.
      factor: `(outputs, targets) -> (v -> S v)` with `S Sᵀ = L″`, where `v` is like the
        outputs. If L″ has a low rank, let S v read a slice of `v` alone: the other columns
        of S are 0, and no row of a Jacobian is computed for them.
      predict: outputs to predictions, the link function (identity, logistic, softmax).
      targets: which targets the loss is meant for; `None` if any will do.
      coarse: `(outputs, targets) -> str | None`, for a single example: why `factor` only
        approximates S, as a clause for messages; `None` if it is exact.
      weighted: the same loss with weights for its positions, whose targets are pairs
        (targets, weights) and whose values are Σₚ wₚ Lₚ. `None` if there is none: then
        only whole examples can have weights.
      whole: for a function that may compare the examples of a batch with one another: the
        loss of a batch that is one example, with a leading axis of length 1. Targets are
        pairs as in `weighted`; its own `weighted` is for weights that the user gives.
        `None` if the examples do not mix: then `weighted` does the same.
    """

    value: _Values
    hessian: Callable[[Tree, Tree], LinearMap]
    factor: Callable[[Tree, Tree], LinearMap]
    predict: Callable[[Tree], Tree]
    targets: Targets | None = None
    coarse: Callable[[Tree, Tree], str | None] = lambda outputs, targets: None
    weighted: "Loss | None" = None
    whole: "Loss | None" = None


def by_leaf(
    value: _Values,
    hessian: _Curvature,
    factor: _Curvature,
    predict: Callable[[jax.Array], jax.Array],
    *,
    label_axes: int = 0,
    targets: Targets | None = None,
) -> Loss:
    """Lift a loss of arrays to pytrees: sum the values, apply the curvature leaf by leaf.

    `value` returns one number for each position, with axes that the outputs start with.
    Targets have the shape of the outputs without their last `label_axes` axes. Outputs
    and targets of different dtypes are computed in the wider one; products have the dtype
    of `v`.
    """

    def met(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        z, t = jnp.asarray(z), jnp.asarray(t)
        if label_axes:
            return z, t  # Labels are indices, and stay integers.
        # Integer and boolean targets become floats: −t of an unsigned one would wrap.
        is_float = jnp.issubdtype(t.dtype, jnp.inexact)
        dtype = trees.widest(z.dtype, t.dtype) if is_float else z.dtype
        return z.astype(dtype), t.astype(dtype)

    def values(outputs: Tree, targets: Tree) -> Tree:
        _check_targets(outputs, targets, label_axes)
        return jax.tree.map(lambda z, t: value(*met(z, t)), outputs, targets)

    def summed(outputs: Tree, targets: Tree) -> jax.Array:
        found = values(outputs, targets)
        leaves = [sum_to_cases(x, outputs, "the loss") for x in jax.tree.leaves(found)]
        dtype = trees.widest(*(leaf.dtype for leaf in leaves))
        return functools.reduce(jnp.add, [leaf.astype(dtype) for leaf in leaves])

    def lift(build: _Curvature) -> Callable[[Tree, Tree], LinearMap]:
        def leaf_product(z: jax.Array, t: jax.Array) -> LinearMap:
            # Whatever depends only on z and t is computed here, once for many products.
            z, t = met(z, t)
            apply = build(z, t)
            return lambda v: apply(v.astype(z.dtype)).astype(v.dtype)

        def by_leaf(outputs: Tree, targets: Tree) -> LinearMap:
            _check_targets(outputs, targets, label_axes)
            maps = jax.tree.map(leaf_product, outputs, targets)
            return lambda v: jax.tree.map(lambda apply, leaf: apply(leaf), maps, v)

        return by_leaf

    meant = None if targets is None else _on_trees(targets, met)
    predictions = functools.partial(jax.tree.map, predict)
    loss = Loss(summed, lift(hessian), lift(factor), predictions, meant)
    return with_weighted(loss, values)


def with_weighted(loss: Loss, values: Callable[[Tree, Tree], Tree]) -> Loss:
    """Add `weighted` to a loss whose values at a position depend on the outputs there alone.

    `values` returns those of `loss` before the positions are summed, as one array or a tree.
    """
    weighted, meant = positions.weighted_values(values), loss.targets
    of_pairs = None
    if meant is not None:
        of_pairs = Targets(meant.words, lambda z, pair: meant.allowed(z, pair[0]))
    twin = dataclasses.replace(
        loss,
        value=lambda z, pair: sum_to_cases(weighted(z, pair), z, "the loss"),
        hessian=positions.weighted_map(values, loss.hessian, lambda weights: weights),
        factor=positions.weighted_map(values, loss.factor, jnp.sqrt),
        targets=of_pairs,
    )
    return dataclasses.replace(loss, weighted=twin)


def _on_trees(targets: Targets, met: Callable[..., tuple]) -> Targets:
    def leaf(z: jax.Array, t: jax.Array) -> jax.Array:
        fits = targets.allowed(*met(z, t))
        return jnp.all(fits, axis=range(1, fits.ndim))

    def allowed(outputs: Tree, targets: Tree) -> jax.Array:
        return jax.tree.reduce(jnp.logical_and, jax.tree.map(leaf, outputs, targets))

    return Targets(targets.words, allowed)


def columns(loss: Loss, outputs: Tree, targets: Tree) -> Sequence[int]:
    """Return which columns of S may differ from 0, of one for each output.

    `outputs` and `targets` are those of one example, with its leading axis.
    """
    program = _coupling.trace(loss.factor, outputs, targets)
    return _coupling.columns(program, [z.shape for z in jax.tree.leaves(outputs)])


def are_disjoint(
    loss: Loss, outputs: Tree, targets: Tree, columns: Sequence[int]
) -> bool:
    """Return whether no output depends on two of these columns of S.

    If all columns are disjoint, S is diagonal: each output has a loss of its own. If the
    program of S leaves it open, the answer is no.
    """
    program = _coupling.trace(loss.factor, outputs, targets)
    blocks = _coupling.blocks(program, [z.shape for z in jax.tree.leaves(outputs)])
    return len(set(blocks[list(columns)].tolist())) == len(columns)


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
    "A loss that compares cases with one another on purpose (contrastive learning) needs "
    "`Objective(…, whole_batch=True)`."
)
"""Advice for a loss that compares examples on purpose."""


def sum_to_cases(values: jax.Array, outputs: Tree, source: object) -> jax.Array:
    """Sum over every axis except the first, which must index the examples."""
    cases = jax.tree.leaves(outputs)[0].shape[:1]
    if values.shape[:1] != cases or not cases:
        name = getattr(source, "__name__", source)
        msg = (
            f"{name} must return one value per case (leading axis "
            f"{cases or 'missing'}), got shape {values.shape}: do not average or sum "
            f"over the cases, `Objective` does. {PAIRS}"
        )
        raise ShapeError(msg)
    return jnp.sum(values, axis=range(1, values.ndim))


def case_by_case(fn: _Values) -> _Values:
    """Return `fn` with its values summed to one per example; raise if it mixes examples.

    Mixing shows in the shapes when outputs `[cases, 1]` and targets `[cases]` broadcast to
    `[cases, cases]`. Mixing that leaves no trace in the shapes is found by `hfjax.verify`.
    """
    # The check traces the loss again, so each combination of shapes is checked once.
    known: set = set()

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


def _check_unmixed(fn: _Values, given: tuple[Tree, Tree], shape: tuple) -> None:
    """Raise if the program of a loss for one more example shows that it mixes examples."""
    cases = shape[0]
    # Only trees whose leaves all lead with the examples can be traced for more of them.
    if any(leaf.shape[:1] != (cases,) for leaf in jax.tree.leaves(given)):
        return
    # With one more example, every axis that depends on their number changes its length,
    # and the axis of a single example cannot be mistaken for one to be broadcast.
    program = _program(fn, given, cases + 1)
    if program is None and cases > 1:
        # The loss may be written for exactly this number of examples.
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


def _program(fn: _Values, given: tuple[Tree, Tree], cases: int) -> Any:
    """Trace a loss for a number of examples; return `None` if it cannot be traced."""

    def resized(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((cases, *leaf.shape[1:]), leaf.dtype)

    # Any error counts: the user's own call, with the real shapes, has already succeeded.
    try:
        return jax.make_jaxpr(fn)(*jax.tree.map(resized, given))
    except Exception:
        return None
