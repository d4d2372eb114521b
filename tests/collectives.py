"""Reads the collectives of a compiled program: what devices send one another.

Works on the text of an optimised HLO module, `jax.jit(f).lower(…).compile().as_text()`,
of any backend.
"""

import re
from typing import NamedTuple

from benchmarks.micro.programs import instructions, loop_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)

_SHAPE = re.compile(r"\b(pred|token|bf16|[a-z]+\d\w*)\[([\d,<=]*)\]")


class Collective(NamedTuple):
    """One collective instruction; an asynchronous pair is one.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device, as `(dtype, dims)`; if XLA has combined some,
        there are several.
      loop: the innermost loop that it is run in, by the name of its body; `None`
        outside of all.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    loop: str | None


def read(hlo_text):
    """Read the collectives, in the order of the text.

    >>> text = '''
    ... %body (p: f32[8]) -> f32[8] {
    ...   %p = f32[8]{0} parameter(0)
    ...   ROOT %r = (f32[8]{0}, f32[]) all-reduce(%p, %s), to_apply=%add
    ... }
    ...
    ... ENTRY %main (x: f32[2]) -> f32[8] {
    ...   %g = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}
    ...   %d = f32[8]{0} all-gather-done(%g)
    ...   ROOT %w = f32[8]{0} while(%d), condition=%test, body=%body
    ... }
    ... '''
    >>> for c in read(text):
    ...     print(c.kind, c.shapes, c.loop)
    all-reduce (('f32', (8,)), ('f32', ())) body
    all-gather (('f32', (8,)),) None
    """
    loop, found = loop_of(hlo_text), []
    for computation, shape, opcode, _ in instructions(hlo_text):
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            shapes = _results(kind, _shapes(shape), started=opcode != kind)
            found.append(Collective(kind, shapes, loop(computation)))
    return found


def _shapes(text):
    return tuple(
        (dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(text)
    )


def _results(kind, shapes, *, started):
    """Leave out the operands, which some asynchronous forms return with the results."""
    if not started or kind == "all-reduce":
        return shapes
    if kind == "collective-permute":  # (operand, result, and contexts of 4 bytes)
        return shapes[1:2]
    return shapes[len(shapes) // 2 :]
