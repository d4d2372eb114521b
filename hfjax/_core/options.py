"""Numeric options: check their ranges, and evaluate schedules.

An option may be a Python number, an array (traced under `optax.inject_hyperparams` or in a
sweep) or an Optax schedule. Only Python and NumPy numbers can be checked at construction.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core.types import Number, NumberOrSchedule


def is_plain_number(option: object) -> bool:
    """Return whether `option` is a Python or NumPy number, whose value is known."""
    return isinstance(option, numbers.Real) and not isinstance(option, bool)


def check_range(
    name: str,
    option: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
) -> None:
    """Raise if `option` is not a number, or is a plain number outside `[low, high]`.

    Schedules, `None` and the values of arrays pass unchecked. `open_low` excludes `low`.

    Raises:
      TypeError: if it is not a real number.
      ValueError: if it is out of range, or an array of several numbers.
    """
    # A traced value or a schedule cannot be compared here; check only what kind it is.
    if not is_plain_number(option):
        dtype, shape = getattr(option, "dtype", None), getattr(option, "shape", ())
        is_array = dtype is not None and any(
            jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
        )
        if not (is_array or callable(option) or option is None):
            came = type(option).__name__ if dtype is None else dtype
            msg = f"`{name}` must be a real number, got {came}."
            raise TypeError(msg)
        if is_array and shape != ():
            msg = f"`{name}` must be one number, got shape {shape}."
            raise ValueError(msg)
        return
    is_above = option > low if open_low else option >= low
    if not (is_above and option <= high):  # NaN is neither.
        above = "above" if open_low else "at least"
        bounds = [f"{above} {low}"] * (low > -math.inf)
        bounds += [f"at most {high}"] * (high < math.inf)
        msg = f"`{name}` must be {' and '.join(bounds) or 'a number'}, got {option!r}."
        raise ValueError(msg)


def check_count(name: str, option: object, *, low: int) -> None:
    """Raise unless `option` is a Python integer of at least `low`.

    Counts set the sizes of buffers, so they must be static: neither arrays nor schedules.

    Raises:
      TypeError: if it is not a Python integer.
      ValueError: if it is too small.
    """
    if isinstance(option, bool) or not isinstance(option, numbers.Integral):
        msg = (
            f"`{name}` must be a Python integer, got {type(option).__name__}: it "
            "sizes buffers, so it cannot be traced or scheduled. Under "
            f"`optax.inject_hyperparams` list it in `static_args`."
        )
        raise TypeError(msg)
    if option < low:
        msg = f"`{name}` must be at least {low}, got {option}."
        raise ValueError(msg)


def check_choice(name: str, option: object, choices: tuple[str, ...]) -> None:
    """Raise unless `option` is one of `choices`.

    Raises:
      ValueError: listing the choices.
    """
    if option not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {allowed}, got {option!r}."
        raise ValueError(msg)


def read(option: NumberOrSchedule, count: jax.Array) -> jax.Array:
    """Return the value of an option at `count`: call a schedule, return a number."""
    return jnp.asarray(option(count) if callable(option) else option)


def like(option: Number, x: jax.Array) -> jax.Array:
    """Return an option in the dtype of `x`.

    NumPy numbers and the arrays of `optax.inject_hyperparams` have dtypes of their own,
    which strict promotion would not combine with that of `x`.
    """
    return jnp.asarray(option, x.dtype)
