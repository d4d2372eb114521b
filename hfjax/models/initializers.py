"""Initial weights for deep and recurrent networks that are trained without tricks.

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

from hfjax._core import options, trees
from hfjax._core.arguments import as_key, check_function, describe
from hfjax._core.types import Number

Initializer: TypeAlias = Callable[..., jax.Array]
"""`(key, shape, dtype=float32) -> array`, as `jax.nn.initializers`."""


def sparse(
    connections: int = 15,
    *,
    scale: Number = 1.0,
    tanh_sides: int = 0,
    replace: bool = True,
) -> Initializer:
    """Initialise each unit with few incoming weights, from N(0, (`scale`/2ᵗ)²).

    Here t is `tanh_sides`. Units then differ from one another and do not saturate,
    however wide the layer below (Martens 2010, section 5). Biases start at 0, those
    of tanh units at 0.5 (his program): `jax.nn.initializers.constant(0.5)`.

    `sparse(scale=15**-0.5, replace=False)` is what Sutskever's program for recurrent
    networks (2011) draws for every matrix; it then divides that of the inputs by 4.

    Args:
      connections: incoming weights of each unit that are not zero (15: ibid.).
      scale: standard deviation of those, were no side tanh (1: ibid.).
      tanh_sides: how many of the two layers that the kernel connects, the one below
        and the one above, are of tanh units: 0, 1 or 2. Each halves the weights (his
        program), for tanh x = 2σ(2x) − 1: twice the input, twice the output.
      replace: whether the inputs are drawn with replacement, as in his program: two
        draws of the same input leave one weight. If not, exactly
        min(`connections`, inputs) weights are not zero.

    Returns:
      An initializer for kernels of shape `(inputs, units)`; leading axes are layers
      of their own.

    Raises:
      TypeError: if `connections` or `tanh_sides` is not a Python integer; in the
        initializer, if the key is none, or the dtype is not of real floats.
      ValueError: if an option is out of range; in the initializer, for a shape of
        less than two axes.

    References:
      Martens (2010), section 5; for tanh his program, and Sutskever, Martens, Dahl &
      Hinton (2013).
    """
    options.check_count("connections", connections, low=1)
    options.check_range("scale", scale, low=0.0)
    options.check_count("tanh_sides", tanh_sides, low=0)
    options.check_range("tanh_sides", tanh_sides, low=0, high=2)
    deviation = scale * 0.5**tanh_sides

    def init(
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
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
        if replace:
            chosen = jax.random.randint(choose_key, columns, 0, inputs)
        else:
            order = jax.random.uniform(choose_key, (*layers, units, inputs))
            chosen = jnp.argsort(order, axis=-1)[..., :count]
        weights = jnp.asarray(deviation, dtype) * jax.random.normal(
            weight_key, columns, dtype
        )
        kernel = jnp.zeros((*layers, units, inputs), dtype)
        kernel = jnp.put_along_axis(kernel, chosen, weights, axis=-1, inplace=False)
        return jnp.swapaxes(kernel, -1, -2)

    return init


def spectral_radius(
    radius: Number = 1.1, *, base: Initializer | None = None
) -> Initializer:
    """Initialise recurrent matrices with a given largest |eigenvalue|.

    A matrix is drawn by `base` and multiplied by `radius` over its own spectral
    radius. Slightly above 1, a tanh network has dynamics of its own that neither die
    out nor become chaotic (echo-state networks). The scale of `base` does not matter.

    A nilpotent matrix, as zeros or a delay line, has spectral radius 0 and no multiple
    with another: it is left as `base` drew it.

    Args:
      radius: of the spectrum (1.1: Sutskever et al. 2013).
      base: draws the matrices before they are scaled; any initializer. `None` is
        `sparse()`, 15 connections for each unit (ibid.).

    Returns:
      An initializer for shapes `(units, units)`; leading axes are matrices of their
      own. It works in float32 or wider, on every device.

    Raises:
      TypeError: as of `sparse`; if `base` is no function.
      ValueError: if `radius` is negative; in the initializer, if the last two axes
        are not equal.

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
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> jax.Array:
        _check(shape, dtype)  # The key is `base`'s, which may do without.
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


def _check(shape: Any, dtype: jax.typing.DTypeLike) -> None:
    """Raise unless a shape and a dtype are what an initializer takes."""
    if not isinstance(shape, tuple | list):
        msg = f"`shape` must be a tuple (inputs, units), got {describe(shape)}."
        raise TypeError(msg)
    if not jnp.issubdtype(dtype, jnp.floating):
        msg = f"`dtype` must be one of real floats, got {jnp.dtype(dtype)}."
        raise TypeError(msg)


def _spectral_radius(matrix: jax.Array) -> jax.Array:
    """Return max |λ| of matrices `[..., n, n]`: Gelfand's lim ‖Aᵏ‖^(1/k), k = 2ˢ.

    `jnp.linalg.eigvals` runs on few devices; products run on all. With B₀ = A and
    Bⱼ₊₁ = (Bⱼ / ‖Bⱼ‖)², log ‖A^(2ˢ)‖ / 2ˢ = Σⱼ log ‖Bⱼ‖ / 2ʲ over j ≤ s. The norm
    is the largest entry: any norm has the limit, and with this one nothing overflows.

    Truncation: A = V J V⁻¹ with Jordan blocks of size m at most has
    ρᵏ / n ≤ ‖Aᵏ‖ ≤ c kᵐ⁻¹ ρᵏ, where c grows with the condition of V. So the error of
    log ρ is at most (log c n + (m − 1) log k) / k: with k = 1/ε, a few ε.

    Rounding: the squaring at j has an error of about n ε ‖Bⱼ‖², which λ sees times its
    condition (if defective, to the power 1/m, as in any algorithm), and log ρ divided
    by 2ʲ: as much in all as twice the first.

    A is nilpotent if and only if Aⁿ = 0. A zero that comes later is an underflow
    (defective, m ≥ 5 in float32), and what was summed up to there stands: within
    0.2 % for m = 8, 4 % for m = 15.
    """
    squarings = jnp.finfo(matrix.dtype).nmant + 1
    last = math.ceil(math.log2(matrix.shape[-1]))

    def square(j: int, carry: tuple) -> tuple[jax.Array, jax.Array]:
        power, log_radius = carry
        norm = jnp.max(jnp.abs(power), axis=(-2, -1))
        some = norm > 0
        norm = jnp.where(some, norm, 1)
        log = jnp.where(some | (j > last), jnp.log(norm), -jnp.inf)
        power = power / norm[..., None, None]
        power = jnp.matmul(power, power, precision=jax.lax.Precision.HIGHEST)
        return power, log_radius + log * 0.5**j

    start = (matrix, jnp.zeros(matrix.shape[:-2], matrix.dtype))
    return jnp.exp(jax.lax.fori_loop(0, squarings + 1, square, start)[1])
