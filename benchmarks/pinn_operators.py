"""Derivatives by the coordinates: of any function, and of a tanh network in one sweep.

A partial differential equation asks for u, ∇u and Δu at many points. `of_function` takes
them by forward mode twice, for each coordinate. `of_network` carries all three through
the layers together (the forward Laplacian; Li et al., 2023): of an affine layer they are
affine, and of s = tanh(a) with s′ = 1 − s², s″ = −2ss′

    ∇s = s′∇a,    Δs = s′Δa + s″ Σᵢ (∂ᵢa)²,

so that d + 2 vectors of a layer's width are computed, where nested forward mode has about
2d + 1. A product with the Gauss-Newton matrix of the residuals then took half to a third
of the time on one core in float64: 10 ms for 22 with 2 coordinates and 64-64-48-48 units,
24 for 62 with 5, 62 for 168 with 10 and 256-256-128-128 units, 197 for 564 with 100; half
of the memory too.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.network import Layers

Function = Callable[[jax.Array], jax.Array]
"""`point -> u`, of `[coordinates]` a scalar."""


class Derivatives(NamedTuple):
    """A function and its derivatives at points.

    Attributes:
      value: u, `[cases]`.
      gradient: ∇u by all coordinates, `[cases, coordinates]`.
      laplacian: Σᵢ ∂ᵢ²u over the spatial coordinates, `[cases]`.
    """

    value: jax.Array
    gradient: jax.Array
    laplacian: jax.Array


def init(key: jax.Array, sizes: Sequence[int]) -> Layers:
    """Draw a network's parameters as PyTorch's `Linear` does.

    Args:
      key: of the numbers.
      sizes: from the coordinates to the one output.

    Returns:
      Kernels and biases, uniform within ±1/√inputs, in JAX's default precision.
    """
    layers, dtype = [], jnp.zeros(()).dtype
    for layer_key, (inputs, units) in zip(
        jax.random.split(key, len(sizes) - 1), itertools.pairwise(sizes), strict=True
    ):
        kernel_key, bias_key = jax.random.split(layer_key)
        bound = inputs**-0.5
        kernel = jax.random.uniform(
            kernel_key, (inputs, units), dtype, minval=-bound, maxval=bound
        )
        bias = jax.random.uniform(
            bias_key, (units,), dtype, minval=-bound, maxval=bound
        )
        layers.append({"kernel": kernel, "bias": bias})
    return layers


def network(params: Layers, points: jax.Array) -> jax.Array:
    """Compute u: tanh layers, and a linear one of one output.

    Args:
      params: of `init`.
      points: `[cases, coordinates]`, or of one case `[coordinates]`.

    Returns:
      u, `[cases]`, or a scalar.
    """
    x = points
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x @ params[-1]["kernel"] + params[-1]["bias"])[..., 0]


def of_function(
    function: Function, points: jax.Array, spatial: Sequence[int]
) -> Derivatives:
    """Derive any function by forward mode, twice for each coordinate.

    Args:
      function: u of one point.
      points: `[cases, coordinates]`.
      spatial: the coordinates that the Laplacian is over.

    Returns:
      u, ∇u and Δu.

    Example:
      Of t + x² + 3y² it is 8, whatever t:

      >>> points = jnp.array([[5.0, 1.0, 2.0]])
      >>> found = of_function(
      ...     lambda p: p[0] + p[1] ** 2 + 3 * p[2] ** 2, points, (1, 2)
      ... )
      >>> print(found.value, found.gradient, found.laplacian)
      [18.] [[ 1.  2. 12.]] [8.]
    """
    directions = jnp.eye(points.shape[1], dtype=points.dtype)

    def along(point: jax.Array, direction: jax.Array) -> tuple[jax.Array, jax.Array]:
        def slope(point: jax.Array) -> jax.Array:
            return jax.jvp(function, (point,), (direction,))[1]

        return jax.jvp(slope, (point,), (direction,))

    def at(point: jax.Array) -> Derivatives:
        slopes, curvatures = jax.vmap(along, (None, 0))(point, directions)
        laplacian = jnp.sum(curvatures[jnp.asarray(spatial)])
        return Derivatives(function(point), slopes, laplacian)

    return jax.vmap(at)(points)


def of_network(
    params: Layers, points: jax.Array, spatial: Sequence[int]
) -> Derivatives:
    """Derive `network`, all derivatives in one sweep through its layers.

    Args:
      params: of `init`.
      points: `[cases, coordinates]`.
      spatial: the coordinates that the Laplacian is over; they follow one another.

    Returns:
      u, ∇u and Δu: to rounding those of `of_function`.

    Example:
      >>> params = init(jax.random.key(0), (3, 8, 8, 1))
      >>> points = jnp.array([[0.1, 0.2, 0.3]])
      >>> found = of_network(params, points, (1, 2))
      >>> other = of_function(lambda p: network(params, p), points, (1, 2))
      >>> all(jnp.allclose(a, b, atol=1e-6) for a, b in zip(found, other))
      True
    """
    where = slice(spatial[0], spatial[-1] + 1)
    first = params[0]["kernel"]
    value = points @ first + params[0]["bias"]
    # Of the first layer they are the same at all points: its kernel, and 0.
    gradient: Any = first[None]
    laplacian: Any = None
    for layer in params[1:]:
        value, gradient, laplacian = _tanh(value, gradient, laplacian, where)
        kernel = layer["kernel"]
        value = value @ kernel + layer["bias"]
        gradient, laplacian = gradient @ kernel, laplacian @ kernel
    return Derivatives(value[:, 0], gradient[..., 0], laplacian[:, 0])


def _tanh(
    value: jax.Array, gradient: jax.Array, laplacian: jax.Array | None, where: slice
) -> tuple[jax.Array, jax.Array, jax.Array]:
    s = jnp.tanh(value)
    slope = 1 - s * s
    squares = jnp.sum(jnp.square(gradient[:, where]), axis=1)
    curved = -2 * s * squares
    if laplacian is not None:
        curved = laplacian + curved
    return s, slope[:, None] * gradient, slope * curved
