"""Initial weights for deep networks that are trained without tricks.

>>> import jax
>>> w = sparse(connections=3)(jax.random.key(0), (100, 5))
>>> print((w != 0).sum(axis=0) <= 3)
[ True  True  True  True  True]
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hfjax import _options
from hfjax._types import Number

Initializer: TypeAlias = Callable[..., jax.Array]
"""`(key, shape, dtype=float32) -> array`, as `jax.nn.initializers`."""


def sparse(
    connections: int = 15, *, scale: Number = 1.0, replace: bool = True
) -> Initializer:
    """Initialise each unit with few incoming weights, drawn from N(0, `scale`²).

    Units then differ from one another and do not saturate, however wide the layer
    below (Martens 2010, section 5). Biases start at 0. For tanh units halve `scale`
    for each side that is tanh, and start biases at 0.5 (his program).

    Args:
      connections: incoming weights of each unit that are not zero (15: ibid.).
      scale: standard deviation of those (1: ibid.).
      replace: whether the inputs are drawn with replacement, as in his program: two
        draws of the same input leave one weight. If not, exactly
        min(`connections`, inputs) weights are not zero.

    Returns:
      An initializer for kernels of shape `(inputs, units)`; leading axes are layers
      of their own.

    Raises:
      ValueError: if an option is out of range; in the initializer, for a shape of
        less than two axes.
    """
    _options.check_count("connections", connections, low=1)
    _options.check_range("scale", scale, low=0.0)

    def init(
        key: jax.Array,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> jax.Array:
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
        weights = jnp.asarray(scale, dtype) * jax.random.normal(
            weight_key, columns, dtype
        )
        kernel = jnp.zeros((*layers, units, inputs), dtype)
        kernel = jnp.put_along_axis(kernel, chosen, weights, axis=-1, inplace=False)
        return jnp.swapaxes(kernel, -1, -2)

    return init
