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
from jax.typing import ArrayLike

from hfjax._core import options, trees
from hfjax._core.arguments import as_key
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Matvec, Number, Tree
from hfjax._tracing import compiled, linalg
from hfjax.inspection._eigenvalues import Eigenpairs as Eigenpairs
from hfjax.inspection._eigenvalues import as_space, on_wide
from hfjax.inspection._eigenvalues import eigenvalues as eigenvalues
from hfjax.inspection._eigenvalues import ritz_values as ritz_values
from hfjax.solvers.krylov import basis


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
    options.check_count("num_probes", num_probes, low=1)
    options.check_count("num_iterations", num_iterations, low=1)
    like, key = as_space(like), as_key("key", key)
    product = on_wide(matvec, like)
    dimension = min(num_iterations, optax.tree.size(like))

    def probed(like: Tree, key: jax.Array) -> Density:
        def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Signs: the share of a diagonal matrix is then exact.
            matrix = basis(product, _signs(key, like), dimension).matrix
            nodes, weights = linalg.eigh(matrix)
            return nodes, jnp.square(weights[0])

        return Density(*jax.lax.map(probe, jax.random.split(key, num_probes)))

    found = compiled.run(probed, like, key)
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
    options.check_count("num_probes", num_probes, low=2)
    like, key = as_space(like), as_key("key", key)
    product = on_wide(matvec, like)

    def probed(like: Tree, key: jax.Array) -> Estimate:
        def probe(key: jax.Array) -> jax.Array:
            v = _signs(key, like)
            return trees.dot(v, product(v))

        shares = jax.lax.map(probe, jax.random.split(key, num_probes))
        spread = jnp.std(shares, ddof=1)
        error = spread / np.sqrt(num_probes).astype(spread.dtype)
        return Estimate(jnp.mean(shares), error)

    return compiled.run(probed, like, key)


def _signs(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, trees.widen(like), jax.random.rademacher)
