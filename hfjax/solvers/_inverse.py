"""Products with an inverse matrix, by conjugate gradients; they can be differentiated."""

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
    """Return v ↦ x with (A + λI) x = v, solved by conjugate gradients.

    Influence functions and the Laplace approximation need such products. If a run reaches
    `max_iterations`, or A + λI turns out not to be positive definite, x is the last
    iterate; only `solve` returns the reason.

    The result has derivatives of any order, in forward and reverse mode, with respect to
    v, λ and everything that `matvec` closes over: (A + λI) dx = dv − (dA + dλ I) x is
    solved in the same way, to the same `tolerance`. The preconditioner is not
    differentiated.

    Args:
      matvec: `v -> A v`, symmetric positive semi-definite.
      damping: λ ≥ 0.
      preconditioner: `r -> P⁻¹ r`; `None` is the identity.
      tolerance: stop once ‖(A + λI) x − v‖ ≤ `tolerance` · ‖v‖.
      max_iterations: a Python integer.

    Returns:
      The product with the inverse, on trees like those of `matvec`. Integers are
      converted to floats.

    Raises:
      TypeError: if `max_iterations` is not a Python integer, or `matvec` or
        `preconditioner` is not a function.
      ValueError: if an option is out of range.

    Example:
      An influence function: how the parameters change if the first example counts more,
      −(H + λI)⁻¹ ∇L₀ / n, compared with the derivative of the fit itself.

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
    # As an array, so that another λ does not compile another program.
    damping = jnp.asarray(damping)
    matvec = as_product("matvec", matvec)
    preconditioner = as_preconditioner(preconditioner)

    def damped(matvec: Matvec) -> Matvec:
        return lambda v: trees.cast_like(trees.axpy(damping, v, matvec(v)), v)

    # Solve with the faster product, if `matvec` is an `Approximate`. JAX forms the
    # derivatives with the exact one, which it passes here.
    def run_on(_: Matvec, b: Tree) -> Tree:
        return run(
            nearly,
            b,
            preconditioner,
            keep,
            max_iterations=max_iterations,
            stopping=rule,
        ).x

    nearly, exactly = damped(matvec), damped(exact_of(matvec))

    def product(v: Tree) -> Tree:
        def solved(v: Tree) -> Tree:
            return jax.lax.custom_linear_solve(exactly, v, run_on, symmetric=True)

        return compiled.run(solved, as_vector("v", v))

    return product
