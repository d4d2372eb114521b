"""Finds how a program uses parameters: products with kernels, and sums with biases.

A matrix product or a convolution is a use of a kernel if one operand is a parameter,
which may be transposed or cast, but not computed with. Its bias is a parameter with one
axis that is added to the result. Programs inside the program (`jit`, `checkpoint`,
`scan`) are read too.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from hfjax._tracing import programs
from hfjax._tracing.interpret import Path, Use

_SAME = frozenset({"convert_element_type", "copy", "pvary", "pcast", "reshard"})
_RESHAPES = frozenset({"reshape", "squeeze"})
_SUMS = frozenset({"add", "add_any"})


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A value that is a parameter; in `axes`, its own axes, `None` for a new one."""

    number: int
    axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A value that is the output of layers, plus possibly other terms.

    `uses` are those of these layers that have a single axis of units, by number, each
    with the place of that axis in the value.
    """

    uses: tuple[tuple[int, int], ...]


_Mark = _Parameter | _Sum | None


def _mark(marks: Mapping[Any, _Mark], atom: Any) -> _Mark:
    return None if isinstance(atom, Literal) else marks.get(atom)


class Reader:
    """Walks through a program, and records what happens to parameters.

    Attributes:
      shapes: the shapes of the parameters.
      uses: the uses of kernels.
      biases: the bias of each use that has one, both by number.
      others: why a parameter is not part of a layer, by its number.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], spoiled: Mapping[int, str]
    ) -> None:
        self.shapes = shapes
        self.others = dict(spoiled)
        self.uses: list[Use] = []
        self.biases: dict[int, int] = {}

    def read(self, jaxpr: Jaxpr) -> None:
        """Read a program whose first inputs are the parameters."""
        marks: dict[Any, _Mark] = {
            jaxpr.invars[n]: _Parameter(n, tuple(range(len(shape))))
            for n, shape in enumerate(self.shapes)
        }
        self._program(jaxpr, marks, (), ())
        self._spoil((_mark(marks, x) for x in jaxpr.outvars), "the model returns it")

    def _spoil(self, marks: Iterable[_Mark], why: str) -> None:
        """Record that parameters are not part of a layer; the first reason counts."""
        for mark in marks:
            if isinstance(mark, _Parameter):
                self.others.setdefault(mark.number, why)

    def _program(
        self, jaxpr: Jaxpr, marks: dict[Any, _Mark], path: Path, loops: tuple[int, ...]
    ) -> list[_Mark]:
        """Read a program whose inputs are marked; mark its outputs."""
        read = [atom for equation in jaxpr.eqns for atom in equation.invars]
        often = collections.Counter(
            atom for atom in (*read, *jaxpr.outvars) if not isinstance(atom, Literal)
        )

        def mark_of(atom: Any) -> _Mark:
            # If the output of a layer is used twice, and a parameter is added to it in only
            # one of the places, different errors come back to the layer and the parameter.
            mark = _mark(marks, atom)
            return None if isinstance(mark, _Sum) and often[atom] > 1 else mark

        for number, equation in enumerate(jaxpr.eqns):
            found = [mark_of(atom) for atom in equation.invars]
            if any(found):
                results = self._equation(equation, found, (*path, number), loops)
                marks.update(zip(equation.outvars, results, strict=True))
        return [mark_of(atom) for atom in jaxpr.outvars]

    def _equation(
        self, equation: Any, found: list[_Mark], path: Path, loops: tuple[int, ...]
    ) -> list[_Mark]:
        name, params = equation.primitive.name, equation.params
        inner = programs.inner(equation)
        if inner is not None:
            if name != "scan":
                marks: dict[Any, _Mark] = dict(zip(inner.invars, found, strict=True))
                return self._program(inner, marks, path, loops)
            count, _ = programs.consts_and_carry(equation)
            self._spoil(found[count:], "a `scan` takes it as carry or step by step")
            # The output of a layer outside is used in every step: more than once.
            consts = zip(inner.invars[:count], found[:count], strict=True)
            marks = {atom: x for atom, x in consts if isinstance(x, _Parameter)}
            results = self._program(inner, marks, path, (*loops, params["length"]))
            self._spoil(results, "a `scan` returns it")
            return [None for _ in results]
        if name in ("dot_general", "conv_general_dilated"):
            result = self._product(equation, found, path, loops)
        elif name in _SUMS:
            result = self._sum(found)
        else:
            result = found[0] and _relabelled(equation, found[0])
        if result is None:
            self._spoil(found, f"`{name}` uses it")
        return [result, *[None for _ in equation.outvars[1:]]]

    def _product(
        self, equation: Any, found: list[_Mark], path: Path, loops: tuple[int, ...]
    ) -> _Mark:
        marks = [(n, x) for n, x in enumerate(found) if isinstance(x, _Parameter)]
        if len(marks) != 1:
            return None
        ((side, mark),) = marks
        rank = len(self.shapes[mark.number])
        axes = tuple(axis for axis in mark.axes if axis is not None)
        # Each axis of the kernel must be there, and no other.
        if rank < 2 or not len(axes) == len(mark.axes) == rank:
            return None
        kinds = _product_axes(equation, side, axes)
        if kinds is None:
            return None
        out = equation.outvars[0].aval
        summed, inputs, units = kinds
        self.uses.append(
            Use(
                path=path,
                kernel=mark.number,
                operand=1 - side,
                input_axes=inputs,
                kernel_axes=axes,
                output_axes=units,
                inputs_last=summed == {rank - 1},
                shape=tuple(out.shape),
                loops=loops,
                dtype=out.dtype,
            )
        )
        return _Sum(((len(self.uses) - 1, units[0]),) if len(units) == 1 else ())

    def _sum(self, found: list[_Mark]) -> _Mark:
        """Assign a parameter to the first use that it fits and that has no bias."""
        sums = [mark for mark in found if isinstance(mark, _Sum)]
        biases = [mark for mark in found if isinstance(mark, _Parameter)]
        uses = tuple(use for mark in sums for use in mark.uses)
        if not biases:
            return _Sum(uses)
        if not sums:
            return None
        (bias,) = biases
        shape = self.shapes[bias.number]
        for n, axis in uses:
            use = self.uses[n]
            (units,) = use.output_axes
            length = use.shape[units]
            # The axis of the bias must be that of the units, not one of equal length.
            here = length <= 1 or bias.axes[axis] == 0
            # A real bias is added to the real part alone, but a complex product also uses
            # the kernel for imaginary parts. So it gets no bias.
            fits = shape == (length,) and here and not use.is_complex
            if fits and n not in self.biases:
                self.biases[n] = bias.number
                return _Sum(uses)
        self._spoil(biases, "it is added to no product that lacks a bias")
        return _Sum(uses)


def _product_axes(
    equation: Any, side: int, kernel_axes: tuple[int, ...]
) -> tuple[set[int], tuple[int, ...], tuple[int, ...]] | None:
    """Sort the axes of a product with a kernel; return `None` if it is not a layer.

    Returns the kernel's axes that are summed over, the axes of the inputs that they
    meet, and the axes of the result that index units, the last two in the order of the
    kernel's.
    """
    numbers = equation.params["dimension_numbers"]
    last = len(kernel_axes) - 1
    if equation.primitive.name == "conv_general_dilated":
        units = kernel_axes[numbers.rhs_spec[0]]
        groups = ("feature_group_count", "batch_group_count")
        grouped = any(equation.params[name] != 1 for name in groups)
        if side != 1 or units != last or grouped:
            return None
        return set(range(last)), (), (numbers.out_spec[1],)
    contracted, batched = numbers
    if any(batched):  # A separate kernel for each index.
        return None
    of_kernel = [kernel_axes[n] for n in contracted[side]]
    pairs = dict(zip(of_kernel, contracted[1 - side], strict=True))
    summed = set(pairs)
    if summed not in (set(range(last)), {last}):
        return None
    # The result has the free axes of the left operand first, then those of the right.
    free = [n for n in range(len(kernel_axes)) if n not in contracted[side]]
    rank = len(equation.outvars[0].aval.shape)
    first = 0 if side == 0 else rank - len(free)
    places = {kernel_axes[n]: first + place for place, n in enumerate(free)}
    inputs = tuple(pairs[axis] for axis in sorted(pairs))
    return summed, inputs, tuple(places[axis] for axis in sorted(places))


def _relabelled(equation: Any, mark: _Mark) -> _Mark:
    """Return the mark of a value that is only laid out anew or cast, else `None`."""
    name, params = equation.primitive.name, equation.params
    if name in _SAME:
        dtype = equation.outvars[0].aval.dtype
        return mark if jnp.issubdtype(dtype, jnp.inexact) else None
    if name == "transpose":
        order = tuple(params["permutation"])
        if isinstance(mark, _Sum):
            return _Sum(tuple((use, order.index(axis)) for use, axis in mark.uses))
        if isinstance(mark, _Parameter):
            return _Parameter(mark.number, tuple(mark.axes[n] for n in order))
    if not isinstance(mark, _Parameter):
        return None
    axes = mark.axes
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "broadcast_in_dim":
        to: list[int | None] = [None] * len(after)
        places = params["broadcast_dimensions"]
        if tuple(before) != tuple(after[place] for place in places):
            return None  # An entry is repeated along an axis.
        for axis, place in zip(axes, places, strict=True):
            to[place] = axis
        return _Parameter(mark.number, tuple(to))
    if name in _RESHAPES:
        # Only axes of length one may come or go.
        long = [(n, axis) for n, axis in zip(before, axes, strict=True) if n != 1]
        if [n for n, _ in long] != [n for n in after if n != 1]:
            return None
        rest = iter(axis for _, axis in long)
        to = [None if n == 1 else next(rest) for n in after]
        return _Parameter(mark.number, tuple(to))
    return None
