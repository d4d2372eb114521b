"""Whether a loss sets the outputs of one case against the targets of others.

Where outputs `[cases, 1]` meet targets `[cases]`, they are broadcast to `[cases, cases]`,
and whatever sums that has the right shape. So the program of the loss is read: which axis
of a value is the cases' is followed from equation to equation, as far as that is plain.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, Literal

from hfjax import _programs

_INNER = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_REDUCTIONS = ("reduce_", "argmax", "argmin")
_OTHERS = ("dot_general", "conv", "gather", "scatter", "concatenate", "dynamic", "pad")


class _Mark(NamedTuple):
    """Which axis of a value is that of the cases, and whether outputs are in it."""

    axis: int
    of_outputs: bool


def crosses(program: Any, outputs: int) -> bool:
    """Return whether outputs are broadcast against the targets of other cases.

    Args:
      program: the closed `Jaxpr` of a loss, for two or more cases; every input leads
        with their axis.
      outputs: how many of its inputs are outputs; the rest are targets.

    Returns:
      `True` if it is plain that they are.
    """
    marks = {
        atom: _Mark(0, n < outputs)
        for n, atom in enumerate(program.jaxpr.invars)
        if atom.aval.ndim
    }
    return _read(program.jaxpr, marks)


def _read(jaxpr: Jaxpr, marks: dict[Any, _Mark]) -> bool:
    for equation in jaxpr.eqns:
        inner = _inner(equation)
        if inner is None:
            crossed = _is_crossing(equation, marks)
            result = _mark(equation, marks)
            results = [] if result is None else [(equation.outvars[0], result)]
        else:
            pairs = zip(inner.invars, equation.invars, strict=True)
            within = {x: mark for x, y in pairs if (mark := _of(marks, y)) is not None}
            crossed = _read(inner, within)
            pairs = zip(equation.outvars, inner.outvars, strict=True)
            results = [(x, mark) for x, y in pairs if (mark := _of(within, y))]
        if crossed:
            return True
        marks.update(results)
    return False


def _inner(equation: Any) -> Jaxpr | None:
    name = equation.primitive.name
    if name == "scan":  # It has an axis less within.
        return None
    if name in _INNER:
        return getattr(equation.params.get(_INNER[name]), "jaxpr", None)
    return _programs.inner(equation)


def _of(marks: Mapping[Any, _Mark], atom: Any) -> _Mark | None:
    return None if isinstance(atom, Literal) else marks.get(atom)


def _is_crossing(equation: Any, marks: Mapping[Any, _Mark]) -> bool:
    """Return whether outputs and targets meet with the cases on different axes."""
    if not _is_elementwise(equation):
        return False
    found = [mark for x in equation.invars if (mark := _of(marks, x))]
    ours = {mark.axis for mark in found if mark.of_outputs}
    theirs = {mark.axis for mark in found if not mark.of_outputs}
    return any(a != b for a in ours for b in theirs)


def _is_elementwise(equation: Any) -> bool:
    shape = equation.outvars[0].aval.shape
    shapes = [x.aval.shape for x in equation.invars if x.aval.ndim]
    return not equation.primitive.name.startswith(_OTHERS) and all(
        len(other) == len(shape)
        and all(n in (1, m) for n, m in zip(other, shape, strict=True))
        for other in shapes
    )


def _mark(equation: Any, marks: Mapping[Any, _Mark]) -> _Mark | None:
    """Return where the cases are in a result; `None` if that is not plain."""
    found = [mark for x in equation.invars if (mark := _of(marks, x))]
    if not found:
        return None
    name, params, first = equation.primitive.name, equation.params, found[0]
    axis: int | None = first.axis
    if len(equation.invars) > 1 or _is_elementwise(equation):
        if not _is_elementwise(equation) or len({mark.axis for mark in found}) > 1:
            return None
        return _Mark(first.axis, any(mark.of_outputs for mark in found))
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        axis = params["broadcast_dimensions"][axis]
    elif name == "transpose":
        axis = params["permutation"].index(axis)
    elif name in ("reshape", "squeeze"):
        axis = _reshaped(axis, before, after)
    elif name.startswith(_REDUCTIONS):
        axes = params["axes"]
        axis = None if axis in axes else axis - sum(n < axis for n in axes)
    else:
        axis = None
    return None if axis is None else first._replace(axis=axis)


def _reshaped(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Return where an axis, longer than one, is after a reshape that leaves it whole."""
    lead = [n for n in before[:axis] if n != 1]
    seen: list[int] = []
    for place, length in enumerate(after):
        if length != 1:
            if seen == lead:
                return place if length == before[axis] else None
            seen.append(length)
    return None
