"""Estimate eigenvalues, the spectral density and the trace of a curvature matrix A.

A is never formed: its product `v -> A v` is from `hfjax.curvature`, or your own.

| function | estimates | number of products |
|---|---|---|
| `eigenvalues` | a few extreme eigenvalues, with eigenvectors and residuals | K + `num` |
| `density` | the density of all eigenvalues; traces of functions of A | K per probe |
| `trace` | Σᵢ Aᵢᵢ, with its standard error | 1 per probe |
| `ritz_values` | eigenvalues of P⁻¹A, from a run of conjugate gradients | 0 |

For (A + λI)⁻¹v see `hfjax.cg.inverse`, for diagonals `hfjax.diagonals`. The first two
store K vectors. Products get vectors in the dtypes of `like`; all else is in float32 or
wider. On one device, a product on one flat vector (`jax.flatten_util.ravel_pytree`)
compiles about five times faster than one on a tree of many arrays.
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
    """A spectral density, represented by one Gauss quadrature per random probe.

    For a function h and an n × n matrix A, the mean over probes of Σⱼ `weights`ⱼ
    h(`nodes`ⱼ) estimates (1/n) tr h(A). For one probe v, the sum equals vᵀh(A)v/n if h
    is a polynomial of degree at most 2K − 1.

    Attributes:
      nodes: in units of the eigenvalues, shape `[num_probes, K]`.
      weights: shape `[num_probes, K]`; the weights of each probe sum to 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def at(self, points: ArrayLike, width: Number) -> jax.Array:
        """Evaluate the density at some points, convolved with a Gaussian.

        Args:
          points: points on the axis of eigenvalues, shape `[points]`.
          width: standard deviation of the Gaussian, in units of the eigenvalues.

        Returns:
          The density, shape `[points]`; its integral over the axis is 1.
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
    """Estimate the density of all eigenvalues by stochastic Lanczos quadrature.

    The result cannot be differentiated: doing so raises an error.

    Args:
      matvec: `v -> A v` for a symmetric A.
      like: a tree with the shapes and dtypes that `matvec` takes, such as the parameters.
      key: a random key, for the probes.
      num_probes: number of random probes; more reduce the noise.
      num_iterations: K, limited to the number of parameters; more resolve finer details.

    Returns:
      The density.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a count is less than 1, or a product is unlike `like`.

    Example:
      log det(A + I), as in a Laplace approximation:

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
            # Signs (Rademacher vectors) are exact for a diagonal A. Golub & Welsch: the
            # nodes are the eigenvalues of the Lanczos matrix, and the weights are the
            # squared first entries of its eigenvectors.
            matrix = basis(product, _signs(key, like), dimension).matrix
            nodes, weights = linalg.eigh(matrix)
            return nodes, jnp.square(weights[0])

        return Density(*jax.lax.map(probe, jax.random.split(key, num_probes)))

    found = compiled.run(probed, like, key)
    return without_derivative("A spectral density", found)


class Estimate(NamedTuple):
    """An unbiased random estimate.

    Attributes:
      value: the estimate, a scalar.
      standard_error: the standard error of `value`, a scalar.
    """

    value: jax.Array
    standard_error: jax.Array


def trace(
    matvec: Matvec, like: Tree, /, *, key: jax.Array, num_probes: int = 32
) -> Estimate:
    """Estimate the trace of A as the mean of vᵀA v over random vectors v of signs ±1.

    The estimate is linear in A, so that its derivative estimates that of the trace.

    Args:
      matvec: `v -> A v`; A need not be symmetric.
      like: a tree with the shapes and dtypes that `matvec` takes, such as the parameters.
      key: a random key, for the signs.
      num_probes: number of vectors v, at least 2; each costs one product.

    Returns:
      The estimate, which is exact if A is diagonal.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if `num_probes` is less than 2, or a product is unlike `like`.

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

        # One probe at a time: only one vector and its product are in memory.
        shares = jax.lax.map(probe, jax.random.split(key, num_probes))
        spread = jnp.std(shares, ddof=1)
        error = spread / np.sqrt(num_probes).astype(spread.dtype)
        return Estimate(jnp.mean(shares), error)

    return compiled.run(probed, like, key)


def _signs(key: jax.Array, like: Tree) -> Tree:
    return optax.tree.random_like(key, trees.widen(like), jax.random.rademacher)
