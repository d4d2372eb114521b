"""Losses: the value of each case, and products with the curvature of the outputs.

A `Loss` compares a model's outputs `z` with targets `t`, case by case. The
generalised Gauss-Newton matrix needs its Hessian `L″` in `z` (report, section
6), the unbiased diagonal estimate a factor `S` with `S Sᵀ = L″` (section 11.4).
The four matching losses have both in closed form (section 6.2, table 2); any
other callable, Optax's per-example losses among them, is differentiated:
`docs/losses.md` has how each of them fares.

    >>> import jax.numpy as jnp
    >>> loss = sigmoid_cross_entropy()
    >>> z, t = jnp.array([[0.0, 2.0]]), jnp.array([[1.0, 0.0]])
    >>> product = loss.hessian(z, t)  # p(1 - p) v
    >>> print(product(jnp.ones((1, 2))).round(3))
    [[0.25  0.105]]

Outputs and targets may be pytrees; the loss is then the sum over the leaves.
Every leaf leads with the case axis, further axes are summed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hfjax._core import options
from hfjax._core.types import Tree
from hfjax._tracing.linearize import derivative_of_gradient
from hfjax.losses import _repair
from hfjax.losses.loss import LinearMap, Targets, by_leaf, case_by_case
from hfjax.losses.loss import Loss as Loss


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

    return by_leaf(value, identity, identity, lambda z: z)


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

    between = Targets("between 0 and 1", lambda z, t: (t >= 0) & (t <= 1))
    return by_leaf(value, hessian, factor, jax.nn.sigmoid, targets=between)


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

    positive = Targets("0 or more", lambda z, t: t >= 0)
    curvature = _softmax_curvature(mass)
    return by_leaf(value, *curvature, jax.nn.softmax, targets=positive)


def softmax_cross_entropy_with_integer_labels() -> Loss:
    """Return −log softmax(z)[t] per case, for integer targets `t` of one axis less.

    The curvature is that of `softmax_cross_entropy` with one-hot targets.

    Returns:
      The loss, in nats; NaN where a label is not one of the classes, negative ones
      included: give cases without a label the weight 0, and any label.

    Raises:
      TypeError: when it is called, if the targets are not integers.

    Example:
      >>> loss = softmax_cross_entropy_with_integer_labels()
      >>> value = loss.value(jnp.zeros((2, 4)), jnp.array([0, 3]))
      >>> bool(jnp.allclose(value, jnp.log(4)))
      True
    """

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
        # A label that there is not makes NaN, of the gradient too, and so a rejected
        # update: indexing would wrap it round, or leave it out of the gradient.
        known = jnp.where(exists(z, t), 1, jnp.nan).astype(z.dtype)[..., None]
        log_probabilities = jax.nn.log_softmax(known * z)
        return -jnp.take_along_axis(log_probabilities, t[..., None], axis=-1)

    def mass(t: jax.Array) -> float:
        del t
        return 1.0

    return by_leaf(
        value,
        *_softmax_curvature(mass),
        jax.nn.softmax,
        label_axes=1,
        targets=Targets("labels of the classes there are, from 0", exists),
    )


def from_function(
    fn: Callable[[Tree, Tree], jax.Array], *, positive: str | None = None
) -> Loss:
    """Wrap any per-case loss; its curvature comes from differentiating it.

    `L″ v` is one linearisation of the gradient in the outputs. `S v`, for preconditioners
    and diagonals, depends on which outputs of a case the loss couples, which is read off
    its program:

    - none, as in every elementwise loss: L″ is diagonal, and S its root;
    - those of blocks, by one sum over each, as softmax does over its last axis: S has a
      closed form, diag(a) + b cᵀ being known. Both cost a few passes over the outputs,
      as the losses above do;
    - those of blocks of up to 96 outputs in another way: S is the symmetric square root
      of each dense block, K of its outputs for cases × outputs × K² time and cases ×
      outputs × K memory;
    - larger blocks: S v is the result of 12 steps of Lanczos, and S Sᵀ is L″ only nearly.
      `hfjax.preconditioners.layers` and `hfjax.verify.check` then say so.

    Where `fn` is not convex in the outputs, the Gauss-Newton matrix is not positive
    semi-definite, unless `L″` of each case, with eigenvalues λ, is repaired:

    - "clip": negative λ become 0, L″ + Σ max(0, −λ) u uᵀ;
    - "shift": L″ + max(0, −min λ) I. Damps what was positive too;
    - either where more than 64 outputs are coupled: by Gershgorin's circles, entry i of
      the diagonal grows by max(0, Σ_{j≠i} |L″ᵢⱼ| − L″ᵢᵢ). Enough in any case, and more
      than is needed in most.

    To rounding, a convex loss stays as it is, if no more than 64 outputs are coupled, or
    L″ is diagonally dominant. For each new θ a repair costs one product with L″ for each
    of the K outputs of a block, and one eigendecomposition a block of up to 64.

    Better than any repair, where a nonlinearity makes the loss non-convex: **move it
    into the model**. ½‖tanh(y) − t‖² is not convex in y, ½‖z − t‖² is in z = tanh(y),
    and f(θ) is the same.

    Args:
      fn: `(outputs, targets) -> array` whose leading axis is cases; further axes
        are summed. Optax's losses are such functions. Cases must not mix.
      positive: repair of a loss that is not convex in the outputs: "clip", "shift",
        or `None` for none, where only `factor` drops what is negative: of the diagonal
        apart from the outer product, where it has that closed form.

    Returns:
      The loss; `predict` is the identity. Values and gradients know no repair.

    Raises:
      ValueError: if `positive` is something else.

    Example:
      >>> import optax
      >>> ours, theirs = squared_error(), from_function(optax.l2_loss)
      >>> z, t = jnp.array([[3.0, 4.0]]), jnp.ones((1, 2))
      >>> bool(ours.value(z, t) == theirs.value(z, t))
      True
      >>> print(theirs.hessian(z, t)(z))
      [[3. 4.]]

      One parameter, so that G is its own smallest eigenvalue: tanh in the loss, there
      but repaired, and moved into the model.

      >>> import hfjax
      >>> def smallest_eigenvalue(model_fn, loss):
      ...     f, batch = hfjax.Objective(model_fn, loss), (jnp.ones(1), jnp.zeros(1))
      ...     return float(
      ...         hfjax.curvature.ggn(f, jnp.array(2.0), batch)(jnp.array(1.0))
      ...     )
      >>> squashed = lambda y, t: 0.5 * (jnp.tanh(y) - t) ** 2
      >>> smallest_eigenvalue(lambda p, x: p * x, from_function(squashed)) < -0.1
      True
      >>> clipped = from_function(squashed, positive="clip")
      >>> smallest_eigenvalue(lambda p, x: p * x, clipped)
      0.0
      >>> smallest_eigenvalue(lambda p, x: jnp.tanh(p * x), squared_error()) > 0.004
      True

    References:
      Martens & Sutskever (2012), section 6.3. Gershgorin's bound: Golub & Van Loan,
      Matrix Computations, theorem 7.2.1.
    """
    if positive is not None:
        options.check_choice("positive", positive, ("clip", "shift"))

    value = case_by_case(fn)

    def total(outputs: Tree, targets: Tree) -> jax.Array:
        return jnp.sum(value(outputs, targets))

    def curvature(outputs: Tree, targets: Tree) -> LinearMap:
        gradient = jax.grad(lambda z: total(z, targets))
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
