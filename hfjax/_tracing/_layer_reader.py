"""Finds how a program uses parameters: products with kernels, and sums with biases.

A matrix product, a convolution or a lookup of rows is a use of a kernel if one operand is
made from a parameter in one of the ways that `_made` knows. Its bias is a parameter that
is added to the result, with an entry for each unit. Scales and shifts are parameters that
are multiplied with or added to data, entry by entry. Programs inside the program (`jit`,
`checkpoint`, `scan`, `cond`) are read too, and so are parameters that a `scan` takes step
by step.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from jax.extend.core import Jaxpr, Literal

from hfjax._tracing import programs
from hfjax._tracing._axes import Layout, met, whole
from hfjax._tracing._made import Made, Part, Place, made, relaid
from hfjax._tracing._products import PRODUCTS, Use, of_product, of_scaling

_SUMS = frozenset({"add", "add_any"})


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A value that depends on the inputs: the output of layers, plus other terms.

    `uses` are those of these layers, by number, each with the layout of the value.
    """

    uses: tuple[tuple[int, Layout], ...]


_DATA = _Sum(())
_Mark = Made | _Sum | None


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
            marks[jaxpr.invars[n]] = Made((Part(n, whole(shape)),))
        self._program(jaxpr, marks, Place())
        self._spoil((_mark(marks, x) for x in jaxpr.outvars), "the model returns it")

    def _spoil(self, marks: Iterable[_Mark], why: str) -> None:
        """Record that parameters are not part of a layer; the first reason counts."""
        for mark in marks:
            if isinstance(mark, Made):
                self.others = mark.why(why) | self.others

    def _program(
        self, jaxpr: Jaxpr, marks: dict[Any, _Mark], place: Place
    ) -> list[_Mark]:
        """Read a program whose inputs are marked; mark its outputs."""
        # What returns nothing, as `jax.debug.print`, uses nothing.
        equations = [(n, its) for n, its in enumerate(jaxpr.eqns) if its.outvars]
        read = [atom for _, equation in equations for atom in equation.invars]
        often = collections.Counter(
            atom for atom in (*read, *jaxpr.outvars) if not isinstance(atom, Literal)
        )

        def mark_of(atom: Any) -> _Mark:
            # If the output of a layer is used twice, and a parameter is added to it in only
            # one of the places, different errors come back to the layer and the parameter.
            mark = _mark(marks, atom)
            return _DATA if isinstance(mark, _Sum) and often[atom] > 1 else mark

        for number, equation in equations:
            found = [mark_of(atom) for atom in equation.invars]
            if any(found):
                here = place._replace(path=(*place.path, number))
                results = self._equation(equation, found, here)
                if any(isinstance(mark, _Sum) for mark in found):
                    results = [mark or _DATA for mark in results]
                marks.update(zip(equation.outvars, results, strict=True))
        return [mark_of(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, found: list[_Mark], place: Place) -> list[_Mark]:
        name = equation.primitive.name
        inner = programs.inner(equation)
        if inner is not None:
            if name != "scan":
                marks: dict[Any, _Mark] = dict(zip(inner.invars, found, strict=True))
                return self._program(inner, marks, place)
            return self._scan(equation, inner, found, place)
        branches = programs.branches(equation)
        if branches:
            return self._branches(branches, found, place)
        result: _Mark = None
        if name in PRODUCTS:
            result = self._product(equation, found, place)
        elif name in _SUMS:
            result = self._sum(equation, found, place)
        elif name == "mul":
            result = self._scaling(equation, found, place)
        elif isinstance(found[0], _Sum):
            result = _relaid(equation, found[0])
        if result is None and not any(isinstance(mark, _Sum) for mark in found):
            ranks, known = [len(shape) for shape in self.shapes], cast(list, found)
            return [made(equation, known, place, ranks)] * len(equation.outvars)
        if result is None:
            self._spoil(found, f"`{name}` uses it")
        return [result, *[None for _ in equation.outvars[1:]]]

    def _scan(
        self, equation: Any, inner: Jaxpr, found: list[_Mark], place: Place
    ) -> list[_Mark]:
        constant, carried = programs.consts_and_carry(equation)
        self._spoil(found[constant : constant + carried], "a `scan` carries it")
        has_data = any(isinstance(mark, _Sum) for mark in found)
        depth = len(place.loops)
        stepwise = Made(loops=frozenset({depth}))
        marks: dict[Any, _Mark] = {}
        for n, (atom, mark) in enumerate(zip(inner.invars, found, strict=True)):
            if constant <= n < constant + carried:
                # It may depend on the inputs after a step.
                marks[atom] = _DATA if has_data else stepwise
            elif isinstance(mark, _Sum):
                # The output of a layer outside is used in every step: more than once.
                marks[atom] = _DATA
            elif isinstance(mark, Made):
                marks[atom] = mark.in_loop(depth, is_stepped=n >= constant)
            else:
                marks[atom] = stepwise if n >= constant else None
        loops = (*place.loops, equation.params["length"])
        results = self._program(inner, marks, place._replace(loops=loops))
        return [
            mark.outside("a `scan` returns it", depth)
            if isinstance(mark, Made)
            else mark and _DATA
            for mark in results
        ]

    def _branches(
        self, branches: Sequence[Jaxpr], found: list[_Mark], place: Place
    ) -> list[_Mark]:
        index, *operands = found

        def read(n: int, branch: Jaxpr) -> list[_Mark]:
            marks: dict[Any, _Mark] = dict(zip(branch.invars, operands, strict=True))
            here = place._replace(path=(*place.path, n), is_in_branch=True)
            return self._program(branch, marks, here)

        def joined(marks: Sequence[_Mark]) -> _Mark:
            why = "a `cond` returns it"
            if any(isinstance(mark, _Sum) for mark in marks):
                self._spoil(marks, why)
                return _DATA
            made_ = [mark.outside(why) for mark in marks if isinstance(mark, Made)]
            others = {n: x for mark in made_ for n, x in mark.others.items()}
            loops = frozenset[int]().union(*(mark.loops for mark in made_))
            return Made((), others, loops) if made_ else None

        each = [read(n, branch) for n, branch in enumerate(branches)]
        return [joined([index, *marks]) for marks in zip(*each, strict=True)]

    def _product(self, equation: Any, found: list[_Mark], place: Place) -> _Mark:
        sides = {n: x for n, x in enumerate(found) if isinstance(x, Made) and x.parts}
        if len(sides) > 1:
            sides = {n: mark for n, mark in sides.items() if mark.is_parameter}
        if len(sides) != 1:
            return None
        ((side, mark),) = sides.items()
        each = [
            of_product(equation, side, part, place)
            if len(self.shapes[part.number]) > 1
            else None
            for part in mark.parts
        ]
        uses = [use for use in each if use is not None]
        if not uses:
            return None
        # What a kernel is scaled by may depend on it.
        lost = {x.number for x, use in zip(mark.parts, each, strict=True) if not use}
        kernels = {use.kernel for use in uses} - lost
        why = f"`{equation.primitive.name}` uses it"
        rest = {n: x for n, x in mark.why(why).items() if n not in kernels}
        self._spoil([Made((), rest), found[1 - side]], why)
        first = len(self.uses)
        self.uses += uses
        return _Sum(tuple((first + n, use.added) for n, use in enumerate(uses)))

    def _sum(self, equation: Any, found: list[_Mark], place: Place) -> _Mark:
        """Assign a parameter to the first use that it fits and that has no bias."""
        sums = [mark for mark in found if isinstance(mark, _Sum)]
        if not sums:
            return None
        uses = tuple(use for mark in sums for use in mark.uses)
        shape = equation.outvars[0].aval.shape

        def is_bias(bias: Made, part: Part) -> bool:
            if bias.is_exact(part.number):
                for n, layout in uses:
                    if n not in self.biases and self._fits(part, n, layout, shape):
                        self.biases[n] = part.number
                        return True
            return False

        def rest(mark: _Mark) -> _Mark:
            if not isinstance(mark, Made):
                return mark
            parts = tuple(part for part in mark.parts if not is_bias(mark, part))
            return dataclasses.replace(mark, parts=parts)

        why = "it is added to no product that lacks a bias" if uses else ""
        self._scaling(equation, [rest(mark) for mark in found], place, why)
        return _Sum(uses)

    def _scaling(
        self, equation: Any, found: list[_Mark], place: Place, why: str = ""
    ) -> _Mark:
        """Record that data are multiplied with or added to parameters, entry by entry."""
        if not any(isinstance(mark, _Sum) for mark in found):
            return None
        why = why or f"`{equation.primitive.name}` uses it"
        for n, mark in enumerate(found):
            if not isinstance(mark, Made):
                continue
            uses = [
                of_scaling(equation, n, part, place)
                for part in mark.parts
                if mark.is_exact(part.number)
            ]
            known = [(use, why) for use in uses if use is not None]
            self.scalings += known
            numbers = {use.kernel for use, _ in known}
            rest = {n: x for n, x in mark.why(why).items() if n not in numbers}
            self._spoil([Made((), rest)], why)
        return _DATA

    def _fits(
        self, bias: Part, number: int, layout: Layout, shape: tuple[int, ...]
    ) -> bool:
        """Return whether a parameter has an entry for each unit of a use, in order."""
        use = self.uses[number]
        # A real bias is added to the real part alone, but a complex product also uses the
        # kernel for imaginary parts. So it gets no bias.
        # The inputs of a lookup have a diagonal factor, which a 1 would not fit.
        # If errors are scaled for the kernel, those of the bias are others.
        if use.is_complex or use.is_lookup or not self.shapes[bias.number]:
            return False
        meeting = met(
            (*use.looped, *layout), (*bias.looped, *bias.layout), (*use.loops, *shape)
        )
        if meeting is None or any(map(use.is_by_unit, use.scales)):
            return False
        return sorted(meeting, key=meeting.__getitem__) == [
            *use.kinds.blocks,
            *use.kinds.units,
        ]


def _relaid(equation: Any, mark: _Sum) -> _Sum | None:
    """Return the mark of the output of layers that is only laid out anew or cast."""
    layouts = [(use, relaid(equation, x, repeats=False)) for use, x in mark.uses]
    known = tuple((use, layout) for use, layout in layouts if layout is not None)
    return _Sum(known) if known else None
