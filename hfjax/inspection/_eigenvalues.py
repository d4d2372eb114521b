"""A few eigenvalues of a matrix: by Lanczos' method, or read off a run.

Of `hfjax.spectrum`.
"""

from typing import NamedTuple

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
    """A few eigenvalues.

    Attributes:
      values: θ, shape `[num]`, in the order asked for.
      vectors: of length 1, a tree with a leading axis of `num`.
      residuals: ‖A v − θ v‖, shape `[num]`: within that of θ lies an eigenvalue.
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
    """Find a few eigenvalues at an end of the spectrum, by Lanczos' method.

    θ and v are the best that the space of K products has (Rayleigh & Ritz), from a
    random start, every vector orthogonalised against all before it. The ends of the
    spectrum come first, the more so where they stand apart; `residuals` says how far
    they have come. Of a multiple eigenvalue all copies are found only once the space is
    exhausted and another random vector joins it.

    Args:
      matvec: `v -> A v`, symmetric.
      like: a tree of the shapes and dtypes that `matvec` takes, as the parameters.
      key: of the random start.
      num: how many; a Python integer.
      which: `"largest"`, `"smallest"` (algebraically: negative curvature first) or
        `"magnitude"`.
      num_iterations: K; `None` is 2 `num` + 20 (as ARPACK's default subspace, which
        starts anew where this does not), at most the number of parameters.

    Returns:
      The eigenpairs, in the dtype of `like`, float32 or wider.

    Raises:
      TypeError: if a count is no Python integer, or something else is not of its kind.
      ValueError: if `num` is larger than K, `which` is another word, or a product is no
        tree like `like`.

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
    """Find the eigenpairs in a space of so many dimensions."""
    first, later = jax.random.split(key)
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
    """Return `values`, whose derivatives are those of the Rayleigh quotients vᵀA v."""
    del quotients
    return values


@_with_derivative_of.defjvp
def _derivative_of_quotients(primals: tuple, tangents: tuple) -> tuple:
    quotients, values = primals
    # Second derivatives would miss how v turns.
    once = _with_nan_derivative(quotients, jnp.ones_like(values))
    return values, once * tangents[0].astype(values.dtype)


@jax.custom_jvp
def _with_nan_derivative(quotients: jax.Array, x: jax.Array) -> jax.Array:
    """Return `x`; 0 would be silently wrong where A depends on what one derives by."""
    del quotients
    return x


@_with_nan_derivative.defjvp
def _nan_derivative(primals: tuple, tangents: tuple) -> tuple:
    x = primals[1]
    return x, jnp.full_like(x, jnp.nan) * jnp.sum(tangents[0]).astype(x.dtype)


def ritz_values(coefficients: ArrayLike, *, tolerance: float = 1e-3) -> np.ndarray:
    """Read eigenvalues of P⁻¹A off a run of conjugate gradients.

    α and β of k iterations make the tridiagonal matrix of Lanczos: 1/αⱼ + βⱼ₋₁/αⱼ₋₁ on
    its diagonal and √βⱼ/αⱼ beside it, whose eigenvalues lie within the spectrum of
    P⁻¹A and spread to its ends. A holds the damping: those of B alone are about λ less
    where D and P are identities. Conjugate gradients see an eigenvalue once, however
    often it occurs; copies that rounding makes of it are merged once they agree. Not
    for `jit`: how many there are depends on the numbers.

    Args:
      coefficients: shape `[max_iterations, 2]`, of a `CGResult`, or of `state.record`.
      tolerance: values that agree to it, relatively, count as one (heuristic: 1e-3).

    Returns:
      The Ritz values, descending, float64; empty if there was no iteration.

    Raises:
      TypeError: inside of `jit` and other transformations.
      ValueError: if `coefficients` are no pairs.

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
    length = int(np.argmin(np.append(alpha, 0) > 0))
    alpha, beta = alpha[:length], beta[:length]
    diagonal = 1 / alpha
    diagonal[1:] += beta[:-1] / alpha[:-1]
    beside = np.sqrt(beta[:-1]) / alpha[:-1]
    matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    values = np.linalg.eigvalsh(matrix)[::-1]
    gaps = np.append(np.inf, values[:-1] - values[1:])
    return values[gaps > tolerance * np.abs(values)]


def as_space(like: Tree) -> Tree:
    """Return arrays of the shapes and dtypes of `like`."""
    arrays = jax.tree.map(
        lambda x: (
            jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
        ),
        like,
    )
    if optax.tree.size(arrays := as_vector("like", arrays)) == 0:
        msg = f"`like` holds no numbers, and a matrix of none no eigenvalues: {like!r}."
        raise ValueError(msg)
    return arrays


def on_wide(matvec: Matvec, like: Tree) -> Matvec:
    """Return the product on wide vectors, of one that takes the dtypes of `like`."""
    checked = as_product("matvec", matvec)
    return lambda v: trees.cast_like(checked(trees.cast_like(v, like)), v)


def _random(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, trees.widen(like), jax.random.normal)
