"""Reads the collectives of a compiled program: what devices send one another.

Works on the text of an optimised HLO module, `jax.jit(f).lower(…).compile().as_text()`,
of any backend.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)

Shape = tuple[str, tuple[int, ...]]
"""`(dtype, dims)`."""

_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b(pred|token|bf16|[a-z]+\d\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = ("true_computation", "false_computation", "branch_computations")


class Collective(NamedTuple):
    """One collective instruction; an asynchronous pair is one.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results, on one device; those that XLA has combined are several.
      elements: of all results.
      bytes: of all results.
      computation: that it stands in.
      loop: the innermost loop that it is run in, by the name of its body; `None`
        outside of all.
      conditional: whether it stands in a branch, of that loop or of the program.
      name: of the JAX operation that it comes from, as far as XLA kept it.
    """

    kind: str
    shapes: tuple[Shape, ...]
    elements: int
    bytes: int
    computation: str
    loop: str | None
    conditional: bool = False
    name: str = ""


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      parent: the loop around it, by the name of its body; `None` outside of all.
      trips: how often it runs, where XLA knows, as it does of a scan.
      conditional: whether it stands in a branch, of its parent or of the program.
      name: of the JAX operation.
    """

    parent: str | None
    trips: int | None
    conditional: bool
    name: str


class _Call(NamedTuple):
    caller: str
    loop: str | None  # That the callee is the body or condition of.
    branch: bool


def read(hlo_text: str) -> list[Collective]:
    """Read the collectives, in the order of the text.

    Args:
      hlo_text: of an optimised module. There every computation with a collective is
        called from one place (XLA makes copies), which says what loop it is in.

    Returns:
      The collectives.

    Example:
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
      ...     print(c.kind, c.shapes, c.elements, c.bytes, c.loop)
      all-reduce (('f32', (8,)), ('f32', ())) 9 36 body
      all-gather (('f32', (8,)),) 8 32 None
    """
    calls = _calls(hlo_text)
    found = []
    for computation, shape, opcode, line in instructions(hlo_text):
        started = opcode.endswith("-start")
        kind = opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        shapes = _results(kind, _shapes(shape), started=started)
        loop, conditional = _place(computation, calls)
        found.append(
            Collective(
                kind=kind,
                shapes=shapes,
                elements=sum(math.prod(dims) for _, dims in shapes),
                bytes=sum(_bytes(shape) for shape in shapes),
                computation=computation,
                loop=loop,
                conditional=conditional,
                name=name_of(line),
            )
        )
    return found


def loops(hlo_text: str) -> dict[str, Loop]:
    """Read the while loops, by the names of their bodies.

    Args:
      hlo_text: of an optimised module.

    Returns:
      Each loop, and what is around it.

    Example:
      >>> text = '''
      ... %outer (p: f32[8]) -> f32[8] {
      ...   ROOT %w = f32[8]{0} while(%p), condition=%test2, body=%inner
      ... }
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   ROOT %w = f32[8]{0} while(%x), condition=%test, body=%outer
      ... }
      ... '''
      >>> [(body, loop.parent) for body, loop in loops(text).items()]
      [('inner', 'outer'), ('outer', None)]
    """
    calls, found = _calls(hlo_text), {}
    for computation, _, opcode, line in instructions(hlo_text):
        if opcode == "while":
            (body,) = dict(called(line))["body"]
            trips = _TRIPS.search(line)
            parent, conditional = _place(computation, calls)
            found[body] = Loop(
                parent, int(trips[1]) if trips else None, conditional, name_of(line)
            )
    return found


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield each instruction: its computation, result shape, opcode and line.

    Args:
      text: of an optimised module.
    """
    computation = ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            yield computation, instruction[1], instruction[2], line


def called(line: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the computations that an instruction calls, by role.

    Args:
      line: of the instruction.
    """
    return [
        (role, tuple(re.findall(r"[\w.\-]+", names)))
        for role, names in _CALLED.findall(line)
    ]


def _calls(text: str) -> dict[str, _Call]:
    """Return where each computation is called from."""
    calls = {}
    for computation, _, opcode, line in instructions(text):
        callees = called(line)
        body = dict(callees)["body"][0] if opcode == "while" else None
        for role, names in callees:
            branch = role in _BRANCHES
            loop = body if role in ("body", "condition") else None
            calls.update((name, _Call(computation, loop, branch)) for name in names)
    return calls


def loop_of(text: str) -> Callable[[str], str | None]:
    """Return what finds the innermost loop around a computation, by its body's name.

    Args:
      text: of an optimised module.
    """
    calls = _calls(text)
    return lambda computation: _place(computation, calls)[0]


def _place(computation: str, calls: dict[str, _Call]) -> tuple[str | None, bool]:
    """Return the innermost loop around a computation, and whether in a branch of it."""
    branch = False
    while computation in calls:
        call = calls[computation]
        branch |= call.branch
        if call.loop is not None:
            return call.loop, branch
        computation = call.caller
    return None, branch


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        (dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(text)
    )


def _results(
    kind: str, shapes: tuple[Shape, ...], *, started: bool
) -> tuple[Shape, ...]:
    """Leave out the operands, which some asynchronous forms hand on with results."""
    if not started or kind == "all-reduce":
        return shapes
    if kind == "collective-permute":  # (operand, result, and contexts of 4 bytes)
        return shapes[1:2]
    return shapes[len(shapes) // 2 :]


def _bytes(shape: Shape) -> int:
    dtype, dims = shape
    width = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(width[0]) if width else 0
    return -(-bits * math.prod(dims) // 8)


def name_of(line: str) -> str:
    """Return the name of the JAX operation, as far as XLA kept it.

    Args:
      line: of the instruction.
    """
    name = _NAME.search(line)
    return name[1] if name else ""
