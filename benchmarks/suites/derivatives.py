"""A network, and derivatives by the coordinates in one sweep.

A partial differential equation contains u, ∇u and Δu at many points. `of_network` carries
all three through the layers together (the forward Laplacian; Li et al., 2023). An affine
layer maps each of them affinely, and for s = tanh(a) with s′ = 1 − s² and s″ = −2ss′

    ∇s = s′∇a,    Δs = s′Δa + s″ Σᵢ (∂ᵢa)²,

so that d + 2 vectors of a layer's width are computed, where nested forward mode needs
about 2d + 1. A Gauss-Newton vector product of the residuals then takes half to a third of
the time, and half of the memory.

`Taylor` is for everything else: other units, functions of the coordinates as inputs, and
derivatives of any order along a coordinate, by Taylor mode.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.jet import jet

from benchmarks.suites.images import Layers


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


class Taylor(NamedTuple):
    """The same of any function, and higher derivatives, computed when asked for.

    Attributes:
      u: the function, `points -> [cases]`.
      points: `[cases, coordinates]`.
      spatial: the coordinates that the Laplacian is over.
    """

    u: Callable[[jax.Array], jax.Array]
    points: jax.Array
    spatial: Sequence[int] = ()

    def along(self, axis: int, order: int) -> list[jax.Array]:
        """Compute u, ∂u, …, ∂ᵒʳᵈᵉʳu along a coordinate, each `[cases]`.

        Example:
          >>> u = Taylor(lambda points: points[:, 0] ** 3, jnp.full((1, 2), 2.0))
          >>> print([round(float(found[0]), 6) for found in u.along(0, 3)])
          [8.0, 12.0, 12.0, 6.0]
        """
        still = jnp.zeros_like(self.points)
        series = [still.at[:, axis].set(1), *[still] * (order - 1)]
        value, found = jet(self.u, (self.points,), (series,))
        return [value, *found]

    @property
    def value(self) -> jax.Array:
        """Compute u, `[cases]`."""
        return self.u(self.points)

    @property
    def gradient(self) -> jax.Array:
        """Compute ∇u by all coordinates, `[cases, coordinates]`."""
        axes = range(self.points.shape[1])
        return jnp.stack([self.along(axis, 1)[1] for axis in axes], axis=1)

    @property
    def laplacian(self) -> jax.Array:
        """Compute Σᵢ ∂ᵢ²u over the spatial coordinates, `[cases]`."""
        seconds = [self.along(axis, 2)[2] for axis in self.spatial]
        return jnp.sum(jnp.stack(seconds), axis=0)


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
    """Compute u: layers of tanh or sine units, and a linear one of one output.

    Args:
      params: of `init`. A layer with a `log_frequency` is one of sines.
      points: `[cases, coordinates]`, or of one case `[coordinates]`.

    Returns:
      u, `[cases]`, or a scalar.
    """
    x = points
    for layer in params[:-1]:
        x = x @ layer["kernel"] + layer["bias"]
        if "log_frequency" in layer:
            x = jnp.sin(jnp.exp(layer["log_frequency"]) * x)
        else:
            x = jnp.tanh(x)
    return (x @ params[-1]["kernel"] + params[-1]["bias"])[..., 0]


def of_network(
    params: Layers, points: jax.Array, spatial: Sequence[int]
) -> Derivatives:
    """Derive a `network` of tanh units, all in one sweep through its layers.

    Args:
      params: of `init`.
      points: `[cases, coordinates]`.
      spatial: the coordinates that the Laplacian is over; they follow one another.

    Returns:
      u, ∇u and Δu.

    Example:
      The Laplacian is the trace of the Hessian by the spatial coordinates:

      >>> params = init(jax.random.key(0), (3, 8, 8, 1))
      >>> point = jnp.array([0.1, 0.2, 0.3])
      >>> found = of_network(params, point[None], (1, 2))
      >>> hessian = jax.hessian(lambda p: network(params, p))(point)
      >>> print(jnp.allclose(found.laplacian, jnp.trace(hessian[1:, 1:]), atol=1e-6))
      True
    """
    where = slice(spatial[0], spatial[-1] + 1)
    first = params[0]["kernel"]
    value = points @ first + params[0]["bias"]
    # Those of the first layer are the same at all points: its kernel, and 0.
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
