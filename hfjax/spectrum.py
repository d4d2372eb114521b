"""What a curvature matrix is like: eigenvalues, their density, the trace.

For any `Matvec`, of `hfjax.curvature` or your own; no matrix is formed.

| function | gives | products |
|---|---|---|
| `eigenvalues` | a few, largest or smallest, with vectors and residuals | K + `num` |
| `density` | all of them, smeared out; traces of functions of A | K for each probe |
| `trace` | Σᵢ Aᵢᵢ, with its standard error | 1 for each probe |
| `ritz_values` | what the last run of conjugate gradients saw of P⁻¹A | none |

(A + λI)⁻¹v is `hfjax.cg.inverse`; diagonals are `hfjax.diagonals`. Memory is that of K
vectors. Trees of many arrays compile slowly: on one device, a product on the ravelled
vector (`jax.flatten_util.ravel_pytree`) takes a fifth of the time to compile. A product is
handed vectors in the dtypes of `like`; sums and vectors are kept in float32 or wider.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from hfjax import _compiled, _linalg, _options, _tree
from hfjax._arguments import as_key, as_product, as_vector, describe
from hfjax._refusal import without_derivative
from hfjax._types import Matvec, Number, Tree
from hfjax.krylov import basis


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
    _options.check_count("num", num, low=1)
    _options.check_choice("which", which, ("largest", "smallest", "magnitude"))
    like, key = _like(like), as_key("key", key)
    product, size = _on_wide(matvec, like), optax.tree.size(like)
    dimension = 2 * num + 20 if num_iterations is None else num_iterations
    _options.check_count("num_iterations", dimension, low=1)
    dimension = min(dimension, size)
    if num > dimension:
        msg = (
            f"`num` must be at most `num_iterations` and the number of parameters, "
            f"{dimension} here, got {num}."
        )
        raise ValueError(msg)

    return _compiled.run(
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
    values, weights = _linalg.eigh(built.matrix)
    order = {"largest": -values, "smallest": values, "magnitude": -jnp.abs(values)}
    chosen = jnp.argsort(order[which])[:num]
    values, weights = values[chosen], weights[:, chosen]
    vectors = _tree.combination(weights.T, built.vectors)

    def looked_at(pair: tuple[jax.Array, Tree]) -> tuple[jax.Array, jax.Array]:
        value, v = pair
        after = product(v)
        rest = _tree.axpy(-value, v, jax.lax.stop_gradient(after))
        return _tree.dot(v, after), _tree.norm(rest)

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


class Density(NamedTuple):
    """A spectral density, as Gauss quadratures that random probes gave.

    For a function h, (1/n) tr h(A) is about the mean over probes of Σⱼ `weights` ·
    h(`nodes`); each probe's share is exact for polynomials of degree 2K − 1.

    Attributes:
      nodes: shape `[num_probes, K]`.
      weights: the same shape; they sum to 1 in each probe.
    """

    nodes: jax.Array
    weights: jax.Array

    def at(self, points: ArrayLike, width: Number) -> jax.Array:
        """Return the density near some points, smeared by a Gaussian.

        Args:
          points: of the axis of eigenvalues, shape `[points]`.
          width: standard deviation of the Gaussian, in the unit of eigenvalues.

        Returns:
          Shape `[points]`; it integrates to 1.
        """
        at, width = (jnp.asarray(x, self.nodes.dtype) for x in (points, width))
        distance = (at[:, None] - self.nodes.reshape(1, -1)) / width
        bell = jnp.exp(-0.5 * jnp.square(distance)) / (width * math.sqrt(2 * math.pi))
        return bell @ self.weights.reshape(-1) / len(self.nodes)


def density(
    matvec: Matvec,
    like: Tree,
    /,
    *,
    key: jax.Array,
    num_probes: int = 4,
    num_iterations: int = 40,
) -> Density:
    """Estimate the density of all eigenvalues, by stochastic Lanczos quadrature.

    The result has no derivative, as that of `hfjax.cg.solve`.

    Args:
      matvec: `v -> A v`, symmetric.
      like: a tree of the shapes and dtypes that `matvec` takes, as the parameters.
      key: of the random probes.
      num_probes: random starts; more make it less noisy (heuristic: 4).
      num_iterations: K, products for each; more resolve finer (heuristic: 40), at most
        the number of parameters.

    Returns:
      The density.

    Raises:
      TypeError: if a count is no Python integer, or something else is not of its kind.
      ValueError: if a count is less than 1, or a product is no tree like `like`.

    Example:
      The log-determinant of A + I, as in a Laplace approximation:

      >>> d = jnp.array([1.0, 3.0, 7.0])
      >>> found = density(lambda v: d * v, d, key=jax.random.key(0), num_probes=1)
      >>> logs = jnp.sum(found.weights * jnp.log1p(found.nodes), axis=1)
      >>> print((3 * logs.mean()).round(3), jnp.log1p(d).sum().round(3))
      4.159 4.159

    References:
      Ubaru, Chen & Saad (2017); Ghorbani, Krishnan & Xiao (2019).
    """
    _options.check_count("num_probes", num_probes, low=1)
    _options.check_count("num_iterations", num_iterations, low=1)
    like, key = _like(like), as_key("key", key)
    product = _on_wide(matvec, like)
    dimension = min(num_iterations, optax.tree.size(like))

    def probed(like: Tree, key: jax.Array) -> Density:
        def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Signs: the share of a diagonal matrix is then exact.
            matrix = basis(product, _signs(key, like), dimension).matrix
            nodes, weights = _linalg.eigh(matrix)
            return nodes, jnp.square(weights[0])

        return Density(*jax.lax.map(probe, jax.random.split(key, num_probes)))

    found = _compiled.run(probed, like, key)
    return without_derivative("A spectral density", found)


class Estimate(NamedTuple):
    """A random estimate.

    Attributes:
      value: a scalar; its expectation is what is estimated.
      standard_error: of `value`, a scalar.
    """

    value: jax.Array
    standard_error: jax.Array


def trace(
    matvec: Matvec, like: Tree, /, *, key: jax.Array, num_probes: int = 32
) -> Estimate:
    """Estimate tr A as the mean of vᵀA v over random signs v.

    It is linear in A, and its derivative estimates that of the trace.

    Args:
      matvec: `v -> A v`.
      like: a tree of the shapes and dtypes that `matvec` takes, as the parameters.
      key: of the random signs.
      num_probes: a product each, at least 2 (heuristic: 32).

    Returns:
      The estimate; exact for a diagonal A.

    Raises:
      TypeError: if `num_probes` is no Python integer, or something else is not of its
        kind.
      ValueError: if it is less than 2, or a product is no tree like `like`.

    Example:
      >>> a = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> found = trace(lambda v: a @ v, jnp.ones(2), key=jax.random.key(0))
      >>> print(bool(abs(found.value - 5) < 3 * found.standard_error))
      True

    References:
      Hutchinson (1990).
    """
    _options.check_count("num_probes", num_probes, low=2)
    like, key = _like(like), as_key("key", key)
    product = _on_wide(matvec, like)

    def probed(like: Tree, key: jax.Array) -> Estimate:
        def probe(key: jax.Array) -> jax.Array:
            v = _signs(key, like)
            return _tree.dot(v, product(v))

        shares = jax.lax.map(probe, jax.random.split(key, num_probes))
        spread = jnp.std(shares, ddof=1)
        error = spread / np.sqrt(num_probes).astype(spread.dtype)
        return Estimate(jnp.mean(shares), error)

    return _compiled.run(probed, like, key)


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


def _like(like: Tree) -> Tree:
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


def _on_wide(matvec: Matvec, like: Tree) -> Matvec:
    """Return the product on wide vectors, of one that takes the dtypes of `like`."""
    checked = as_product("matvec", matvec)
    return lambda v: _tree.cast_like(checked(_tree.cast_like(v, like)), v)


def _random(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, _tree.widen(like), jax.random.normal)


def _signs(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, _tree.widen(like), jax.random.rademacher)
