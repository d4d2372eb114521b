"""Initial weights for deep and recurrent networks.

>>> import jax
>>> w = sparse(connections=3)(jax.random.key(0), (100, 5))
>>> print((w != 0).sum(axis=0) <= 3)
[ True  True  True  True  True]
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hfjax._core import options, trees
from hfjax._core.arguments import as_key, check_function, describe
from hfjax._core.types import Number

_Shape: TypeAlias = tuple[int, ...]

Initializer: TypeAlias = Callable[..., jax.Array]
"""`(key, shape, dtype=float32) -> array`, as in `jax.nn.initializers`."""


def sparse(
    connections: int = 15,
    *,
    scale: Number = 1.0,
    tanh_sides: int = 0,
    replace: bool = True,
) -> Initializer:
    """Initialise each unit with few incoming weights, drawn from N(0, (`scale` / 2ᵗ)²).

    t is `tanh_sides`. Units then differ from one another and do not saturate, however
    wide the layer below is. Start biases at 0, or at 0.5 for tanh units
    (`jax.nn.initializers.constant(0.5)`).

    `sparse(scale=15**-0.5, replace=False)` reproduces the initialisation of Sutskever's
    program for recurrent networks (2011), which also divides the input matrix by 4.

    Args:
      connections: number of non-zero incoming weights of each unit.
      scale: standard deviation of these weights, for t = 0.
      tanh_sides: how many of the two layers that the kernel connects have tanh units: 0,
        1 or 2. Each halves the weights, because tanh x = 2σ(2x) − 1 doubles input and
        output.
      replace: whether to draw the inputs of a unit with replacement, so that a unit may
        have fewer than `connections` non-zero weights. If `False`, it has exactly
        min(`connections`, inputs).

    Returns:
      An initializer for kernels of shape `(inputs, units)`; leading axes index layers.

    Raises:
      TypeError: if `connections` or `tanh_sides` is not a Python integer; in the
        initializer, if the key or the dtype is not valid.
      ValueError: if an option is out of range; in the initializer, if the shape has fewer
        than two axes.

    References:
      Martens (2010), section 5; for tanh, Sutskever, Martens, Dahl & Hinton (2013).
    """
    options.check_count("connections", connections, low=1)
    options.check_range("scale", scale, low=0.0)
    options.check_count("tanh_sides", tanh_sides, low=0)
    options.check_range("tanh_sides", tanh_sides, low=0, high=2)
    deviation = scale * 0.5**tanh_sides

    def init(
        key: jax.Array, shape: _Shape, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        _check(shape, dtype)
        key = as_key("key", key)
        if len(shape) < 2:
            msg = (
                "Sparse initialisation is for kernels (inputs, units), got shape "
                f"{shape}. Start biases at 0."
            )
            raise ValueError(msg)
        *layers, inputs, units = shape
        choose_key, weight_key = jax.random.split(key)
        count = connections if replace else min(connections, inputs)
        columns = (*layers, units, count)
        # With replacement, two draws of the same input leave one weight, the last one
        # written.
        if replace:
            chosen = jax.random.randint(choose_key, columns, 0, inputs)
        else:
            order = jax.random.uniform(choose_key, (*layers, units, inputs))
            chosen = jnp.argsort(order, axis=-1)[..., :count]
        weights = jax.random.normal(weight_key, columns, dtype)
        weights = jnp.asarray(deviation, dtype) * weights
        kernel = jnp.zeros((*layers, units, inputs), dtype)
        kernel = jnp.put_along_axis(kernel, chosen, weights, axis=-1, inplace=False)
        return jnp.swapaxes(kernel, -1, -2)

    return init


def spectral_radius(
    radius: Number = 1.1, *, base: Initializer | None = None
) -> Initializer:
    """Initialise recurrent matrices with a given spectral radius (largest |eigenvalue|).

    A matrix drawn by `base` is multiplied by `radius` over its own spectral radius, so
    the scale of `base` does not matter. With a radius slightly above 1, the activity of a
    tanh network neither dies out nor becomes chaotic (echo-state networks). A nilpotent
    matrix, such as zeros or a delay line, has spectral radius 0 and is returned as drawn.

    Args:
      radius: the spectral radius.
      base: an initializer that draws the matrices; `None` is `sparse()`, with 15
        connections for each unit.

    Returns:
      An initializer for shapes `(units, units)`; leading axes index matrices. It computes
      in float32 or wider.

    Raises:
      TypeError: as for `sparse`; if `base` is not a function.
      ValueError: if `radius` is negative; in the initializer, if the last two axes differ.

    Example:
      >>> w = spectral_radius(1.1)(jax.random.key(0), (50, 50))
      >>> print(f"{abs(jnp.linalg.eigvals(w)).max():.3f}")
      1.100

    References:
      Sutskever, Martens, Dahl & Hinton (2013); Jaeger & Haas (2004).
    """
    options.check_range("radius", radius, low=0.0)
    draw = sparse() if base is None else base
    check_function("base", draw, "(key, shape, dtype) -> array")

    def init(
        key: jax.Array, shape: _Shape, dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        _check(shape, dtype)  # But not the key, which `base` may not need.
        if len(shape) < 2 or shape[-1] != shape[-2]:
            msg = (
                "A spectral radius is for square recurrent matrices (units, units), "
                f"got shape {shape}. Initialise other kernels with `sparse`."
            )
            raise ValueError(msg)
        kernel = draw(key, shape, dtype)
        wide = kernel.astype(trees.wide(kernel.dtype))
        found = _spectral_radius(wide)
        wanted = jnp.asarray(radius, found.dtype)
        factor = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 1)
        return (wide * factor[..., None, None]).astype(dtype)

    return init


def _check(shape: Any, dtype: DTypeLike) -> None:
    """Raise unless an initializer can make an array of this shape and dtype."""
    if not isinstance(shape, tuple | list):
        msg = f"`shape` must be a tuple (inputs, units), got {describe(shape)}."
        raise TypeError(msg)
    if not jnp.issubdtype(dtype, jnp.floating):
        msg = f"`dtype` must be one of real floats, got {jnp.dtype(dtype)}."
        raise TypeError(msg)


def _spectral_radius(matrix: jax.Array) -> jax.Array:
    """Return max |λ| of matrices `[..., n, n]`, by repeated squaring."""
    # Gelfand: max |λ| = lim ‖Aᵏ‖^(1/k), here at k = 2ˢ. (`jnp.linalg.eigvals` is not
    # available on all devices; matrix products are.) With B₀ = A and Bⱼ₊₁ = (Bⱼ / ‖Bⱼ‖)²,
    # log ‖A^(2ˢ)‖ / 2ˢ = Σⱼ log ‖Bⱼ‖ / 2ʲ over j ≤ s. Any norm has this limit; with the
    # largest entry as norm, nothing overflows.
    #
    # Truncation: A = V J V⁻¹ with Jordan blocks of size m at most has ρᵏ / n ≤ ‖Aᵏ‖ ≤
    # c kᵐ⁻¹ ρᵏ, where c grows with the condition of V. So the error of log ρ is at most
    # (log c n + (m − 1) log k) / k, which for k = 1/ε is a few ε.
    #
    # Rounding: squaring j has an error of about n ε ‖Bⱼ‖². It reaches λ multiplied by its
    # condition number (to the power 1/m if λ is defective, as in any algorithm), and log ρ
    # divided by 2ʲ: in total twice the error of the first squaring.
    squarings = jnp.finfo(matrix.dtype).nmant + 1
    last = math.ceil(math.log2(matrix.shape[-1]))

    def square(j: int, carry: tuple) -> tuple[jax.Array, jax.Array]:
        power, log_radius = carry
        norm = jnp.max(jnp.abs(power), axis=(-2, -1))
        # A is nilpotent if and only if Aⁿ = 0. A zero that appears later is an underflow
        # (λ defective, m ≥ 5 in float32): the sum so far is then right to 0.2 % for m =
        # 8, and to 4 % for m = 15.
        some = norm > 0
        norm = jnp.where(some, norm, 1)
        log = jnp.where(some | (j > last), jnp.log(norm), -jnp.inf)
        power = power / norm[..., None, None]
        power = jnp.matmul(power, power, precision=jax.lax.Precision.HIGHEST)
        return power, log_radius + log * 0.5**j

    start = (matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    return jnp.exp(jax.lax.fori_loop(0, squarings + 1, square, start)[1])
