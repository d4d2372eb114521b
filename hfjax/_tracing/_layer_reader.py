"""Finds how a program uses parameters: products with kernels, and sums with biases.

A matrix product, a convolution or a lookup of rows is a use of a kernel if one operand is
a parameter, which may be reshaped, transposed or cast, but not computed with. Its bias is
a parameter that is added to the result, with an entry for each unit. Scales and shifts
are parameters that are multiplied with or added to other values, entry by entry. Programs
inside the program (`jit`, `checkpoint`, `scan`) are read too, and so are parameters that
a `scan` takes step by step.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from hfjax._tracing import programs
from hfjax._tracing._axes import (
    Kinds,
    Layout,
    broadcast,
    met,
    reshaped,
    whole,
)
from hfjax._tracing._products import SORTED
from hfjax._tracing.interpret import Path, Use

_SAME = frozenset({"convert_element_type", "copy", "pvary", "pcast", "reshard"})
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})
_SUMS = frozenset({"add", "add_any"})


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A value that is a parameter, with its layout and the pieces that loops run over."""

    number: int
    layout: Layout
    looped: Layout = ()


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A value that depends on the inputs: the output of layers, plus other terms.

    `uses` are those of these layers, by number, each with the layout of the value.
    """

    uses: tuple[tuple[int, Layout], ...]


_DATA = _Sum(())
_Mark = _Parameter | _Sum | None


def _mark(marks: Mapping[Any, _Mark], atom: Any) -> _Mark:
    return None if isinstance(atom, Literal) else marks.get(atom)


class Reader:
    """Walks through a program, and records what happens to parameters.

    Attributes:
      shapes: the shapes of the parameters.
      uses: the uses of kernels.
      biases: the bias of each use that has one, both by number.
      scalings: uses of parameters that are multiplied with or added to a value entry by
        entry, and why they are no kernels or biases there.
      others: why a parameter is not part of a layer, by its number.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], spoiled: Mapping[int, str]
    ) -> None:
        self.shapes = shapes
        self.others = dict(spoiled)
        self.uses: list[Use] = []
        self.biases: dict[int, int] = {}
        self.scalings: list[tuple[Use, str]] = []

    def read(self, jaxpr: Jaxpr) -> None:
        """Read a program whose first inputs are the parameters."""
        marks: dict[Any, _Mark] = dict.fromkeys(jaxpr.invars, _DATA)
        for n, shape in enumerate(self.shapes):
            marks[jaxpr.invars[n]] = _Parameter(n, whole(shape))
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
            return _DATA if isinstance(mark, _Sum) and often[atom] > 1 else mark

        for number, equation in enumerate(jaxpr.eqns):
            found = [mark_of(atom) for atom in equation.invars]
            if any(found):
                results = self._equation(equation, found, (*path, number), loops)
                if any(isinstance(mark, _Sum) for mark in found):
                    results = [mark or _DATA for mark in results]
                marks.update(zip(equation.outvars, results, strict=True))
        return [mark_of(atom) for atom in jaxpr.outvars]

    def _equation(
        self, equation: Any, found: list[_Mark], path: Path, loops: tuple[int, ...]
    ) -> list[_Mark]:
        name = equation.primitive.name
        inner = programs.inner(equation)
        if inner is not None:
            if name != "scan":
                marks: dict[Any, _Mark] = dict(zip(inner.invars, found, strict=True))
                return self._program(inner, marks, path, loops)
            return self._scan(equation, inner, found, path, loops)
        if name in SORTED:
            result = self._product(equation, found, path, loops)
        elif name in _SUMS:
            result = self._sum(equation, found, path, loops)
        elif name == "mul" and self._scaling(equation, found, path, loops):
            result = _DATA
        else:
            result = found[0] and _relabelled(equation, found[0])
        if result is None:
            self._spoil(found, f"`{name}` uses it")
        return [result, *[None for _ in equation.outvars[1:]]]

    def _scan(
        self,
        equation: Any,
        inner: Jaxpr,
        found: list[_Mark],
        path: Path,
        loops: tuple[int, ...],
    ) -> list[_Mark]:
        constant, carried = programs.consts_and_carry(equation)
        self._spoil(found[constant : constant + carried], "a `scan` carries it")
        # What is carried may depend on the inputs after a step. The output of a layer
        # outside is used in every step: more than once.
        has_data = any(isinstance(mark, _Sum) for mark in found)
        marks: dict[Any, _Mark] = dict.fromkeys(
            inner.invars, _DATA if has_data else None
        )
        for n, (atom, mark) in enumerate(zip(inner.invars, found, strict=True)):
            is_carried = constant <= n < constant + carried
            if not is_carried and not isinstance(mark, _Sum):
                marks[atom] = None
            if is_carried or not isinstance(mark, _Parameter):
                continue
            stepped = n >= constant
            layout = mark.layout[1:] if stepped else mark.layout
            looped = (*mark.looped, mark.layout[0] if stepped else ())
            marks[atom] = _Parameter(mark.number, layout, looped)
        length = equation.params["length"]
        results = self._program(inner, marks, path, (*loops, length))
        self._spoil(results, "a `scan` returns it")
        return [None for _ in results]

    def _scaling(
        self,
        equation: Any,
        found: list[_Mark],
        path: Path,
        loops: tuple[int, ...],
        why: str = "",
    ) -> bool:
        """Record a product or sum, entry by entry, of data and a parameter, if it is one."""
        name, out = equation.primitive.name, equation.outvars[0].aval
        sides = [n for n, mark in enumerate(found) if isinstance(mark, _Parameter)]
        is_one = len(sides) == 1 and isinstance(found[1 - sides[0]], _Sum)
        if not is_one or not jnp.issubdtype(out.dtype, jnp.floating):
            return False
        mark: Any = found[sides[0]]
        layout = mark.layout or ((),) * len(out.shape)  # Of a scalar.
        layouts = (*mark.looped, *layout)
        kinds = Kinds((), (), tuple(sorted(x for its in layouts for x in its)))
        use = Use(
            how=name,
            path=path,
            kernel=mark.number,
            operand=1 - sides[0],
            kinds=kinds,
            taken=layout,
            added=layout,
            looped=mark.looped,
            shape=tuple(out.shape),
            loops=loops,
            dtype=out.dtype,
        )
        self.scalings.append((use, why or f"`{name}` uses it"))
        return True

    def _product(
        self, equation: Any, found: list[_Mark], path: Path, loops: tuple[int, ...]
    ) -> _Mark:
        marks = [(n, x) for n, x in enumerate(found) if isinstance(x, _Parameter)]
        if len(marks) != 1:
            return None
        ((side, mark),) = marks
        shape = equation.invars[side].aval.shape
        # An axis of another kind would repeat the kernel.
        other = any(n > 1 and not x for n, x in zip(shape, mark.layout, strict=True))
        if other or len(self.shapes[mark.number]) < 2:
            return None
        name = equation.primitive.name
        layouts = SORTED[name](equation, side, mark.layout)
        # A stack of embeddings would need a stack of diagonals.
        if layouts is None or (name == "gather" and any(mark.looped)):
            return None
        taken, added = layouts
        looped, own, before, after = (
            {piece for pieces in layout for piece in pieces}
            for layout in (mark.looped, mark.layout, taken, added)
        )
        blocks = looped | (before & after)
        # The indices of a lookup have no axis for its inputs.
        inputs = own - after if name == "gather" else before
        kinds = (blocks, inputs - blocks, after - blocks)
        out = equation.outvars[0].aval
        self.uses.append(
            Use(
                how=name,
                path=path,
                kernel=mark.number,
                operand=1 - side,
                kinds=Kinds(*(tuple(sorted(pieces)) for pieces in kinds)),
                taken=taken,
                added=added,
                looped=mark.looped,
                shape=tuple(out.shape),
                loops=loops,
                dtype=out.dtype,
            )
        )
        return _Sum(((len(self.uses) - 1, added),))

    def _sum(
        self, equation: Any, found: list[_Mark], path: Path, loops: tuple[int, ...]
    ) -> _Mark:
        """Assign a parameter to the first use that it fits and that has no bias."""
        shape = equation.outvars[0].aval.shape
        sums = [mark for mark in found if isinstance(mark, _Sum)]
        biases = [mark for mark in found if isinstance(mark, _Parameter)]
        uses = tuple(use for mark in sums for use in mark.uses)
        if not biases:
            return _Sum(uses)
        if not sums:
            return None
        (bias,) = biases
        for n, layout in uses:
            if n not in self.biases and self._fits(bias, n, layout, shape):
                self.biases[n] = bias.number
                return _Sum(uses)
        why = "it is added to no product that lacks a bias" if uses else ""
        if not self._scaling(equation, found, path, loops, why):
            self._spoil(biases, why or f"`{equation.primitive.name}` uses it")
        return _Sum(uses)

    def _fits(
        self, bias: _Parameter, number: int, layout: Layout, shape: tuple[int, ...]
    ) -> bool:
        """Return whether a parameter has an entry for each unit of a use, in order."""
        use = self.uses[number]
        # A real bias is added to the real part alone, but a complex product also uses the
        # kernel for imaginary parts. So it gets no bias.
        # The inputs of a lookup have a diagonal factor, which a 1 would not fit.
        if use.is_complex or use.is_lookup or not self.shapes[bias.number]:
            return False
        lengths = tuple(math.prod(x.size for x in own) or 1 for own in use.looped)
        meeting = met(
            (*use.looped, *layout), (*bias.looped, *bias.layout), (*lengths, *shape)
        )
        if meeting is None:
            return False
        return sorted(meeting, key=meeting.__getitem__) == [
            *use.kinds.blocks,
            *use.kinds.units,
        ]


def _relabelled(equation: Any, mark: _Parameter | _Sum) -> _Mark:
    """Return the mark of a value that is only laid out anew or cast, else `None`."""
    name, params = equation.primitive.name, equation.params
    if name in _SAME:
        dtype = equation.outvars[0].aval.dtype
        return mark if jnp.issubdtype(dtype, jnp.inexact) else None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape

    def moved(layout: Layout) -> Layout | None:
        if name == "transpose":
            return tuple(layout[n] for n in params["permutation"])
        if name in _RESHAPES:
            return reshaped(layout, before, after)
        if name == "broadcast_in_dim" and isinstance(mark, _Parameter):
            return broadcast(layout, before, after, params["broadcast_dimensions"])
        return None

    if isinstance(mark, _Parameter):
        layout = moved(mark.layout)
        return None if layout is None else dataclasses.replace(mark, layout=layout)
    layouts = [(use, moved(layout)) for use, layout in mark.uses]
    known = tuple((use, layout) for use, layout in layouts if layout is not None)
    return _Sum(known) if known else None
