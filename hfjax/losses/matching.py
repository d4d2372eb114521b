"""Losses: the value for each example, and products with the curvature at the outputs.

A `Loss` compares a model's outputs `z` with targets `t`. The Gauss-Newton matrix needs
its Hessian `L″` with respect to `z`; diagonal and preconditioner estimates need a factor
`S` with `S Sᵀ = L″`. The four losses below have both in closed form; they are listed in
Martens & Sutskever (2012), table 2. `gaussian`, `poisson`, `ordinal` and
`gaussian_kl_divergence` have closed forms, too, and `tree` combines losses.
`from_function` wraps any other callable, such as Optax's losses; `docs/losses.md` says how
well suited each of those is.

    >>> import jax.numpy as jnp
    >>> loss = sigmoid_cross_entropy()
    >>> z, t = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 0.0]])
    >>> product = loss.hessian(z, t)  # p(1 - p) v
    >>> print(product(jnp.ones((1, 2))).round(3))
    [[0.25  0.105]]

Outputs and targets may be pytrees, and the loss is then summed over their leaves. The
first axis of every leaf indexes the examples; further axes are summed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Tree
from hfjax._tracing.linearize import derivative_of_gradient
from hfjax.losses import _repair, _softmax, positions
from hfjax.losses.loss import LinearMap, Targets, by_leaf, case_by_case
from hfjax.losses.loss import Loss as Loss


def squared_error() -> Loss:
    """Return ½‖z − t‖² per example, with `L″ = S = I`; matches linear outputs.

    Returns:
      The loss. Note the factor ½.

    Example:
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
      >>> print(squared_error().value(z, t))
      [12.5]
    """

    def identity(z: jax.Array, t: jax.Array) -> LinearMap:
        del z, t
        return lambda v: v

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(z - t)

    return by_leaf(value, identity, identity, lambda z: z)


def sigmoid_cross_entropy() -> Loss:
    """Return −Σ [t log σ(z) + (1−t) log σ(−z)] per example; matches logistic outputs.

    `L″ = diag(p(1−p))` and `S = diag(√(p(1−p)))` with `p = σ(z)`. Targets may be soft: any
    numbers in [0, 1].

    Returns:
      The loss, in nats, summed over the outputs.

    Example:
      >>> value = sigmoid_cross_entropy().value(
      ...     jnp.zeros((1, 3)), jnp.full((1, 3), 0.3)
      ... )
      >>> bool(jnp.allclose(value, 3 * jnp.log(2)))
      True
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        # This is softplus(z) − z t, but does not cancel where a saturated logit is right.
        # It uses `where` because JAX's derivative of |z| at 0 is 0, which would be wrong.
        above, below = jnp.where(z >= 0, z, 0), jnp.where(z >= 0, 0, -z)
        distance = above + below
        return jnp.log1p(jnp.exp(-distance)) + (1 - t) * above + t * below

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        # p(1 − p) as σ(z) σ(−z): 1 − p would lose its digits as p approaches 1.
        variance = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
        return lambda v: variance * v

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        deviation = jnp.sqrt(jax.nn.sigmoid(z)) * jnp.sqrt(jax.nn.sigmoid(-z))
        return lambda v: deviation * v

    between = Targets("between 0 and 1", lambda z, t: (t >= 0) & (t <= 1))
    return by_leaf(value, hessian, factor, jax.nn.sigmoid, targets=between)


def softmax_cross_entropy() -> Loss:
    """Return −Σ t log softmax(z) per example, over the last axis; `t` may be soft.

    With `p = softmax(z)` and `τ = Σ t` (1 for a probability distribution),
    `L″ = τ (diag(p) − p pᵀ)` and `S = √τ (diag(√p) − p √pᵀ)`.

    Returns:
      The loss, in nats, summed over the axes between the first and the last.

    Example:
      A shift of all logits changes nothing, so it is in the null space of L″:

      >>> z, t = jnp.array([[1.0, -2.0, 0.5]]), jnp.array([[0.0, 1.0, 0.0]])
      >>> shifted = softmax_cross_entropy().hessian(z, t)(jnp.ones((1, 3)))
      >>> bool(jnp.allclose(shifted, 0, atol=1e-6))
      True
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        return -jnp.sum(t * jax.nn.log_softmax(z), axis=-1)

    positive = Targets("0 or more", lambda z, t: t >= 0)
    curvature = _softmax.curvature(lambda t: jnp.sum(t, axis=-1, keepdims=True))
    return by_leaf(value, *curvature, jax.nn.softmax, targets=positive)


def softmax_cross_entropy_with_integer_labels(*, curvature: str = "full") -> Loss:
    """Return −log softmax(z)[t] per example, for integer labels `t`.

    `t` lacks the last axis of `z`. The curvature is that of `softmax_cross_entropy` with
    one-hot targets. Let p be the probability of the true class, q those of the other
    classes if it is none of them (0 for the true class), and a = eₜ − q. Then

        L″ = p (1 − p) a aᵀ + (1 − p) (diag(q) − q qᵀ).

    The first part is the curvature of the true class against all others, the second that
    among the others. Both are positive semi-definite, and for two classes the second is 0.
    The first is the largest multiple of ∇L∇Lᵀ that does not exceed L″. Without the second,
    the Jacobian that `hfjax.sample_space` writes out has one row for each label instead of
    one for each class, and the matrix that it factors is smaller by as much.

    Args:
      curvature: `"full"` for L″, `"true_class"` for its first part, which then takes the
        place of L″ in G. Values and gradients are the same.

    Returns:
      The loss, in nats. An out-of-range label, a negative one included, yields NaN,
      unless the example or the position has weight 0.

    Raises:
      TypeError: when the loss is evaluated, if the targets are not integers.
      ValueError: if `curvature` is unknown.

    Example:
      >>> loss = softmax_cross_entropy_with_integer_labels()
      >>> value = loss.value(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> bool(jnp.allclose(value, jnp.log(4)))
      True

    References:
      Korbit & Zanon (2026), "Fast Gauss-Newton for multiclass cross-entropy"
      (`"true_class"`).
    """
    options.check_choice("curvature", curvature, ("full", "true_class"))

    def exists(z: jax.Array, t: jax.Array) -> jax.Array:
        label = t.astype(jnp.int32)
        return (label >= 0) & (label < z.shape[-1])

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        if not jnp.issubdtype(t.dtype, jnp.integer):
            msg = (
                f"`targets` must be integer labels, got {t.dtype}; for probabilities "
                "take `softmax_cross_entropy`."
            )
            raise TypeError(msg)
        # An out-of-range label yields NaN, in the gradient too, so that the update is
        # rejected. Plain indexing would wrap it round, or leave it out of the gradient.
        known = jnp.where(exists(z, t), 1, jnp.nan).astype(z.dtype)[..., None]
        log_probabilities = jax.nn.log_softmax(known * z)
        return -jnp.take_along_axis(log_probabilities, t[..., None], axis=-1)[..., 0]

    labels = Targets("labels of the classes there are, from 0", exists)
    maps = _softmax.curvature(lambda t: 1.0)
    if curvature == "true_class":
        maps = _softmax.of_true_class, _softmax.factor_of_true_class
    return by_leaf(value, *maps, jax.nn.softmax, label_axes=1, targets=labels)


def from_function(
    fn: Callable[[Tree, Tree], jax.Array], *, positive: str | None = None
) -> Loss:
    """Wrap any per-example loss; its curvature comes from automatic differentiation.

    `L″ v` is the linearised gradient with respect to the outputs. `S v`, which diagonal
    and preconditioner estimates need, depends on which outputs of an example the loss
    couples, that is, between which L″ is not zero. hfjax reads this off the loss's traced
    program:

    | coupled outputs | S | cost |
    |---|---|---|
    | none, as in an elementwise loss | √L″, which is diagonal | a few passes over the outputs |
    | blocks, each through a single sum, as in a softmax | closed form, without a repair | a few passes |
    | other blocks of K ≤ 96 outputs | symmetric square root of each block | time examples × outputs × K², memory examples × outputs × K |
    | larger blocks | only S Sᵀ ≈ L″, by 12 Lanczos steps | 12 products with L″ for each S v |

    `hfjax.preconditioners.layers` and `hfjax.verify.check` tell you if the last row
    applies.

    If `fn` is not convex in the outputs, the Gauss-Newton matrix may be indefinite.
    `positive` repairs L″ of each example, with eigenvalues λ and eigenvectors u:

    - "clip" sets negative λ to 0: L″ + Σ max(0, −λ) u uᵀ;
    - "shift" adds max(0, −min λ) I, which also damps the directions of positive curvature;
    - for blocks of more than 64 outputs both add max(0, Σ_{j≠i} |L″ᵢⱼ| − L″ᵢᵢ) to
      diagonal entry i (Gershgorin's theorem), which always suffices and is usually more
      than needed.

    The repair leaves a convex loss unchanged to rounding error, in blocks of more than 64
    outputs only if L″ is diagonally dominant. At each new θ it costs one product with L″
    for each of the K outputs of a block, and one eigendecomposition of each block of up
    to 64.

    If a nonlinearity makes the loss non-convex, **move it into the model** instead of
    repairing L″: ½‖tanh(y) − t‖² is not convex in y, but ½‖z − t‖² is convex in z =
    tanh(y), and f(θ) is the same.

    Args:
      fn: `(outputs, targets) -> array` whose first axis indexes the examples; further axes
        are summed, and may have weights. Optax's losses are such functions. It must not mix
        examples, except in an `Objective` with `whole_batch`, where it may also return their
        mean.
      positive: how to repair a loss that is not convex in the outputs: "clip", "shift", or
        `None` for no repair. Without repair, `factor` still leaves out negative curvature.

    Returns:
      The loss; its `predict` is the identity. A repair changes neither values nor
      gradients.

    Raises:
      ValueError: if `positive` is anything else.

    Example:
      >>> import optax
      >>> ours, theirs = squared_error(), from_function(optax.l2_loss)
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.ones((1, 2))
      >>> bool(ours.value(z, t) == theirs.value(z, t))
      True

      L″ of a loss that is not convex in y, and with a repair:

      >>> squashed = lambda y, t: 0.5 * (jnp.tanh(y) - t) ** 2
      >>> y, v = jnp.array([[2.0]]), jnp.ones((1, 1))
      >>> bool(from_function(squashed).hessian(y, 0 * y)(v) < 0)
      True
      >>> print(from_function(squashed, positive="clip").hessian(y, 0 * y)(v))
      [[0.]]

    References:
      Martens & Sutskever (2012), section 6.3. Gershgorin's theorem: Golub & Van Loan,
      Matrix Computations, theorem 7.2.1.
    """
    if positive is not None:
        options.check_choice("positive", positive, ("clip", "shift"))

    def whole(is_weighted: bool) -> Loss:
        values = positions.whole_batch_values(fn, is_weighted=is_weighted)
        return _differentiated(values, positive)

    # The weights go into the function, as it may couple positions.
    weighted = case_by_case(positions.weighted_values(fn))
    return dataclasses.replace(
        _differentiated(case_by_case(fn), positive),
        weighted=_differentiated(weighted, positive),
        whole=dataclasses.replace(whole(False), weighted=whole(True)),
    )


def _differentiated(
    value: Callable[[Tree, Any], jax.Array], positive: str | None
) -> Loss:
    """Build a loss whose derivatives are those of its values, one for each example."""

    # Examples do not mix, so the Hessian of the sum over the batch is block-diagonal: one
    # product with it is a product with every example's L″.
    def curvature(outputs: Tree, targets: Tree) -> LinearMap:
        gradient = jax.grad(lambda z: jnp.sum(value(z, targets)))
        return derivative_of_gradient(gradient, outputs)

    def hessian(outputs: Tree, targets: Tree) -> LinearMap:
        product = curvature(outputs, targets)
        if positive is None:
            return product
        missing = _repair.missing(curvature, product, outputs, targets, positive)
        return lambda v: jax.tree.map(jnp.add, product(v), missing(v))

    def factor(outputs: Tree, targets: Tree) -> LinearMap:
        return _repair.root(curvature, outputs, targets, positive)

    def coarse(outputs: Tree, targets: Tree) -> str | None:
        return _repair.coarse(curvature, outputs, targets, positive)

    return Loss(value, hessian, factor, lambda outputs: outputs, coarse=coarse)
