"""Curvature: an objective, parameters and a batch become a product v ↦ B v.

| function | B | positive semi-definite | of a product, in gradients |
|---|---|---|---|
| `ggn` | Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ / Σᵢ wᵢ | where the loss is convex in the outputs | 4/3 |
| `hessian` | ∇²f | no | 2 |
| `finite_difference_hessian` | ∇²f, nearly | no | 2 |
| `empirical_fisher` | Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ | yes | 4/3 |

with `J` the Jacobian of the model in the parameters, `L″` the Hessian of the loss in
the outputs; each plus `weight_decay` · I. The generalised Gauss-Newton matrix (report,
section 6; Schraudolph 2002) is the one to train with, and equals the Hessian where the
model is linear. `ggn` and `hessian` take `structural=μ`, which adds μ times the
Gauss-Newton matrix of the hidden states' mean distance (section 8.4) within their product.
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
"""`(objective, params, batch) -> (v -> B v)`; called once per update. With structural
damping it is given `structural=μ` too."""


@of_an_objective
def ggn(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    structural: Number | None = None,
) -> Matvec:
    """Build the generalised Gauss-Newton product v ↦ G v.

    The model is linearised here, once; a product is one forward tangent pass and
    its transpose, about 4/3 of a gradient, and runs the model no more (unless the
    objective's microbatches are linearised anew in each product). A `jax.custom_vjp` in
    the model has no forward derivative. The forward pass is then the transpose of its
    backward rule, at about the same price, where that rule can be differentiated (that
    of `odeint` can, that of Diffrax's default adjoint cannot: take `DirectAdjoint`).
    Where it cannot, a note in the error says what to use.

    Args:
      objective: whose model, loss, weights and weight decay define G.
      params: θ, where G is taken.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      structural: μ ≥ 0, adds μ Jₕᵀ d″ Jₕ of the objective's `hidden_loss`.

    Returns:
      The product: trees like `params` to trees like `params`, in the dtype of `v`.
      G has the scale of the objective, a mean over cases.

    Raises:
      ValueError: if `structural` is given, and the objective has no `hidden_loss`.

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
    objective = (
        objective if structural is None else with_structural_loss(objective, structural)
    )

    def product(term: Term, params: Params, cases: Cases) -> Matvec:
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
    """Build the Hessian product v ↦ ∇²f v.

    The gradient is linearised here, once (Pearlmutter's R-operator); a product then
    costs about two gradients, and evaluates none. ∇²f is indefinite in general: where
    conjugate gradients meet pᵀ∇²f p ≤ 0 they stop, and keep the iterate they have.

    Args:
      objective: f.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      structural: as in `ggn`; the Hessian of the distance of hidden states is its
        Gauss-Newton matrix, as it is least at θ.

    Returns:
      The product, as `ggn`.

    Raises:
      ValueError: if `structural` is given, and the objective has no `hidden_loss`.

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
    objective = (
        objective if structural is None else with_structural_loss(objective, structural)
    )

    def product(term: Term, params: Params, cases: Cases) -> Matvec:
        def gradient(params: Params) -> Params:
            return term.means.accumulate(
                lambda part: jax.grad(term.weighted_loss)(params, part),
                term.means.parts(cases),
            )

        return derivative_of_gradient(gradient, params)

    return linear_mean(product, objective, params, batch)


@of_an_objective
def finite_difference_hessian(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    epsilon: Number | None = None,
) -> Matvec:
    """Build the Hessian product by differences of gradients.

        ∇²f v ≈ (∇f(θ + h v) − ∇f(θ − h v)) / 2h

    with h = `epsilon` (1 + ‖θ‖) / ‖v‖: the step is scaled to v, and large enough to
    be seen beside θ. For models with a `jax.custom_vjp` whose backward rule cannot be
    differentiated, and to check `hessian`, which is exact and as fast. Parameters behind
    a `stop_gradient` still move f: there the two differ.

    Args:
      objective: f.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      epsilon: relative step > 0. By default ε^⅓, ε the rounding of the parameters: what
        balances rounding and truncation (Nocedal & Wright 2006, section 8.1). On small
        networks the error relative to ∇²f v was 1e-4 to 5e-3 in float32, below 1e-8 in
        float64.

    Returns:
      The product, as `ggn`; 0 for v = 0.

    Raises:
      ValueError: if `epsilon` is a plain number and not above 0.

    Example:
      >>> import hfjax
      >>> f = hfjax.Objective(lambda p, x: p**2 * x, hfjax.losses.squared_error())
      >>> batch, p, v = (jnp.ones(1), jnp.ones(1)), jnp.array([0.5]), jnp.ones(1)
      >>> product = finite_difference_hessian(f, p, batch)(v)
      >>> bool(jnp.allclose(product, -0.5, rtol=1e-3))
      True

    References:
      Martens & Sutskever (2012), section 5.
    """
    options.check_range("epsilon", epsilon, low=0.0, open_low=True)
    dtype = trees.scalar_dtype(params)
    if epsilon is None:
        coarsest = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params))
        epsilon = coarsest ** (1 / 3)
    length = jnp.asarray(epsilon, dtype) * (1 + trees.norm(params))

    def gradient(step: jax.Array, v: Tree) -> Tree:
        at = trees.axpy(step, v, params)
        return trees.widen(objective.value_and_grad(at, batch)[1])

    def matvec(v: Tree) -> Tree:
        magnitude = trees.magnitude(v)  # 1 / h of a huge v is none.
        unit = trees.scale(1 / magnitude, trees.widen(v))
        size = trees.norm(unit)
        h = length / jnp.where(size > 0, size, 1)
        change = jax.tree.map(jnp.subtract, gradient(h, unit), gradient(-h, unit))
        product = trees.scale(magnitude, trees.scale(1 / (2 * h), change))
        # Of v = 0 it is the rounding of two gradients at θ, where XLA sums them apart.
        product = jax.tree.map(lambda x: jnp.where(size == 0, 0, x), product)
        return trees.cast_like(product, v)

    return for_loops(matvec)


@of_an_objective
def empirical_fisher(objective: Objective, params: Params, batch: Batch) -> Matvec:
    """Build the product with the empirical Fisher matrix, Σᵢ wᵢ ∇Lᵢ ∇Lᵢᵀ / Σᵢ wᵢ.

    It is the Gauss-Newton matrix of ½ Σᵢ wᵢ Lᵢ², with the losses as outputs: a product
    costs what one of `ggn` does. Of rank at most the number of cases, and no
    approximation of curvature away from a fit (report, section 11.3: for its diagonal).

    Args:
      objective: whose loss is differentiated case by case.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.

    Returns:
      The product, as `ggn`.

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
        return gauss_newton(
            lambda params: term.losses_of(params, cases),
            lambda values: lambda v: v,
            params,
            cases,
        )

    return linear_mean(product, objective, params, batch)


def with_precision(
    precision: str | DTypeLike,
    *,
    of: Curvature = ggn,
    exact: str | DTypeLike | None = None,
) -> Curvature:
    """Compute products in fewer digits, and nothing else.

    The gradient, f, the preconditioner and the vectors of conjugate gradients stay what
    they are. For devices that multiply so several times as fast: the same M takes more
    iterations, twice as many in bfloat16 where it was measured (`docs/choosing.md`).

    Args:
      precision: either a dtype that the model is run in, for the products alone, with
        parameters, inputs and v cast to it: `"bfloat16"`, on every device; or
        `"float32"`, for parameters in float64. Or how float32 is multiplied,
        what `jax.default_matmul_precision` takes: `"tensorfloat32"`, `"highest"`,
        `"BF16_BF16_F32"`, …; a GPU or TPU heeds it, a CPU does not. Where nothing is
        said a GPU that has TF32 uses it, and a TPU bfloat16; `"float32"` makes products
        exact there (`jax.lax.Precision`).
      of: of which curvature; it takes `structural=μ` if that one does.
      exact: the precision of the product that it stands for, to which
        `hfjax.cg.conjugate_gradient(replace_every=…)` holds it; `None` is that of `of`.

    Returns:
      The curvature; its products are `Approximate`. A model that names the dtype of a
      layer, or the precision of a product, keeps it.

    Raises:
      ValueError: if a precision is nothing of the kind.

    Example:
      bfloat16 has 8 bits:

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

        # The exact one is linearised where it is called: what it keeps is never in memory
        # beside what the other keeps for the whole run, and uncalled it costs nothing.
        return Approximate(product(fewer), lambda v: product(all_of_them)(v))

    def without_options(
        objective: Objective, params: Params, batch: Batch
    ) -> Approximate:
        return build(objective, params, batch)

    # Structural damping is refused by what a curvature takes, and this takes what `of` does.
    return of_an_objective(build if takes(of, "structural") else without_options)
