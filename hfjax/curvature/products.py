"""Curvature: an objective, parameters and a batch become a product v ↦ B v.

| function | B | positive semi-definite | cost of a product, in gradients |
|---|---|---|---|
| `ggn` | Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ / Σᵢ wᵢ | if the loss is convex in the outputs | 4/3 |
| `hessian` | ∇²f | no | 2 |
| `finite_difference_hessian` | ∇²f, approximately | no | 2 |
| `empirical_fisher` | Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ | yes | 4/3 |

J is the Jacobian of the outputs with respect to the parameters, and L″ the Hessian of
the loss with respect to the outputs. Every B also includes `weight_decay` · I, or a
diagonal matrix if layers have different ones. Train with the generalised Gauss-Newton
matrix, `ggn` (Schraudolph 2002; M&S (2012), section 6), which equals the Hessian if the
model is linear. With `structural=μ`, `ggn` and `hessian` add μ times the Gauss-Newton
matrix of the mean distance of the hidden states (M&S (2012), section 8.4), in the same
product.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hfjax._core import options, trees
from hfjax._core.arguments import takes
from hfjax._core.types import Approximate, Batch, Matvec, Number, Params, Tree
from hfjax._tracing.convolutions import for_loops
from hfjax._tracing.linearize import derivative_of_gradient
from hfjax.curvature._linear_mean import gauss_newton, linear_mean, of_an_objective
from hfjax.curvature._precision import Rounding, as_rounding
from hfjax.curvature.structural import with_structural_loss
from hfjax.objectives.cases import Cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.terms import Term

Curvature: TypeAlias = Callable[..., Matvec]
"""`(objective, params, batch) -> (v -> B v)`, called once in each update. With
structural damping, it also gets `structural=μ`."""


@of_an_objective
def ggn(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    structural: Number | None = None,
) -> Matvec:
    """Build the generalised Gauss-Newton vector product v ↦ G v.

        G = Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ / Σᵢ wᵢ + `weight_decay` · I

    The model is linearised once, here. Each product is then a forward pass of tangents
    and its transpose, about 4/3 of a gradient, and does not run the model again (unless
    the objective has microbatches, and each product linearises them anew).

    A `jax.custom_vjp` in the model has no forward derivative. The forward pass is then
    the transpose of its backward rule, at about the same cost, if that rule can be
    differentiated. The rule of `odeint` can be; that of Diffrax's default adjoint
    cannot, so use `DirectAdjoint`. The error for such a rule says what to use.

    Args:
      objective: its model, loss, weights and weight decay define G.
      params: θ, the point at which G is taken.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      structural: μ ≥ 0, on the scale of the mean loss; adds μ Jₕᵀ d″ Jₕ, the curvature
        of the objective's `hidden_loss` d.

    Returns:
      The product. It maps trees like `params` to trees like `params`, with the dtypes
      of `v`. G has the scale of the objective, a mean over examples.

    Raises:
      ValueError: if `structural` is given, but the objective has no `hidden_loss`.

    Example:
      For a linear model and ½‖z − t‖², G = XᵀX / cases:

      >>> import hfjax, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> f = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> product = ggn(f, jnp.zeros(2), (x, jnp.zeros(2)))
      >>> v = jnp.array([1.0, -1.0])
      >>> bool(jnp.allclose(product(v), x.T @ x @ v / 2))
      True

    References:
      Martens & Sutskever (2012), sections 6, 6.1 and 8.4; algorithm 5.
    """
    if structural is not None:
        objective = with_structural_loss(objective, structural)

    def product(term: Term, params: Params, cases: Cases) -> Matvec:
        # This is called once, so the loss can compute in advance what does not need v.
        def hessian(outputs: Tree) -> Matvec:
            return term.loss.hessian(outputs, cases.targets)

        return gauss_newton(
            lambda params: term.forward(params, cases), hessian, params, cases
        )

    return linear_mean(product, objective, params, batch)


@of_an_objective
def hessian(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    structural: Number | None = None,
) -> Matvec:
    """Build the Hessian-vector product v ↦ ∇²f v.

    The gradient is linearised once, here (Pearlmutter's R-operator). Each product then
    costs about as much as two gradients, and does not evaluate the gradient again. In
    general ∇²f is indefinite: conjugate gradients stop when they meet pᵀ∇²f p ≤ 0, and
    keep the current iterate.

    Args:
      objective: f.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      structural: as in `ggn`. The Hessian of the hidden states' distance is its
        Gauss-Newton matrix, because the distance has its minimum at θ.

    Returns:
      The product, as in `ggn`.

    Raises:
      ValueError: if `structural` is given, but the objective has no `hidden_loss`.

    Example:
      For f = ½(p² − 1)², ∇²f = 6p² − 2, where G = (2p)²:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: p**2 * x, hfjax.losses.squared_error())
      >>> batch, p, v = (jnp.ones(1), jnp.ones(1)), jnp.array([0.5]), jnp.ones(1)
      >>> print(hessian(f, p, batch)(v), ggn(f, p, batch)(v))
      [-0.5] [1.]

    References:
      Martens & Sutskever (2012), section 5; Pearlmutter (1994).
    """
    if structural is not None:
        objective = with_structural_loss(objective, structural)

    def product(term: Term, params: Params, cases: Cases) -> Matvec:
        # Neither divided by Σᵢ wᵢ nor with weight decay: `linear_mean` does both.
        slope = jax.grad(term.weighted_loss)
        return derivative_of_gradient(lambda params: slope(params, cases), params)

    return linear_mean(product, objective, params, batch)


@of_an_objective
def finite_difference_hessian(
    objective: Objective, params: Params, batch: Batch, *, epsilon: Number | None = None
) -> Matvec:
    """Build the Hessian-vector product from differences of gradients.

        ∇²f v ≈ (∇f(θ + h v) − ∇f(θ − h v)) / 2h,    h = `epsilon` (1 + ‖θ‖) / ‖v‖

    Use it for models with a `jax.custom_vjp` whose backward rule cannot be
    differentiated, and to check `hessian`, which is exact and as fast. The two differ
    for parameters behind a `stop_gradient`, because these still change f.

    Args:
      objective: f.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      epsilon: relative step > 0. By default ε^⅓, where ε is the rounding of the
        parameters: this balances rounding and truncation. On small networks the
        relative error of ∇²f v was then 1e-4 to 5e-3 in float32, and below 1e-8 in
        float64.

    Returns:
      The product, as in `ggn`; 0 for v = 0.

    Raises:
      ValueError: if `epsilon` is a plain number that is not positive.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: p**2 * x, hfjax.losses.squared_error())
      >>> batch, p, v = (jnp.ones(1), jnp.ones(1)), jnp.array([0.5]), jnp.ones(1)
      >>> product = finite_difference_hessian(f, p, batch)(v)
      >>> bool(jnp.allclose(product, -0.5, rtol=1e-3))
      True

    References:
      Martens & Sutskever (2012), section 5; Nocedal & Wright (2006), section 8.1.
    """
    options.check_range("epsilon", epsilon, low=0.0, open_low=True)
    dtype = trees.scalar_dtype(params)
    if epsilon is None:
        coarsest = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
        epsilon = coarsest ** (1 / 3)
    # The step grows with ‖θ‖, so that it is not lost in the rounding of θ.
    length = jnp.asarray(epsilon, dtype) * (1 + trees.norm(params))

    def gradient(step: jax.Array, v: Tree) -> Tree:
        at = trees.axpy(step, v, params)
        return trees.widen(objective.value_and_grad(at, batch)[1])

    def matvec(v: Tree) -> Tree:
        # Scale v first: for a huge v, 1 / h would overflow.
        magnitude = trees.magnitude(v)
        unit = trees.scale(1 / magnitude, trees.widen(v))
        size = trees.norm(unit)
        h = length / jnp.where(size > 0, size, 1)
        change = jax.tree.map(jnp.subtract, gradient(h, unit), gradient(-h, unit))
        product = trees.scale(magnitude, trees.scale(1 / (2 * h), change))
        # For v = 0 the two gradients at θ may differ by rounding, since XLA need not sum
        # them in the same order.
        product = jax.tree.map(lambda x: jnp.where(size == 0, 0, x), product)
        return trees.cast_like(product, v)

    return for_loops(matvec)


@of_an_objective
def empirical_fisher(objective: Objective, params: Params, batch: Batch) -> Matvec:
    """Build the product with the empirical Fisher matrix, Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ.

    This is the Gauss-Newton matrix of ½ Σᵢ wᵢ Lᵢ² / Σᵢ wᵢ, with the losses as outputs,
    so a product costs as much as one of `ggn`. The rank is at most the number of
    examples. The matrix does not approximate the curvature unless the model fits the
    data. If positions have weights, ∇Lᵢ is the gradient of the mean over the positions of
    an example, and wᵢ the sum of their weights.

    Args:
      objective: its loss is differentiated for each example; weight decay is added.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      The product, as in `ggn`.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch = (jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [-1.0]]))
      >>> product = empirical_fisher(f, jnp.zeros(1), batch)
      >>> print(product(jnp.ones(1)))  # mean of (−1)² and 2²
      [2.5]

    References:
      Martens & Sutskever (2012), section 11.3.
    """

    def product(term: Term, params: Params, cases: Cases) -> Matvec:
        term.need_examples("`curvature.empirical_fisher`", "`curvature.ggn`")

        def losses(params: Params) -> jax.Array:
            return term.losses_of(params, cases)

        # The Hessian of ½ L² with respect to L is 1.
        return gauss_newton(losses, lambda values: lambda v: v, params, cases)

    return linear_mean(product, objective, params, batch)


def with_precision(
    precision: str | DTypeLike,
    *,
    of: Curvature = ggn,
    exact: str | DTypeLike | None = None,
) -> Curvature:
    """Compute curvature-vector products, and nothing else, in lower precision.

    The gradient, f, the preconditioner and the vectors of conjugate gradients are
    computed as before. This is for devices that multiply several times as fast in lower
    precision. Conjugate gradients then need more iterations for the same decrease of
    the model M (`docs/solvers.md`).

    Args:
      precision: `"bfloat16"` (on any device) or `"float32"` (for float64 parameters)
        run the model in this dtype, with parameters, inputs and v cast to it. Any other
        value says how float32 is multiplied, as in `jax.default_matmul_precision`:
        `"tensorfloat32"`, `"highest"`, `"BF16_BF16_F32"`, … A GPU or TPU follows this,
        a CPU does not. By default, a GPU that has TF32 uses it, and a TPU uses
        bfloat16; there `"float32"` makes products exact (see `jax.lax.Precision`).
      of: the curvature to compute. The result takes `structural=μ` if `of` does.
      exact: the precision of the accurate product, which
        `hfjax.cg.conjugate_gradient(replace_every=…)` uses to recompute the residual.
        `None` is the precision of `of` itself.

    Returns:
      The curvature; its products are `Approximate`. If the model sets the dtype of a
      layer, or the precision of a product, that is unchanged.

    Raises:
      ValueError: if a precision is not one of these.

    Example:
      bfloat16 has 8 significant bits:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: x * p, hfjax.losses.squared_error())
      >>> batch, p, v = (jnp.full((1, 1), 1.001),) * 2, jnp.zeros(1), jnp.ones(1)
      >>> product = with_precision("bfloat16")(f, p, batch)
      >>> print(product(v), product.exact(v))
      [1.] [1.002001]

    References:
      Micikevicius et al. (2018), "Mixed precision training".
    """
    fewer, all_of_them = as_rounding(precision), as_rounding(exact)

    def build(
        objective: Objective, params: Params, batch: Batch, **options: Any
    ) -> Approximate:
        def product(rounding: Rounding) -> Matvec:
            return rounding.product(of, objective, params, batch, **options)

        # The exact product is linearised in each call. So it costs nothing unless it is
        # called, and its linearisation does not take memory for the whole run.
        return Approximate(product(fewer), lambda v: product(all_of_them)(v))

    def without_options(
        objective: Objective, params: Params, batch: Batch
    ) -> Approximate:
        return build(objective, params, batch)

    # An update looks at the signature to see whether a curvature supports structural
    # damping, so this one must have the option exactly if `of` has it.
    return of_an_objective(build if takes(of, "structural") else without_options)
