"""Detects a loss that broadcasts the outputs or targets of one example against others'.

When outputs `[cases, 1]` meet targets `[cases]`, they broadcast to `[cases, cases]`, and a
sum over the second axis restores the expected shape. So we read the program of the loss:
we track which axis indexes the examples from equation to equation, as far as that is
certain. What is not certain is never reported.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import Jaxpr, Literal

from hfjax._tracing import programs

_REDUCTIONS = ("reduce_", "argmax", "argmin")
_OTHERS = ("dot_general", "conv", "gather", "scatter", "concatenate", "dynamic", "pad")


def crosses(program: Any) -> bool:
    """Return whether examples are certainly broadcast against one another.

    `program` is a closed `Jaxpr` for two or more examples, the first axis of every input.
    """
    marks = {atom: 0 for atom in program.jaxpr.invars if atom.aval.ndim}
    return _read(program.jaxpr, marks)


def _read(jaxpr: Jaxpr, marks: dict[Any, int]) -> bool:
    """Follow the examples' axis through a program; `marks` holds it for each value."""
    for equation in jaxpr.eqns:
        inner, operands = _inner(equation)
        found = []
        if not inner:
            if _is_crossing(equation, marks):
                return True
            found.append([_mark(equation, marks)] * len(equation.outvars))
        for program in inner:
            pairs = zip(program.invars, operands, strict=True)
            within = {x: axis for x, y in pairs if (axis := _of(marks, y)) is not None}
            if _read(program, within):
                return True
            found.append([_of(within, x) for x in program.outvars])
        # A result is marked only if every branch of a `cond` agrees on its axis.
        for x, axes in zip(equation.outvars, zip(*found, strict=True), strict=True):
            if len(set(axes)) == 1 and axes[0] is not None:
                marks[x] = axes[0]
    return False


def _inner(equation: Any) -> tuple[list[Jaxpr], list[Any]]:
    """Return the programs that an equation may run, and their operands."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":  # Inside, its operands lack the axis that is scanned over.
        return [], []
    if name == "cond":
        return [branch.jaxpr for branch in params["branches"]], equation.invars[1:]
    if name in programs.RULES:
        inner = params[programs.RULES[name]].jaxpr
    else:
        inner = programs.inner(equation)
    return [] if inner is None else [inner], equation.invars


def _of(marks: Mapping[Any, int], atom: Any) -> int | None:
    return None if isinstance(atom, Literal) else marks.get(atom)


def _is_crossing(equation: Any, marks: Mapping[Any, int]) -> bool:
    """Return whether two values meet with the examples on different axes."""
    # Only elementwise operations count: elsewhere operands' axes do not correspond.
    axes = {_of(marks, x) for x in equation.invars} - {None}
    return len(axes) > 1 and _is_elementwise(equation)


def _is_elementwise(equation: Any) -> bool:
    shape = equation.outvars[0].aval.shape
    shapes = [x.aval.shape for x in equation.invars if x.aval.ndim]
    return not equation.primitive.name.startswith(_OTHERS) and all(
        len(other) == len(shape)
        and all(n in (1, m) for n, m in zip(other, shape, strict=True))
        for other in shapes
    )


def _mark(equation: Any, marks: Mapping[Any, int]) -> int | None:
    """Return the examples' axis in the results; `None` if it is not certain."""
    found = [_of(marks, x) for x in equation.invars]
    axes = {axis for axis in found if axis is not None}
    if not axes:
        return None
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _multiplied(equation, found)
    if len(axes) > 1:
        return None
    (axis,) = axes
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name in ("concatenate", "split", "stack"):
        along = params["dimension"] if name == "concatenate" else params["axis"]
        if name == "stack":
            return axis + (along <= axis)
        return None if along == axis else axis
    # Unmarked operands (constants) do not move the axis of an elementwise operation.
    if len(equation.invars) > 1 or _is_elementwise(equation):
        return axis if _is_elementwise(equation) else None
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "slice":
        return axis if before[axis] == after[axis] else None
    if name in ("reshape", "squeeze"):
        return _reshaped(axis, before, after)
    if name.startswith(_REDUCTIONS):
        axes = params["axes"]
        return None if axis in axes else axis - sum(n < axis for n in axes)
    return None


def _multiplied(equation: Any, found: Sequence[int | None]) -> int | None:
    """Return the examples' axis of a matrix product, unless it is summed over."""
    contracted, batched = equation.params["dimension_numbers"]
    # The result has the batched axes first, then the free axes of the left, then the
    # right.
    places, free = set(), len(batched[0])
    for side, axis in enumerate(found):
        rank = equation.invars[side].aval.ndim
        rest = [n for n in range(rank) if n not in (*contracted[side], *batched[side])]
        if axis in contracted[side]:
            return None
        if axis in batched[side]:
            places.add(tuple(batched[side]).index(axis))
        elif axis is not None:
            places.add(free + rest.index(axis))
        free += len(rest)
    return places.pop() if len(places) == 1 else None


def _reshaped(axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """Return the place of an axis (of length > 1) after a reshape that keeps it whole."""
    # It is whole if it keeps its length, and the same axes longer than one stand before
    # it.
    lead = [n for n in before[:axis] if n != 1]
    seen: list[int] = []
    for place, length in enumerate(after):
        if length != 1:
            if seen == lead:
                return place if length == before[axis] else None
            seen.append(length)
    return None
