"""Negative log likelihoods and divergences, with closed forms beyond the matching losses.

Use one of these when the model predicts a distribution that is neither a class nor a
Gaussian of fixed width. Each takes the outputs as a network gives them, without a
constraint: logarithms of variances and rates, and logits.

| loss | outputs | targets |
|---|---|---|
| `gaussian` | `(mean, log_variance)` | numbers |
| `poisson` | logarithms of rates | counts |
| `ordinal` | K − 1 logits | labels 0, …, K − 1 that have an order |
| `gaussian_kl_divergence` | `(mean, log_variance)` | none, or those of the prior |

L″ is diagonal in all of them, and positive. `hfjax.losses.tree` combines them with one
another, and with any other loss.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hfjax._core import trees
from hfjax._core.arguments import ShapeError, describe
from hfjax._core.types import Tree
from hfjax.losses.loss import (
    LinearMap,
    Loss,
    Targets,
    by_leaf,
    sum_to_cases,
    with_weighted,
)
from hfjax.losses.matching import sigmoid_cross_entropy

_LARGE = 32
"""From this count on, Stirling's series for log t! is exact to 2e-14."""

_Arrays: TypeAlias = tuple[jax.Array, ...]


def gaussian() -> Loss:
    """Return −log N(t; μ, σ²) per example, for outputs `(mean, log_variance)`.

        L = ½ Σ ((t − μ)² e⁻ˢ + s + log 2π),    s = log σ²

    `mean` and `log_variance` are arrays of the shape of the targets. The variance is thus
    predicted for each output; `jnp.broadcast_to` in the model shares one between several.

    L″ is indefinite wherever μ ≠ t: for one output its determinant is −½ (t − μ)² e⁻²ˢ. So
    `hessian` and `factor` belong to its expectation over targets drawn from N(μ, σ²), the
    Fisher information matrix

        F = diag(e⁻ˢ, ½),    S = diag(e⁻ˢᐟ², √½),

    which is positive definite and does not depend on t. G is then the Fisher matrix of the
    model, and an update is a damped natural-gradient step. `hfjax.curvature.hessian` does
    not use `hessian`, and remains the Hessian of f.

    Returns:
      The loss, in nats. Its `predict` returns the mean.

    Raises:
      ValueError: when the loss is evaluated, if the outputs are not such a pair, or the
        targets do not have the shape of the mean.

    Example:
      >>> outputs, t = (jnp.zeros((1, 1)), jnp.zeros((1, 1))), jnp.full((1, 1), 2.0)
      >>> value = gaussian().value(outputs, t)
      >>> bool(jnp.allclose(value, 2 + 0.5 * jnp.log(2 * jnp.pi)))
      True
      >>> ones = jnp.ones((1, 1))
      >>> mean, log_variance = gaussian().hessian(outputs, t)((ones, ones))
      >>> print(mean, log_variance)
      [[1.]] [[0.5]]

    References:
      Nix & Weigend (1994), "Estimating the mean and variance of the target probability
      distribution"; Martens (2020), "New insights and perspectives on the natural gradient
      method".
    """

    def value(mean: jax.Array, s: jax.Array, t: jax.Array) -> jax.Array:
        # The square of a quotient: e⁻ˢ alone overflows at half the s.
        gap = (t - mean) * jnp.exp(-0.5 * s)
        return 0.5 * (jnp.square(gap) + s + math.log(2 * math.pi))

    def roots(mean: jax.Array, s: jax.Array, t: jax.Array) -> _Arrays:
        del mean, t
        return jnp.exp(-0.5 * s), jnp.full_like(s, math.sqrt(0.5))

    return _of_pairs(value, roots, lambda pair: pair[0], lambda t: (t,))


def gaussian_kl_divergence() -> Loss:
    """Return KL(N(μ, eˢ) ‖ N(m, eʳ)) per example, of Gaussians with diagonal covariance.

        L = ½ Σ (e^(s − r) − 1 − (s − r) + (μ − m)² e⁻ʳ)

    The outputs are `(mean, log_variance)`, that is, (μ, s). The targets are those of the
    prior, (m, r), or `None` for the standard normal distribution N(0, I). This is the
    second half of the loss of a variational autoencoder; `hfjax.losses.tree` combines it
    with the first. L is convex in (μ, s), with

        L″ = diag(e⁻ʳ, ½ e^(s − r)),    S = diag(e⁻ʳᐟ², √½ e^((s − r) / 2)).

    A prior that is learned depends on θ, so it is no target. Let the model return both, and
    pass a function of the outputs alone.

    Returns:
      The loss, in nats; its `predict` returns the mean.

    Raises:
      ValueError: when the loss is evaluated, if the outputs are not such a pair, or the
        targets are neither such a pair nor `None`.

    Example:
      >>> outputs = jnp.array([[3.0, 4.0]]), jnp.zeros((1, 2))
      >>> print(gaussian_kl_divergence().value(outputs, None))  # ½ (3² + 4²)
      [12.5]

    References:
      Kingma & Welling (2014), "Auto-encoding variational Bayes", appendix B.
    """

    def relative(
        s: jax.Array, prior: _Arrays
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        m, r = prior or (jnp.zeros_like(s), jnp.zeros_like(s))
        return m, s - r, jnp.exp(-0.5 * r)

    def value(mean: jax.Array, s: jax.Array, *prior: jax.Array) -> jax.Array:
        m, d, precision = relative(s, prior)
        # e^d − 1 − d is nearly d²/2 at the minimum, and e^d − 1 keeps the digits of d.
        return 0.5 * (jnp.expm1(d) - d + jnp.square((mean - m) * precision))

    def roots(mean: jax.Array, s: jax.Array, *prior: jax.Array) -> _Arrays:
        del mean
        _, d, precision = relative(s, prior)
        return precision, math.sqrt(0.5) * jnp.exp(0.5 * d)

    def prior(targets: Tree) -> _Arrays:
        return () if targets is None else _pair("targets", targets)

    return _of_pairs(value, roots, lambda pair: pair[0], prior)


def poisson() -> Loss:
    """Return −log Poisson(t; eᶻ) = Σ (eᶻ − t z + log t!) per example, for counts `t`.

    The outputs are logarithms of rates: add the logarithm of the exposure in the model.
    `L″ = diag(eᶻ)` and `S = diag(eᶻᐟ²)`.

    Returns:
      The loss, in nats, summed over the outputs. Its `predict` returns the rates eᶻ. The
      targets may be any numbers ≥ 0, with the gamma function for t!.

    Example:
      A count of 0 costs its rate:

      >>> value = poisson().value(jnp.log(jnp.full((1, 2), 3.0)), jnp.array([[0, 1]]))
      >>> bool(jnp.allclose(value, 3 + 3 - jnp.log(3)))
      True

    References:
      McCullagh & Nelder (1989), "Generalized linear models", chapter 6.
    """

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        # With z = log t + d this is t (e^d − 1 − d) + c(t). Of a large count, eᶻ, t z and
        # log t! are much larger than the sum, and their rounding would be noise in f.
        some = t > 0
        count = jnp.where(some, t, 1)
        d = z - jnp.log(count)
        return jnp.where(some, count * (jnp.expm1(d) - d) + _least(count), jnp.exp(z))

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        rate = jnp.exp(z)
        return lambda v: rate * v

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        del t
        root = jnp.exp(0.5 * z)
        return lambda v: root * v

    counts = Targets("0 or more", lambda z, t: t >= 0)
    return by_leaf(value, hessian, factor, jnp.exp, targets=counts)


def _least(t: jax.Array) -> jax.Array:
    """Return t − t log t + log t!, the least loss of a count: about ½ log 2πt."""
    small, large = jnp.minimum(t, _LARGE), jnp.maximum(t, _LARGE)
    direct = small - small * jnp.log(small) + jax.lax.lgamma(small + 1)
    x = 1 / large
    series = x * (1 / 12 - jnp.square(x) * (1 / 360 - jnp.square(x) / 1260))
    stirling = 0.5 * jnp.log(2 * math.pi * large) + series
    return jnp.where(t < _LARGE, direct, stirling)


def ordinal() -> Loss:
    """Return the cross-entropy of labels 0 < 1 < … < K − 1 per example, level by level.

        L = −Σₖ ([t > k] log σ(zₖ) + [t ≤ k] log σ(−zₖ)),    k = 0, …, K − 2

    zₖ is the logit of the probability that the label is above k. The last axis of the
    outputs thus has K − 1 entries, one less than there are classes. A mistake by several
    levels costs more than one by a single level. `L″ = diag(p (1 − p))` with `p = σ(z)`,
    and `S = diag(√(p (1 − p)))`.

    The logits may have weights of their own. In CORAL they share those of the last layer,
    zₖ = wᵀh + bₖ, so that P(t > k) decreases with k if the biases do.

    Returns:
      The loss, in nats. Its `predict` returns P(t > k); the label that it predicts is
      `jnp.sum(loss.predict(z) > 0.5, axis=-1)`. Targets lack the last axis of the outputs.
      An out-of-range label yields NaN.

    Raises:
      TypeError: when the loss is evaluated, if the targets are not integers.

    Example:
      Without knowledge, each of the K − 1 = 3 levels costs log 2:

      >>> value = ordinal().value(jnp.zeros((2, 3)), jnp.array([0, 3]))
      >>> bool(jnp.allclose(value, 3 * jnp.log(2)))
      True

    References:
      Cao, Mirjalili & Raschka (2020), "Rank consistent ordinal regression for neural
      networks with application to age estimation" (CORAL); Niu et al. (2016), "Ordinal
      regression with multiple output CNN for age estimation".
    """
    binary = sigmoid_cross_entropy()

    def exists(z: jax.Array, t: jax.Array) -> jax.Array:
        label = t.astype(jnp.int32)
        return (label >= 0) & (label <= z.shape[-1])

    def levels(z: jax.Array, t: jax.Array) -> jax.Array:
        level = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1)
        return (level < t.astype(jnp.int32)[..., None]).astype(z.dtype)

    def value(z: jax.Array, t: jax.Array) -> jax.Array:
        if not jnp.issubdtype(t.dtype, jnp.integer):
            msg = (
                f"`targets` must be integer labels, got {t.dtype}; for the probability "
                "of each level take `sigmoid_cross_entropy`."
            )
            raise TypeError(msg)
        # NaN in the gradient too, so that the update is rejected.
        known = jnp.where(exists(z, t), 1, jnp.nan).astype(z.dtype)[..., None]
        of_levels = binary.value
        for _ in range(z.ndim - 2):  # It is to sum over the levels, not over positions.
            of_levels = jax.vmap(of_levels, in_axes=1, out_axes=1)
        return of_levels(known * z, levels(z, t))

    def hessian(z: jax.Array, t: jax.Array) -> LinearMap:
        return binary.hessian(z, levels(z, t))

    def factor(z: jax.Array, t: jax.Array) -> LinearMap:
        return binary.factor(z, levels(z, t))

    labels = Targets("labels from 0 to the number of logits", exists)
    return by_leaf(value, hessian, factor, binary.predict, label_axes=1, targets=labels)


def _of_pairs(
    value: Callable[..., jax.Array],
    roots: Callable[..., _Arrays],
    predict: Callable[[Tree], Tree],
    read: Callable[[Tree], _Arrays],
) -> Loss:
    """Build a loss of pairs (mean, log variance) from its values and the diagonals of S.

    Both are functions of mean, log variance and the arrays that `read` finds in the
    targets. All of them come in the widest dtype, and products in the dtypes of `v`.
    """

    def met(outputs: Tree, targets: Tree) -> list[jax.Array]:
        mean, s = _pair("outputs", outputs)
        given = [mean, s, *map(jnp.asarray, read(targets))]
        if any(x.shape != mean.shape for x in given):
            msg = (
                f"`targets` must have shape {list(mean.shape[1:])} a case, as the mean, "
                f"got {describe(targets)} for outputs {describe(outputs)}: they would be "
                "broadcast."
            )
            raise ShapeError(msg)
        floats = [x.dtype for x in given if jnp.issubdtype(x.dtype, jnp.inexact)]
        return [x.astype(trees.widest(*floats)) for x in given]

    def values(outputs: Tree, targets: Tree) -> jax.Array:
        return value(*met(outputs, targets))

    def summed(outputs: Tree, targets: Tree) -> jax.Array:
        return sum_to_cases(values(outputs, targets), outputs, "the loss")

    def lift(power: int) -> Callable[[Tree, Tree], LinearMap]:
        def build(outputs: Tree, targets: Tree) -> LinearMap:
            diagonals = [root**power for root in roots(*met(outputs, targets))]

            def product(v: Tree) -> Tree:
                leaves, structure = jax.tree.flatten(v)
                scaled = [
                    (d * x.astype(d.dtype)).astype(x.dtype)
                    for d, x in zip(diagonals, leaves, strict=True)
                ]
                return structure.unflatten(scaled)

            return product

        return build

    return with_weighted(Loss(summed, lift(2), lift(1), predict), values)


def _pair(name: str, tree: Tree) -> tuple[jax.Array, jax.Array]:
    """Return mean and log variance, or raise; `name` is for the error."""
    if isinstance(tree, tuple | list) and len(tree) == 2:
        mean, s = tree
        if jax.tree_util.all_leaves([mean, s]) and jnp.shape(mean) == jnp.shape(s):
            return jnp.asarray(mean), jnp.asarray(s)
    msg = (
        f"`{name}` must be a pair (mean, log_variance) of arrays of one shape, got "
        f"{describe(tree)}."
    )
    raise ValueError(msg)
