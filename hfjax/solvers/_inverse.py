"""The product with an inverse matrix, by conjugate gradients; it has derivatives."""

import jax
import jax.numpy as jnp

from hfjax._core import options, trees
from hfjax._core.arguments import as_product, as_vector
from hfjax._core.types import Matvec, Number, Preconditioner, Tree, exact_of
from hfjax._tracing import compiled
from hfjax.solvers.iterates import every
from hfjax.solvers.pcg import as_preconditioner, run
from hfjax.solvers.stopping import residual


def inverse(
    matvec: Matvec,
    /,
    *,
    damping: Number = 0.0,
    preconditioner: Preconditioner | None = None,
    tolerance: Number = 1e-5,
    max_iterations: int = 250,
) -> Matvec:
    """Return v ↦ x with (A + λI) x = v, by conjugate gradients.

    What influence functions and the Laplace approximation ask for. Where a run ends by
    `max_iterations`, or A + λI turns out not to be positive, x is the last iterate: ask
    `solve` for the reason.

    It has derivatives of any order, in forward and reverse mode, by v, λ and all that
    `matvec` closes over: (A + λI) dx = dv − (dA + dλ I) x is solved as x is, to the same
    `tolerance`. The preconditioner counts for nothing there.

    Args:
      matvec: `v -> A v`, symmetric positive semi-definite.
      damping: λ.
      preconditioner: `r -> P⁻¹ r`; `None` is the identity.
      tolerance: ‖(A + λI) x − v‖ ≤ `tolerance` · ‖v‖ (1e-5, that of
        `jax.scipy.sparse.linalg.cg`).
      max_iterations: a Python integer (250: as `solve`).

    Returns:
      The product with the inverse, on trees as `matvec` takes. Integers are taken for
      floats.

    Raises:
      TypeError: if `max_iterations` is no Python integer, or `matvec` or
        `preconditioner` no function.
      ValueError: if an option is out of range.

    Example:
      An influence function: how the parameters move as the first case counts more,
      −(H + λI)⁻¹ ∇L₀ / n, beside the derivative of the fit itself.

      >>> import hfjax
      >>> x, t = jnp.array([[1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]), jnp.arange(3.0)
      >>> def fit(weights):
      ...     h = x.T @ (weights[:, None] * x) / 3 + 0.5 * jnp.eye(2)
      ...     return jnp.linalg.solve(h, x.T @ (weights * t) / 3)
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> theta = fit(jnp.ones(3))
      >>> product = hfjax.curvature.ggn(objective, theta, (x, t))
      >>> gradient = (x[0] @ theta - t[0]) * x[0]
      >>> moved = inverse(product, damping=0.5)(-gradient / 3)
      >>> truth = jax.jacobian(fit)(jnp.ones(3))[:, 0]
      >>> print(jnp.allclose(moved, truth, rtol=1e-4))
      True

    References:
      Koh & Liang (2017), "Understanding black-box predictions via influence functions".
    """
    options.check_range("damping", damping, low=0.0)
    options.check_count("max_iterations", max_iterations, low=0)
    rule, keep = residual(tolerance), every(max(1, max_iterations))
    damping = jnp.asarray(damping)  # So that another λ is no other program.
    matvec = as_product("matvec", matvec)
    preconditioner = as_preconditioner(preconditioner)

    def damped(matvec: Matvec) -> Matvec:
        def product(v: Tree) -> Tree:
            total = trees.axpy(damping, v, matvec(v))
            return trees.cast_like(total, v)

        return product

    def run_on(matvec: Matvec, b: Tree) -> Tree:
        del matvec  # Of which derivatives are taken; nearly the same.
        return run(
            nearly,
            b,
            None,
            preconditioner,
            keep.build(max_iterations, None),
            max_iterations=max_iterations,
            limit=max_iterations,
            min_iterations=1,
            stopping=rule,
        ).x

    nearly, exactly = damped(matvec), damped(exact_of(matvec))

    def product(v: Tree) -> Tree:
        def solved(v: Tree) -> Tree:
            return jax.lax.custom_linear_solve(exactly, v, run_on, symmetric=True)

        return compiled.run(solved, as_vector("v", v))

    return product
