"""Preconditioners: positive definite matrices P ≈ A whose inverses are cheap to apply.

| function | P | cost to build, in gradients |
|---|---|---|
| `diagonal` | (d + λ diag(D) + κ s)^ξ, with d the diagonal of a curvature matrix | 1 |
| `kronecker` | a Kronecker product of two matrices for each layer | 1 to 2, plus inverses |
| `nystrom` | the largest eigenvalues of G, and one number for the rest | 4/3 `rank` |
| `custom` | user-supplied | |

P includes the damping: it approximates A = B + λD, the matrix that conjugate gradients
work on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from hfjax._core import options, trees
from hfjax._core.arguments import check_function, with_key
from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax.curvature import diagonals
from hfjax.objectives.objective import Objective
from hfjax.preconditioners import _kronecker, _nystrom, _remembered
from hfjax.preconditioners._layer_report import layers as layers


class PreconditionerRule(NamedTuple):
    """How an update builds its preconditioner.

    Attributes:
      build: `(objective, params, batch, damping, key) -> (r -> P⁻¹ r)`. `damping` is
        the diagonal of λD: the scalar λ if D = I, otherwise a tree like the parameters.
        If D = B it is 0, because the scale of P does not matter. With structural
        damping, the loss of `objective` includes the distance of the hidden states.
        `key` is a typed key, new in each update; it depends only on the seed of
        `hessian_free` and the number of the update.
      data: what `build` gets as its batch: the update's `"batch"`, which the curvature
        uses, or its `"eval_batch"`.
      init: `params -> memory`, for a rule that keeps something from one update to the
        next. Its `build` also takes `memory` and `count`, the number of updates so far,
        and returns `(r -> P⁻¹ r, memory)`. `None` if the rule keeps nothing.
    """

    build: Callable[..., Any]
    data: str = "batch"
    init: Callable[[Params], Tree] | None = None


def diagonal(
    estimate: diagonals.Estimate = diagonals.empirical_fisher,
    *,
    exponent: Number = 0.75,
    kappa: Number = 0.0,
    scale: Tree | None = None,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by the diagonal matrix P = (d + λ diag(D) + κ s)^ξ.

    Args:
      estimate: `(objective, params, batch) -> d`, user-supplied or a function of
        `hfjax.diagonals`; d includes the weight decay. If it takes a `key`, it gets a
        new one in each update, as in `functools.partial(diagonals.ggn_rademacher,
        num_probes=4)`.
      exponent: ξ in [0, 1]; 1 gives the diagonal itself, 0 the identity.
      kappa: κ ≥ 0, on the scale of d. It keeps P away from 0 if λ is small or 0.
      scale: s, the coarse relative scale of each parameter's curvature, a tree like the
        parameters; `None` is 1 everywhere.
      data: which data d is estimated on: `"batch"`, the data of the curvature that P
        approximates, or `"eval_batch"`.

    Returns:
      The rule.

    Raises:
      ValueError: if an option is out of range.

    Example:
      >>> import hfjax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))  # d = 2.5
      >>> rule = diagonal(exponent=0.5)
      >>> precondition = rule.build(f, jnp.zeros(1), batch, jnp.float32(1.5), None)
      >>> print(precondition(jnp.array([6.0])))  # 6 / √(2.5 + 1.5)
      [3.]

    References:
      Martens & Sutskever (2012), sections 11.2 and 13; Martens (2010), section 4.7.
    """
    options.check_range("exponent", exponent, low=0.0, high=1.0)
    options.check_range("kappa", kappa, low=0.0)
    options.check_choice("data", data, ("batch", "eval_batch"))
    call = "(objective, params, batch) -> diagonal"
    check_function("estimate", estimate, call)

    def build(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
    ) -> Preconditioner:
        entries = with_key(estimate, key)(objective, params, batch)
        damped = trees.damped(entries, damping)
        powers = trees.ones_for_zeros(
            trees.interpolate(damped, exponent=exponent, kappa=kappa, scale=scale)
        )
        return lambda r: jax.tree.map(
            lambda r, p: (r.astype(p.dtype) / p).astype(r.dtype), r, powers
        )

    return PreconditionerRule(build, data=data)


def kronecker(
    *,
    damping_share: Number = 0.1,
    decay: Number = 0.0,
    interval: int = 1,
    max_size: int = 8192,
    cases: int | None = 2000,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by the Kronecker factors of each layer, and a diagonal for the rest.

        P = (Ḡ + √(g/a) √(sλ) I) ⊗ (Ā + √(a/g) √(sλ) I)        for each kernel
        P = d + λ                                              for each other parameter

    x is the input of a layer, with a 1 appended for a bias, and Ā is the mean of x xᵀ
    over examples and positions. g is the vector Sᵢvᵢ, propagated back from the outputs
    of the model to the output of the layer; vᵢ are random signs, and SᵢSᵢᵀ = L″ᵢ is the
    Hessian of the loss with respect to the outputs. Ḡ is the mean of g gᵀ over
    examples, summed over positions. In the formula, a and g are the mean eigenvalues of
    Ā and Ḡ, and d is the estimate of diag(G) that `diagonals.ggn_rademacher` gives.
    Weight decay is added to λ.

    Without damping, P would equal G if x and g, and different layers, were independent.
    The less this holds, the more iterations conjugate gradients need.

    Layers need no registration: the program of `model_fn` is traced. See `layers` for
    what counts as a layer, and for what was found in a model.

    A build costs a forward and a backward pass; for each layer, cases · positions ·
    (inputs² + units²) multiplications for x xᵀ and g gᵀ; and two inverses, inputs³ +
    units³. It holds the inputs of all layers (the patches, for a convolution), which
    microbatches bound. A product P⁻¹r takes inputs · units · (inputs + units)
    multiplications for each layer.

    Args:
      damping_share: s > 0, the fraction of λ that damps the factors. Values below 1 make
        up for the cross terms of the product, which also damp.
      decay: ε in [0, 1], for a running average of the factors: the k-th build keeps
        min(ε, 1 − 1/k) of the average so far. 0 uses each batch alone, and needs no
        memory.
      interval: number of updates from one build to the next; those in between reuse its
        inverses.
      max_size: longest side of a kernel that gets factors; larger kernels get the
        diagonal. A factor of size 8192 takes 256 MiB in float32.
      cases: estimate the factors on at least this many examples: every k-th one of the
        batch (under `axis_name`, of each device's part), with k as large as possible.
        `None` for all.
      data: as in `diagonal`.

    Returns:
      The rule. With a `decay`, or an `interval` above 1, the optimizer state holds, for
      each parameter that may be a kernel, matrices of `(inputs + 1)²` and `(units +
      1)²` entries, and a diagonal for every parameter; with both, it holds them twice.

    Raises:
      TypeError: if a count is not a Python integer.
      ValueError: if an option is out of range.

    Example:
      For a linear model with white inputs, P is a multiple of G + λI, and one iteration
      is enough:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> p, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[1.0], [3.0]]))
      >>> rule = kronecker(damping_share=1.0)
      >>> invert = rule.build(f, p, batch, jnp.float32(0.25), jax.random.key(0))
      >>> r = jnp.array([[1.0], [2.0]])
      >>> product = hfjax.curvature.ggn(f, p, batch)
      >>> ratio = invert(product(r) + 0.25 * r) / r  # a multiple of 1
      >>> print(bool(jnp.allclose(ratio, ratio[0])))
      True

    References:
      Martens & Grosse (2015), "Optimizing neural networks with Kronecker-factored
      approximate curvature", sections 3, 5 and 6.3; Grosse & Martens (2016), for
      convolutions.
    """
    options.check_range("damping_share", damping_share, low=0.0, open_low=True)
    options.check_range("decay", decay, low=0.0, high=1.0)
    options.check_count("interval", interval, low=1)
    options.check_count("max_size", max_size, low=1)
    if cases is not None:
        options.check_count("cases", cases, low=1)
    options.check_choice("data", data, ("batch", "eval_batch"))
    rule = _kronecker.Rule(damping_share, decay, interval, max_size, cases)
    build = _remembered.with_memory(rule.build)
    init = rule.init if rule.averages or interval > 1 else None
    return PreconditionerRule(build, data=data, init=init)


def nystrom(
    *, rank: int = 50, interval: int = 1, data: str = "batch"
) -> PreconditionerRule:
    """Precondition by a random sketch of the largest eigenvalues of G.

        P⁻¹ = μ U (Λ + λI)⁻¹ Uᵀ + (I − U Uᵀ),      μ = λ + Λᵣ
        U Λ Uᵀ = GΩ (ΩᵀGΩ)⁻¹ (GΩ)ᵀ ⪯ G

    Ω has r = `rank` orthonormal random columns, and Λᵣ is the smallest eigenvalue in Λ.
    If G has at most r large eigenvalues, P⁻¹(G + λD) has none. Let d = Σᵢ λᵢ/(λᵢ + λ)
    over the eigenvalues λᵢ of G, about the number of those above λ;
    `hfjax.spectrum.density` estimates it. For r = 2 ⌈1.5 d⌉ + 1 the condition number is
    below 28 in expectation (Frangella et al. 2023, theorem 1.1). A smaller r helps
    less, yet each column costs a product.

    G is the Gauss-Newton matrix of the batch, with structural damping. Weight decay is
    added to λ instead, because a multiple of the identity has no low-rank
    approximation. If D ≠ I, the parameters are scaled by √diag(D) and G is sketched in
    that scale. Eigenvalues within the rounding of the products, 2e-6 of the largest in
    float32, count as 0, and μ − λ is at least 1e-5 of the largest. So P is positive
    definite even if λ = 0, and P = I if G = 0.

    A build costs `rank` products and, in addition, 16 rank² multiplications and
    additions for each parameter. It holds 5 `rank` vectors like the parameters, and `rank`
    times what a product holds. A product P⁻¹r reads U twice.

    Args:
      rank: r, the number of columns; capped at the number of parameters.
      interval: number of updates from one sketch to the next; those in between reuse
        its U and Λ with their own λ.
      data: as in `diagonal`.

    Returns:
      The rule. With an `interval` above 1, the optimizer state holds `rank` + 1 vectors
      like the parameters.

    Raises:
      TypeError: if a count is not a Python integer.
      ValueError: if an option is out of range.

    Example:
      With as many columns as G has nonzero eigenvalues, P is a multiple of
      G + λI, and one iteration is enough:

      >>> import hfjax, jax, jax.numpy as jnp
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> p, batch = jnp.zeros(3), (jnp.array([[1.0, 2.0, 0.0]]), jnp.ones(1))
      >>> rule = nystrom(rank=2)
      >>> invert = rule.build(f, p, batch, jnp.float32(0.1), jax.random.key(0))
      >>> product = hfjax.curvature.ggn(f, p, batch)
      >>> r = jnp.array([1.0, 1.0, 3.0])
      >>> print((10 * invert(product(r) + 0.1 * r)).round(3))
      [1. 1. 3.]

    References:
      Frangella, Tropp & Udell (2023), "Randomized Nyström preconditioning", algorithm
      2.1 and equation 1.3.
    """
    options.check_count("rank", rank, low=1)
    options.check_count("interval", interval, low=1)
    options.check_choice("data", data, ("batch", "eval_batch"))
    rule = _nystrom.Rule(rank, interval)
    build = _remembered.with_memory(rule.build)
    init = rule.init if interval > 1 else None
    return PreconditionerRule(build, data=data, init=init)


def custom(build: Callable[..., Preconditioner]) -> PreconditionerRule:
    """Precondition by a user-supplied matrix P.

    Args:
      build: `(objective, params, batch, damping) -> (r -> P⁻¹ r)`, called once in each
        update, with the arguments of `PreconditionerRule.build`. P must be symmetric
        positive definite. If it has one more parameter, `key`, it gets a typed key that
        is new in each update.

    Returns:
      The rule.

    Raises:
      TypeError: if `build` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = custom(lambda objective, params, batch, damping: lambda r: r / damping)
      >>> print(rule.build(None, None, None, 2.0, None)(jnp.array([6.0])))
      [3.]
    """
    if not callable(build):
        msg = f"`build` must be callable, got {type(build).__name__}."
        raise TypeError(msg)

    def with_or_without_key(
        objective: Objective,
        params: Params,
        batch: Batch,
        damping: Tree,
        key: jax.Array,
    ) -> Preconditioner:
        return with_key(build, key)(objective, params, batch, damping)

    return PreconditionerRule(with_or_without_key)
