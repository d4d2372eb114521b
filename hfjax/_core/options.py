"""Numbers that users give: ranges checked when concrete, schedules read at a count.

An option may be a Python number, an array (traced under
`optax.inject_hyperparams` or in a sweep) or an Optax schedule. Only a Python or
NumPy number can be judged while the program is built.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from hfjax._core.types import Number, NumberOrSchedule


def is_plain_number(option: object) -> bool:
    """Return whether `option` is a Python or NumPy number: known, not traced."""
    return isinstance(option, numbers.Real) and not isinstance(option, bool)


def check_range(
    name: str,
    option: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    """Raise if `option` is no number, or a plain one outside `[low, high]`.

    Args:
      name: of the option, as the user wrote it.
      option: a number, array or schedule, of which only the first can be judged; or
        `None`, where an option may be left out.
      low: least admissible value, excluded if `open_low`.
      high: greatest admissible value.
      open_low: whether `low` itself is refused.

    Raises:
      TypeError: naming the option and what came, if it is no real number.
      ValueError: naming the option, its range and what came.
    """
    if not is_plain_number(option):
        dtype, shape = getattr(option, "dtype", None), getattr(option, "shape", ())
        is_array = dtype is not None and not jnp.issubdtype(dtype, jnp.complexfloating)
        if not (is_array or callable(option) or isinstance(option, bool | None)):
            came = type(option).__name__ if dtype is None else dtype
            msg = f"`{name}` must be a real number, got {came}."
            raise TypeError(msg)
        if is_array and shape != ():
            msg = f"`{name}` must be one number, got shape {shape}."
            raise ValueError(msg)
        return
    too_low = low is not None and (option <= low if open_low else option < low)
    too_high = high is not None and option > high
    if too_low or too_high or option != option:
        bounds = [
            *(
                [f"{'above' if open_low else 'at least'} {low}"]
                if low is not None
                else []
            ),
            *([f"at most {high}"] if high is not None else []),
        ]
        msg = f"`{name}` must be {' and '.join(bounds) or 'a number'}, got {option!r}."
        raise ValueError(msg)


def check_count(name: str, option: object, *, low: int) -> None:
    """Raise unless `option` is a Python integer of at least `low`.

    Counts size buffers, so they are static: no arrays, no schedules.

    Args:
      name: of the option, as the user wrote it.
      option: what came.
      low: least admissible value.

    Raises:
      TypeError: if it is not a plain integer.
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
    """Raise `ValueError` unless `option` is one of `choices`.

    Args:
      name: of the option, as the user wrote it.
      option: what came.
      choices: what is allowed.

    Raises:
      ValueError: listing what is allowed.
    """
    if option not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        msg = f"`{name}` must be one of {allowed}, got {option!r}."
        raise ValueError(msg)


def read(option: NumberOrSchedule, count: jax.Array) -> jax.Array:
    """Return the option's value at `count`: a schedule is called, a number is itself."""
    return jnp.asarray(option(count) if callable(option) else option)


def like(option: Number, x: jax.Array) -> jax.Array:
    """Return the option in the dtype of what it meets.

    A NumPy number or an array, as of `optax.inject_hyperparams`, has a dtype of its own.
    """
    return jnp.asarray(option, x.dtype)
