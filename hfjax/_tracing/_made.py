"""How a program makes kernels from parameters before it multiplies inputs by them.

A kernel may be a parameter that is laid out anew, several that are concatenated or added,
or a parameter times values that are computed from others. `Made` says which parameters an
array contains, where, and by what each is multiplied: the array is sₖ θₖ, entry by entry,
summed over k, so a change of θₖ changes it by sₖ dθₖ. That sₖ may depend on parameters,
on θₖ itself in weight normalisation, is left out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.extend.core import Literal

from hfjax._tracing._axes import Layout, Shape, broadcast, placed, reshaped

Path: TypeAlias = tuple[int, ...]
"""The number of an equation in its program, after those of the equations around it.

After the number of a `cond` stands that of the branch."""


class Place(NamedTuple):
    """Where an equation is.

    Attributes:
      path: its path.
      loops: the lengths of the loops around it, from the outermost.
      is_in_branch: whether it is in a branch of a `cond`, which may not be taken.
    """

    path: Path = ()
    loops: tuple[int, ...] = ()
    is_in_branch: bool = False


_SAME = frozenset({"convert_element_type", "copy", "pvary", "pcast", "reshard"})
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})
_SUMS = {"add": 1, "add_any": 1, "sub": -1, "complex": 1j}


class Scale(NamedTuple):
    """A value by which a program multiplies a parameter.

    Attributes:
      path: the equation that does so.
      operand: which of its operands the value is.
      divides: whether the parameter is divided by it.
      layout: the pieces of the parameter along which it varies, for each loop around the
        equation and each axis of the value.
    """

    path: Path
    operand: int
    divides: bool
    layout: Layout


class Part(NamedTuple):
    """A parameter in an array.

    Attributes:
      number: the number of the parameter.
      layout: where in the array its pieces are.
      looped: for each loop around, the pieces that it runs over.
      factor: a number by which it is multiplied.
      scales: values by which it is multiplied.
    """

    number: int
    layout: Layout
    looped: Layout = ()
    factor: complex = 1
    scales: tuple[Scale, ...] = ()

    @property
    def is_scaled(self) -> bool:
        """Whether it is multiplied by anything."""
        return self.factor != 1 or bool(self.scales)


@dataclasses.dataclass(frozen=True)
class Made:
    """A value that is computed from parameters and constants alone.

    Attributes:
      parts: the parameters that it contains; none if it is computed in another way.
      others: the parameters that it depends on in another way, and in which.
      loops: the loops around it, counted from the outermost, in whose steps it differs.
    """

    parts: tuple[Part, ...] = ()
    others: Mapping[int, str] = dataclasses.field(default_factory=dict)
    loops: frozenset[int] = frozenset()

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter as it is."""
        return len(self.parts) == 1 and self.is_exact(self.parts[0].number)

    def is_exact(self, number: int) -> bool:
        """Whether the value changes by as much as a parameter in it does."""
        scaled = {part.number for part in self.parts if part.is_scaled}
        return number not in scaled | self.others.keys()

    def why(self, reason: str) -> dict[int, str]:
        """Say of all its parameters why they are no kernels."""
        scaled = "it is scaled first"
        reasons = {p.number: scaled if p.is_scaled else reason for p in self.parts}
        return reasons | dict(self.others)

    def in_loop(self, depth: int, *, is_stepped: bool) -> "Made":
        """Return the mark within a loop that takes all of it, or a step of it."""

        def part(its: Part) -> Part:
            first, *rest = its.layout if is_stepped else ((), *its.layout)
            return its._replace(layout=tuple(rest), looped=(*its.looped, first))

        loops = self.loops | {depth} if is_stepped else self.loops
        return Made(tuple(map(part, self.parts)), self.others, loops)

    def outside(self, reason: str, depth: int | None = None) -> "Made":
        """Return the mark of what a loop of this depth, or a branch, returns."""
        return Made((), self.why(reason), self.loops - {depth})


Mark: TypeAlias = Made | None
"""What is known of a value that does not depend on data; `None` is a constant."""


class _Step(NamedTuple):
    """An equation whose operands do not depend on data."""

    equation: Any
    marks: Sequence[Mark]
    place: Place
    ranks: Sequence[int]

    def parts(self, n: int) -> tuple[Part, ...]:
        mark = self.marks[n]
        return () if mark is None else mark.parts

    def shape(self, n: int) -> Shape:
        return self.equation.invars[n].aval.shape

    def is_whole(self, n: int) -> bool:
        """Whether an operand has an entry for each of the result."""
        return self.shape(n) == self.equation.outvars[0].aval.shape

    def is_tangled(self) -> bool:
        """Whether both operands depend on one parameter, each with all of its entries."""
        whole = [
            set(mark.why(""))
            for n, mark in enumerate(self.marks)
            if mark is not None and self.is_whole(n)
        ]
        return len(whole) == 2 and not whole[0].isdisjoint(whole[1])


def made(
    equation: Any, marks: Sequence[Mark], place: Place, ranks: Sequence[int]
) -> Made:
    """Return the mark of what an equation computes, given those of its operands.

    `ranks` are the numbers of axes of the parameters.
    """
    name, aval = equation.primitive.name, equation.outvars[0].aval
    is_known = len(equation.outvars) == 1 and jnp.issubdtype(aval.dtype, jnp.inexact)
    step, keep = _Step(equation, marks, place, ranks), _KEPT.get(name, _moved)
    parts: list[Part] = []
    others: dict[int, str] = {}
    loops: frozenset[int] = frozenset()
    for n, mark in enumerate(marks):
        if mark is None:
            continue
        kept = keep(step, n) if is_known else []
        lost = {part.number for part in mark.parts} - {part.number for part in kept}
        parts += kept
        others |= dict.fromkeys(lost, f"`{name}` uses it") | dict(mark.others)
        loops |= mark.loops
    return Made(tuple(parts), others, loops)


def _moved(step: _Step, n: int) -> list[Part]:
    """Keep parameters that are only laid out anew or cast."""
    its = [(part, relaid(step.equation, part.layout)) for part in step.parts(n)]
    return [part._replace(layout=layout) for part, layout in its if layout is not None]


def _joined(step: _Step, n: int) -> list[Part]:
    """Keep parameters that are concatenated or stacked."""
    params = step.equation.params
    is_stack = step.equation.primitive.name == "stack"
    axis = params["axis" if is_stack else "dimension"]
    sizes = [1 if is_stack else step.shape(k)[axis] for k in range(len(step.marks))]
    found = []
    for part in step.parts(n):
        layout = list(part.layout)
        if is_stack:
            layout.insert(axis, ())
        if layout[axis] or sizes[n] == 1:
            layout[axis] = placed(layout[axis], sum(sizes[:n]))
            found.append(part._replace(layout=tuple(layout)))
    return found


def _summed(step: _Step, n: int) -> list[Part]:
    """Keep parameters to which other values are added, unless they are repeated."""
    if not step.is_whole(n) or step.is_tangled():
        return []
    sign = _SUMS[step.equation.primitive.name] if n == 1 else 1
    return [part._replace(factor=part.factor * sign) for part in step.parts(n)]


def _scaled(step: _Step, n: int) -> list[Part]:
    """Keep parameters that are multiplied by other values, unless they are repeated."""
    divides = step.equation.primitive.name == "div"
    able = [
        k
        for k in ((0,) if divides else (0, 1))
        if step.parts(k) and step.is_whole(k) and not step.is_tangled()
    ]
    if len(able) > 1:  # A kernel and its scales, of equal shape.
        able = [k for k in able if all(step.ranks[x.number] > 1 for x in step.parts(k))]
    if able != [n]:
        return []
    value, shape = step.equation.invars[1 - n], step.shape(1 - n)
    mark = step.marks[1 - n]
    if isinstance(value, Literal) and shape == ():
        factor = complex(value.val)
        if divides and factor == 0:
            return []
        factor = 1 / factor if divides else factor
        return [part._replace(factor=part.factor * factor) for part in step.parts(n)]
    found = []
    for part in step.parts(n):
        loops = enumerate(part.looped)
        if mark is not None and any(k in mark.loops and not own for k, own in loops):
            continue
        if step.place.is_in_branch:  # Its value may be unknown.
            continue
        axes = zip(shape, part.layout, strict=False)  # Of a number none.
        layout = (*part.looped, *(() if count == 1 else own for count, own in axes))
        scale = Scale(step.place.path, 1 - n, divides, layout)
        found.append(part._replace(scales=(*part.scales, scale)))
    return found


_KEPT = (
    dict.fromkeys(("concatenate", "stack"), _joined)
    | dict.fromkeys(_SUMS, _summed)
    | dict.fromkeys(("mul", "div"), _scaled)
)
"""Which parameters of an operand the result contains, by the primitive of an equation."""


def relaid(equation: Any, layout: Layout, *, repeats: bool = True) -> Layout | None:
    """Return the layout of an array that is only laid out anew or cast, else `None`.

    `repeats` says whether it may be repeated along new axes.
    """
    name, params = equation.primitive.name, equation.params
    if name in _SAME:
        dtype = equation.outvars[0].aval.dtype
        return layout if jnp.issubdtype(dtype, jnp.inexact) else None
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "transpose":
        return tuple(layout[n] for n in params["permutation"])
    if name in _RESHAPES:
        return reshaped(layout, before, after)
    if name == "broadcast_in_dim" and repeats:
        return broadcast(layout, before, after, params["broadcast_dimensions"])
    return None
