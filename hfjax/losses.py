"""Losses: the value of each case, and products with the curvature of the outputs.

A `Loss` compares a model's outputs `z` with targets `t`, case by case. The
generalised Gauss-Newton matrix needs its Hessian `L″` in `z` (report, section
6), the unbiased diagonal estimate a factor `S` with `S Sᵀ = L″` (section 11.4).
The four matching losses have both in closed form (section 6.2, table 2); any
other callable, Optax's per-example losses among them, is differentiated.

    >>> import jax.numpy as jnp
    >>> loss = sigmoid_cross_entropy()
    >>> z, t = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 0.0]])
    >>> product = loss.hessian(z, t)  # p(1 - p) v
    >>> print(product(jnp.ones((1, 2))).round(3))
    [[0.25  0.105]]

Outputs and targets may be pytrees; the loss is then the sum over the leaves.
Every leaf leads with the case axis, further axes are summed.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

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


def squared_error() -> Loss:
    """Return ½‖z − t‖² per case, with `L″ = S = I`; matches linear outputs.

    Returns:
      The loss; half the squared error, as in the report's table 2.

    Example:
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
      >>> print(squared_error().value(z, t))
      [12.5]
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(z - t)

    def identity(z: jax.Array, t: jax.Array) -> LinearMap:
        del z, t
        return lambda v: v

    return _by_leaf(value, identity, identity, lambda z: z)


def sigmoid_cross_entropy() -> Loss:
    """Return −Σ t log σ(z) + (1−t) log σ(−z) per case; matches logistic outputs.

    `L″ = diag(p(1−p))` and `S = diag(√(p(1−p)))` with `p = σ(z)`, formed as
    σ(z)σ(−z), which keeps its digits when the logits saturate. Targets may be
    soft, in [0, 1].

    Returns:
      The loss, in nats summed over output units (report, table 2).

    Example:
      >>> value = sigmoid_cross_entropy().value(
      ...     jnp.zeros((1, 3)), jnp.full((1, 3), 0.3)
      ... )
      >>> bool(jnp.allclose(value, 3 * jnp.log(2)))
      True
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        # softplus(z) − z t without its cancellation, where a saturated logit is right;
        # `where`, as the derivative of |z| at 0 would be 0.
        above, below = jnp.where(z >= 0, z, 0), jnp.where(z >= 0, 0, -z)
        distance = above + below
        return jnp.log1p(jnp.exp(-distance)) + (1 - t) * above + t * below

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        variance = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
        return lambda v: variance * v

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        deviation = jnp.sqrt(jax.nn.sigmoid(z)) * jnp.sqrt(jax.nn.sigmoid(-z))
        return lambda v: deviation * v

    return _by_leaf(value, hessian, factor, jax.nn.sigmoid)


def softmax_cross_entropy() -> Loss:
    """Return −Σ t log softmax(z) per case, over the last axis; `t` may be soft.

    With `p = softmax(z)` and `τ = Σ t` (1 for a distribution):
    `L″ = τ (diag(p) − p pᵀ)`, `S = √τ (diag(√p) − p √pᵀ)`.

    Returns:
      The loss, in nats summed over the axes between the first and the last
      (report, table 2).

    Example:
      The Hessian is blind to a shift of all logits:

      >>> z, t = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[0.0, 1.0, 0.0]])
      >>> shifted = softmax_cross_entropy().hessian(z, t)(jnp.ones((1, 3)))
      >>> bool(jnp.allclose(shifted, 0, atol=1e-6))
      True
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        return -t * jax.nn.log_softmax(z)

    def mass(t: jax.Array) -> jax.Array:
        return jnp.sum(t, axis=-1, keepdims=True)

    return _by_leaf(value, *_softmax_curvature(mass), jax.nn.softmax)


def softmax_cross_entropy_with_integer_labels() -> Loss:
    """Return −log softmax(z)[t] per case, for integer targets `t` of one axis less.

    The curvature is that of `softmax_cross_entropy` with one-hot targets.

    Returns:
      The loss, in nats.

    Example:
      >>> loss = softmax_cross_entropy_with_integer_labels()
      >>> value = loss.value(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> bool(jnp.allclose(value, jnp.log(4)))
      True
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        log_probabilities = jax.nn.log_softmax(z)
        return -jnp.take_along_axis(log_probabilities, t[..., None], axis=-1)

    def mass(t: jax.Array) -> float:
        del t
        return 1.0

    return _by_leaf(value, *_softmax_curvature(mass), jax.nn.softmax, label_axes=1)


def from_function(fn: Callable[[Tree, Tree], jax.Array]) -> Loss:
    """Wrap any per-case loss; its curvature comes from differentiating it.

    `L″ v` is one linearisation of the gradient in the outputs, `S v` the
    symmetric square root of each case's dense `L″` (so `factor` costs memory of
    cases × outputs²: meant for few outputs). The Gauss-Newton matrix is positive
    semi-definite only where `fn` is convex in the outputs; `factor` drops what is
    negative.

    Args:
      fn: `(outputs, targets) -> array` whose leading axis is cases; further axes
        are summed. Optax's losses are such functions. Cases must not mix.

    Returns:
      The loss; `predict` is the identity.

    Example:
      >>> import optax
      >>> ours, theirs = squared_error(), from_function(optax.l2_loss)
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.ones((1, 2))
      >>> bool(ours.value(z, t) == theirs.value(z, t))
      True
      >>> print(theirs.hessian(z, t)(z))
      [[3. 4.]]
    """

    def value(outputs: Tree, targets: Tree) -> jax.Array:
        return _sum_to_cases(fn(outputs, targets), outputs, fn)

    def total(outputs: Tree, targets: Tree) -> jax.Array:
        return jnp.sum(value(outputs, targets))

    def hessian(outputs: Tree, targets: Tree) -> LinearMap:
        gradient = jax.grad(lambda z: total(z, targets))
        return jax.linearize(gradient, outputs)[1]

    def factor(outputs: Tree, targets: Tree) -> LinearMap:
        def dense(z: Tree, t: Tree) -> jax.Array:
            flat, unravel = ravel_pytree(z)
            return jax.hessian(lambda flat: total(*_lead((unravel(flat), t))))(flat)

        values, vectors = jnp.linalg.eigh(jax.vmap(dense)(outputs, targets))
        roots = jnp.sqrt(jnp.maximum(values, 0))

        def one_case(v: Tree, roots: jax.Array, vectors: jax.Array) -> Tree:
            flat, unravel = ravel_pytree(v)
            return unravel(vectors @ (roots * (vectors.T @ flat)))

        return lambda v: jax.vmap(one_case)(v, roots, vectors)

    return Loss(value, hessian, factor, lambda outputs: outputs)


def _by_leaf(
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
        return _sum_to_cases(value(z, t), z, "the loss")

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


def _softmax_curvature(
    mass: Callable[[jax.Array], jax.Array | float],
) -> tuple[Callable[..., LinearMap], Callable[..., LinearMap]]:
    """Return `hessian` and `factor` of softmax, for targets of a given total mass."""

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        p, weight = jax.nn.softmax(z), mass(t)
        winner = jnp.argmax(z, axis=-1, keepdims=True)

        def product(v: jax.Array) -> jax.Array:
            # p (v − pᵀv), with v taken relative to the winning class: L″ is blind to a
            # shift, and a saturated case keeps its digits.
            v = v - jnp.take_along_axis(v, winner, axis=-1)
            return weight * p * (v - jnp.sum(p * v, axis=-1, keepdims=True))

        return product

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        p, weight = jax.nn.softmax(z), jnp.sqrt(mass(t))
        root = jnp.sqrt(p)

        def product(v: jax.Array) -> jax.Array:
            return weight * (root * v - p * jnp.sum(root * v, axis=-1, keepdims=True))

        return product

    return hessian, factor


def _sum_to_cases(values: jax.Array, outputs: Tree, source: object) -> jax.Array:
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


def _lead(tree: Tree) -> Tree:
    """Give every leaf a case axis of length one."""
    return jax.tree.map(lambda leaf: leaf[None], tree)
