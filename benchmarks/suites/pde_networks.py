"""Networks for equations: of which inputs, from which start, with what built in.

A network of sines and cosines of x is periodic whatever its parameters are. One that is
multiplied by t and added to the initial data has these exactly, so that f needs no term
for them. Sine units start as in Sitzmann et al. (2020), "Implicit neural representations
with periodic activation functions", and each layer learns its frequency ω, which starts
at 1, as in Webb, Jerad & Cartis (2026, arXiv 2607.02194).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.suites import derivatives
from benchmarks.suites.images import Layers

Features = Callable[[jax.Array], jax.Array]
"""`points -> inputs`: `[cases, coordinates]` to `[cases, inputs]`."""


class Network(NamedTuple):
    """What u is, from the parameters of the layers.

    Attributes:
      init: `(key, sizes) -> params`.
      features: the inputs; `None` for the coordinates.
      inputs: how many, if there are features.
      built_in: `(points, output) -> u`; `None` for the output itself.
      title: in a few words.
    """

    init: Callable[[jax.Array, Sequence[int]], Layers] = derivatives.init
    features: Features | None = None
    inputs: int = 0
    built_in: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    title: str = "tanh"

    def __call__(self, params: Layers, points: jax.Array) -> jax.Array:
        """Compute u at points, `[cases]`."""
        inputs = points if self.features is None else self.features(points)
        output = derivatives.network(params, inputs)
        return output if self.built_in is None else self.built_in(points, output)

    def derive(self, params: Layers, points: jax.Array, spatial: Sequence[int]) -> Any:
        """Return u and its derivatives at points: `Derivatives` if these suffice."""
        if self.init is derivatives.init and self.features is self.built_in is None:
            return derivatives.of_network(params, points, spatial)
        return derivatives.Taylor(functools.partial(self, params), points, spatial)


def glorot(key: jax.Array, sizes: Sequence[int]) -> Layers:
    """Draw kernels uniformly within ±√(6 / (inputs + units)); biases are 0."""
    return [
        {
            "kernel": _uniform(layer_key, (6 / (inputs + units)) ** 0.5, inputs, units),
            "bias": jnp.zeros(units),
        }
        for layer_key, inputs, units in _layers(key, sizes)
    ]


def siren(key: jax.Array, sizes: Sequence[int]) -> Layers:
    """Draw layers of sine units, each with the logarithm of its frequency."""
    layers, last = [], len(sizes) - 2
    for layer_key, inputs, units in _layers(key, sizes):
        kernel_key, bias_key = jax.random.split(layer_key)
        first, numerator = not layers, 3 if len(layers) == last else 6
        bound = 1 / inputs if first else (numerator / inputs) ** 0.5
        noise = 0.01 * jax.random.normal(bias_key, (units,))
        layer = {
            "kernel": _uniform(kernel_key, bound, inputs, units),
            "bias": _uniform(bias_key, 1.0, units) if first else noise,
            "log_frequency": jnp.zeros(()),
        }
        layers.append(layer)
    return [*layers[:-1], {"kernel": layers[-1]["kernel"], "bias": jnp.zeros(1)}]


def _layers(key: jax.Array, sizes: Sequence[int]) -> list[tuple[jax.Array, int, int]]:
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = itertools.pairwise(sizes)
    return [(k, *pair) for k, pair in zip(keys, pairs, strict=True)]


def _uniform(key: jax.Array, bound: float, *shape: int) -> jax.Array:
    dtype = jnp.zeros(()).dtype
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def periodic(end: float = 1.0) -> Features:
    """Return the inputs (t/end, cos πx, sin πx), of period 2 in x."""

    def features(points: jax.Array) -> jax.Array:
        t, x = points[..., 0], points[..., 1]
        inputs = [t / end, jnp.cos(math.pi * x), jnp.sin(math.pi * x)]
        return jnp.stack(inputs, axis=-1)

    return features


def fourier(modes: int) -> Features:
    """Return cosines and sines of 2π·2ᵏ times each coordinate, for k below `modes`."""

    def features(points: jax.Array) -> jax.Array:
        angles = [2 * math.pi * 2**k * points for k in range(modes)]
        waves = [wave(angle) for angle in angles for wave in (jnp.cos, jnp.sin)]
        return jnp.concatenate(waves, axis=-1)

    return features
