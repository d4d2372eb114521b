"""Preconditioners: positive definite P ≈ A whose inverse is cheap.

| function | P | to build, in gradients |
|---|---|---|
| `diagonal` | (d + λ diag(D) + κ s)^ξ, d of a curvature matrix (report, section 11.2) | 1 |
| `kronecker` | a product of two matrices for each layer | 1 to 2, and inverses |
| `nystrom` | G's largest eigenvalues, by a random sketch, and one for the rest | 4/3 `rank` |
| `custom` | the caller's | |

Damping is inside of each: P stands for the damped matrix, which is what conjugate
gradients work on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.arguments import check_function, with_key
from hfjax._core.types import Batch, Number, Params, Preconditioner, Tree
from hfjax.curvature import diagonals
from hfjax.objectives.objective import Objective
from hfjax.preconditioners import _kronecker, _nystrom, _remembered
from hfjax.preconditioners._layer_report import layers as layers


class PreconditionerRule(NamedTuple):
    """How each update makes its preconditioner.

    Attributes:
      build: `(objective, params, batch, damping, key) -> (r -> P⁻¹ r)`, with
        `damping` the diagonal of λD: the scalar λ where D = I, else a tree like the
        parameters, or 0 where D = B, as P's scale does not matter. With structural
        damping `objective` has its distance in its loss. The typed key is new in each
        update: of `hessian_free`'s seed and the number of the update alone.
      data: that `build` is given as its batch: the update's `"batch"`, as the
        curvature, or its `"eval_batch"`.
      init: `params -> memory`, of a rule that hands something to the next update; its
        `build` then takes `memory` and `count`, updates so far, too, and returns
        `(r -> P⁻¹ r, memory)`. `None` of one that does not.
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
    """Precondition by P = (d + λ diag(D) + κ s)^ξ, a diagonal matrix.

    Args:
      estimate: `(objective, params, batch) -> d`, a function of `hfjax.diagonals` or
        the caller's; weight decay counts in d. One that takes a `key` is given a new
        one in each update: `functools.partial(diagonals.ggn_rademacher,
        num_probes=4)`. (The Fisher's: Martens 2010, 4.7.)
      exponent: ξ in [0, 1]; 0.75 (Martens 2010, section 4.7), 1 is the diagonal
        itself, 0 the identity.
      kappa: κ ≥ 0, where λ is weak or absent (report, section 11.2; 0 in Martens'
        program).
      scale: s, a tree like the parameters of the coarse relative scale of their
        curvature; `None` is 1 everywhere.
      data: that d is estimated on: `"batch"`, the curvature data (report, section
        11.2: P is to stand for A), or `"eval_batch"` (Martens' program: all training
        data).

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
        powers = trees.interpolate(
            _plus(entries, damping), exponent=exponent, kappa=kappa, scale=scale
        )
        # Where nothing is known of a parameter's curvature (all zero), leave it be.
        powers = jax.tree.map(lambda p: jnp.where(p > 0, p, 1), powers)
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

    Ā is the mean of x xᵀ over cases and positions, with x a layer's input (and 1 for a
    bias); Ḡ that of g gᵀ, summed over positions, with g what comes back to the layer of
    the outputs' random combinations Sᵢvᵢ; a and g their mean eigenvalues; d the same
    estimate of diag(G) as `diagonals.ggn_rademacher`. Weight decay counts with λ. Without
    damping P equals G if x and g are independent, and different layers are; conjugate
    gradients make up for the rest.

    No layer is registered: the program of `model_fn` is traced, and `layers` tells what
    counts as one, and what was found in a model.

    A build costs a pass forward and a pass back; the products x xᵀ and g gᵀ, of
    cases · positions · (inputs² + units²) multiplications a layer; and two inverses, of
    inputs³ + units³. It holds the inputs of all layers, of a convolution its patches;
    microbatches bound them. P⁻¹r takes inputs · units · (inputs + units).

    Args:
      damping_share: s, the part of λ that damps the factors. Less than 1, as their
        product counts what damps one factor times the other, too (0.1: measured,
        `benchmarks/results/step6.md`; heuristic).
      decay: ε of the factors' running average over builds, min(ε, 1 − 1/k) of the k-th
        (Martens & Grosse 2015, section 5: 0.95, for small batches). 0 takes each
        batch's own, and saves the memory.
      interval: updates from one build to the next; those between use its inverses.
      max_size: longest side of a kernel that has factors (8192: 256 MiB in float32;
        heuristic).
      cases: how many of the batch (of each device's, under `axis_name`) the factors are
        estimated on at least: every k-th, with the largest k for which they are so
        many; `None` is all (2,000: a quarter of 2,000 did nearly as well,
        `benchmarks/results/step6.md`; heuristic).
      data: as in `diagonal`.

    Returns:
      The rule. With a `decay`, or an `interval` above 1, the state has room for two
      matrices of each parameter that may be a kernel, `(inputs + 1)²` and `(units +
      1)²`, and a diagonal; twice that for both.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      Of a linear model with white inputs, P is G, and one iteration is enough:

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
      approximate curvature", sections 3, 5 and 6.3; Grosse & Martens (2016), of
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
    remembers = rule.averages or interval > 1
    return PreconditionerRule(build, data=data, init=rule.init if remembers else None)


def nystrom(
    *,
    rank: int = 50,
    interval: int = 1,
    data: str = "batch",
) -> PreconditionerRule:
    """Precondition by a random sketch of G: its largest eigenvalues, and one for the rest.

        P⁻¹ = μ U (Λ + λI)⁻¹ Uᵀ + (I − U Uᵀ),      μ = λ + Λᵣ
        U Λ Uᵀ = GΩ (ΩᵀGΩ)⁻¹ (GΩ)ᵀ,    G ⪰ U Λ Uᵀ

    with r = `rank` orthonormal random columns Ω. P⁻¹(G + λD) has no large eigenvalues
    left where G has no more than r of them. With d = Σᵢ λᵢ/(λᵢ + λ) over G's eigenvalues,
    about the number of those above λ, and r = 2 ⌈1.5 d⌉ + 1, the condition number is below
    28 in expectation (Frangella et al. 2023, theorem 1.1); `hfjax.spectrum.density` gives
    d. With a smaller r it helps less, and costs `rank` products all the same.

    G is the Gauss-Newton matrix of the batch, with structural damping, without weight
    decay: that counts with λ, as only what decays has an approximation of low rank. Where
    D ≠ I the parameters are scaled by √diag(D), and G is sketched in that scale.
    Eigenvalues within the rounding of the products, 2e-6 of the largest in float32, count
    as 0, and μ − λ is at least 1e-5 of that: P is positive for λ = 0, and I for G = 0.

    A build costs `rank` products, and 16 rank² multiplications and additions for each
    parameter: on one CPU core, 840,000 parameters and a rank of 50, as long as 20 products
    of 2,000 cases, or 160 of 200. It holds 5 `rank` vectors like the parameters, and
    `rank` times what a product does. P⁻¹r reads U twice.

    Args:
      rank: r, columns (50: heuristic); no more are taken than there are parameters.
      interval: updates from one sketch to the next; those between have its U and Λ, and
        their own λ.
      data: as in `diagonal`.

    Returns:
      The rule. With an `interval` above 1 the state has room for `rank` + 1 vectors.

    Raises:
      TypeError: if a count is no Python integer.
      ValueError: if an option is out of range.

    Example:
      With as many columns as G has eigenvalues P is G + λI, and one iteration is enough:

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
    return PreconditionerRule(
        build, data=data, init=rule.init if interval > 1 else None
    )


def custom(build: Callable[..., Preconditioner]) -> PreconditionerRule:
    """Precondition by the caller's own P.

    Args:
      build: `(objective, params, batch, damping) -> (r -> P⁻¹ r)`, called once in
        each update, with arguments as in `PreconditionerRule`; P must be symmetric
        positive definite. If it has one more parameter, `key`, it is given a typed key
        that is new in each update.

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


def _plus(entries: Tree, damping: Tree) -> Tree:
    """Add a scalar, or a tree like `entries`, in the dtypes of `entries`.

    An entry of infinity counts as the largest float: squares of gradients overflow
    before these do.
    """

    def leaf(d: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.minimum(d, jnp.finfo(d.dtype).max) + x.astype(d.dtype)

    if getattr(damping, "ndim", None) == 0:
        return jax.tree.map(lambda d: leaf(d, damping), entries)
    return jax.tree.map(leaf, entries, damping)
