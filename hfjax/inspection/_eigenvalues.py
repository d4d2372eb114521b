"""Eigenvalues by the Lanczos method or from a run of CG, for `hfjax.spectrum`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from hfjax._core import options, trees
from hfjax._core.arguments import as_key, as_product, as_vector, describe
from hfjax._core.types import Matvec, Tree
from hfjax._tracing import compiled, linalg
from hfjax.solvers.krylov import basis


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs (θ, v) of a symmetric matrix A.

    Attributes:
      values: θ, shape `[num]`, in the requested order.
      vectors: v, of norm 1: a tree whose leaves have a leading axis of size `num`.
      residuals: ‖A v − θ v‖, shape `[num]`; A has an eigenvalue within this distance of
        θ.
    """

    values: jax.Array
    vectors: Tree
    residuals: jax.Array


def eigenvalues(
    matvec: Matvec,
    like: Tree,
    /,
    *,
    key: jax.Array,
    num: int = 1,
    which: str = "largest",
    num_iterations: int | None = None,
) -> Eigenpairs:
    """Find a few eigenvalues at one end of the spectrum by the Lanczos method.

    These are Rayleigh-Ritz approximations from a Krylov space of dimension K with a
    random start and full orthogonalisation. Well-separated extreme eigenvalues converge
    first; check `residuals`. All copies of a multiple eigenvalue are found only if the
    Krylov space is exhausted: it is then extended by another random vector. `values` have
    first derivatives, ∂θ = vᵀ(∂A)v; the derivatives of `vectors` and `residuals` are NaN.

    Args:
      matvec: `v -> A v` for a symmetric A.
      like: a tree with the shapes and dtypes that `matvec` takes, such as the parameters.
      key: a random key, for the start.
      num: number of eigenvalues, a Python integer.
      which: `"largest"`, `"smallest"` (most negative first) or `"magnitude"`.
      num_iterations: K, limited to the number of parameters; `None` is 2 `num` + 20.

    Returns:
      The eigenpairs, in the dtype of `like` or float32, whichever is wider.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `num` > K, `which` is unknown, or a product is unlike `like`.

    Example:
      >>> d = jnp.array([1.0, 5.0, 3.0, 5.0])
      >>> found = eigenvalues(lambda v: d * v, d, key=jax.random.key(0), num=3)
      >>> print(found.values.round(4))
      [5. 5. 3.]

    References:
      Parlett (1998), chapter 13; Lehoucq, Sorensen & Yang (1998), ARPACK.
    """
    options.check_count("num", num, low=1)
    options.check_choice("which", which, ("largest", "smallest", "magnitude"))
    like, key = as_space(like), as_key("key", key)
    product, size = on_wide(matvec, like), optax.tree.size(like)
    # About the size of ARPACK's default subspace, but without its restarts.
    dimension = 2 * num + 20 if num_iterations is None else num_iterations
    options.check_count("num_iterations", dimension, low=1)
    dimension = min(dimension, size)
    if num > dimension:
        msg = (
            f"`num` must be at most `num_iterations` and the number of parameters, "
            f"{dimension} here, got {num}."
        )
        raise ValueError(msg)

    return compiled.run(
        lambda like, key: _eigenpairs(product, like, key, num, which, dimension),
        like,
        key,
    )


def _eigenpairs(
    product: Matvec, like: Tree, key: jax.Array, num: int, which: str, dimension: int
) -> Eigenpairs:
    """Find the eigenpairs in a Krylov space of the given dimension."""
    first, later = jax.random.split(key)
    # Derivatives do not go through the recurrence: see `_with_derivative_of`.
    built = basis(
        lambda v: jax.lax.stop_gradient(product(v)),
        _random(first, like),
        dimension,
        fill=lambda k: _random(jax.random.fold_in(later, k), like),
    )
    values, weights = linalg.eigh(built.matrix)
    order = {"largest": -values, "smallest": values, "magnitude": -jnp.abs(values)}
    chosen = jnp.argsort(order[which])[:num]
    values, weights = values[chosen], weights[:, chosen]
    vectors = trees.combination(weights.T, built.vectors)

    # This costs one more product per pair: residuals are measured, not inferred from the
    # recurrence, and the quotients carry the derivatives.
    def looked_at(pair: tuple[jax.Array, Tree]) -> tuple[jax.Array, jax.Array]:
        value, v = pair
        after = product(v)
        rest = trees.axpy(-value, v, jax.lax.stop_gradient(after))
        return trees.dot(v, after), trees.norm(rest)

    quotients, residuals = jax.lax.map(looked_at, (values, vectors))
    return Eigenpairs(
        values=_with_derivative_of(quotients, values),
        vectors=jax.tree.map(lambda v: _with_nan_derivative(quotients, v), vectors),
        residuals=_with_nan_derivative(quotients, residuals),
    )


@jax.custom_jvp
def _with_derivative_of(quotients: jax.Array, values: jax.Array) -> jax.Array:
    """Return `values`, with the derivatives of the Rayleigh quotients vᵀA v."""
    # For an eigenvector, dθ = vᵀ(dA)v: at first order, the change of v does not matter.
    del quotients
    return values


@_with_derivative_of.defjvp
def _derivative_of_quotients(primals: tuple, tangents: tuple) -> tuple:
    quotients, values = primals
    # Second derivatives depend on the change of v, which is not tracked: make them NaN.
    once = _with_nan_derivative(quotients, jnp.ones_like(values))
    return values, once * tangents[0].astype(values.dtype)


@jax.custom_jvp
def _with_nan_derivative(quotients: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x`, with NaN as its derivative if A depends on the variable."""
    # A derivative of 0 would be wrong without notice.
    del quotients
    return x


@_with_nan_derivative.defjvp
def _nan_derivative(primals: tuple, tangents: tuple) -> tuple:
    x = primals[1]
    return x, jnp.full_like(x, jnp.nan) * jnp.sum(tangents[0]).astype(x.dtype)


def ritz_values(coefficients: ArrayLike, *, tolerance: float = 1e-3) -> np.ndarray:
    """Compute approximate eigenvalues of P⁻¹A from a run of conjugate gradients.

    The coefficients αⱼ and βⱼ of a run define the tridiagonal Lanczos matrix, with
    1/αⱼ + βⱼ₋₁/αⱼ₋₁ on its diagonal and √βⱼ/αⱼ next to it. Its eigenvalues, the Ritz
    values, lie within the spectrum of P⁻¹A and approach its ends. A includes the
    damping: if D and P are identities, the eigenvalues of B are smaller by λ. A
    multiple eigenvalue appears once.

    Args:
      coefficients: shape `[max_iterations, 2]`, from a `CGResult` or from `state.record`.
      tolerance: relative difference below which values are merged.

    Returns:
      The Ritz values in descending order, float64; empty if there was no iteration.

    Raises:
      TypeError: if called inside of `jit` or another transformation.
      ValueError: if `coefficients` do not have shape `[max_iterations, 2]`.

    Example:
      >>> import hfjax
      >>> d = jnp.array([1.0, 2.0, 4.0])
      >>> run = hfjax.cg.solve(lambda v: d * v, jnp.ones(3), stopping=None)
      >>> print(ritz_values(run.coefficients).round(4))
      [4. 2. 1.]

    References:
      Golub & Van Loan (2013), section 11.3.
    """
    if isinstance(coefficients, Tracer):
        msg = "`coefficients` are traced: call `ritz_values` outside of `jax.jit`."
        raise TypeError(msg)
    if np.ndim(coefficients) != 2 or np.shape(coefficients)[1] != 2:
        msg = (
            "`coefficients` must be those of a run, of shape [max_iterations, 2], got "
            f"{describe(coefficients)}."
        )
        raise ValueError(msg)
    alpha, beta = np.asarray(coefficients, np.float64).T
    # Entries after the last iteration are 0.
    length = int(np.argmin(np.append(alpha, 0) > 0))
    alpha, beta = alpha[:length], beta[:length]
    diagonal = 1 / alpha
    diagonal[1:] += beta[:-1] / alpha[:-1]
    beside = np.sqrt(beta[:-1]) / alpha[:-1]
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    # Rounding makes copies of eigenvalues that have converged: merge them.
    values = np.linalg.eigvalsh(matrix)[::-1]
    gaps = np.append(np.inf, values[:-1] - values[1:])
    return values[gaps > tolerance * np.abs(values)]


def as_space(like: Tree) -> Tree:
    """Return arrays of the shapes and dtypes of `like`."""

    def leaf(x: Any) -> Any:
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    arrays = as_vector("like", jax.tree.map(leaf, like))
    if optax.tree.size(arrays) == 0:
        msg = f"`like` holds no numbers, and a matrix of none no eigenvalues: {like!r}."
        raise ValueError(msg)
    return arrays


def on_wide(matvec: Matvec, like: Tree) -> Matvec:
    """Return `matvec` for float32 or wider vectors, by casts to the dtypes of `like`."""
    checked = as_product("matvec", matvec)
    return lambda v: trees.cast_like(checked(trees.cast_like(v, like)), v)


def _random(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, trees.widen(like), jax.random.normal)
