"""Counts the kernels of a compiled program, and how often a model's program is in it.

Works on the text of an optimised HLO module, `jax.jit(f).lower(…).compile().as_text()`,
of any backend. A kernel is what a device executes as one: a fusion, a matrix product, a
copy, a call of a library. Loops, branches and what only names or regroups values are
none.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from benchmarks import collectives

OUTSIDE = "once"
"""Where what stands outside of all loops is."""

_NO_KERNELS = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
    ]
)
_OF_UNITS = ("exponential", "tanh", "logistic")
_ENTRY = re.compile(r"^ENTRY %?([\w.\-]+)", re.MULTILINE)
_ROW = re.compile(r"^(\d+) (.*)$", re.MULTILINE)
_NUMBER = re.compile(r"(\w+)=(\d+)")


class Program(NamedTuple):
    """What a compiled program consists of.

    Attributes:
      instructions: in number, those within kernels too.
      kinds: how many kernels there are of each kind.
      places: how many kernels there are outside of loops, and in each loop, by the
        function that the loop is written in. A loop of a known number of trips counts
        where it stands.
      units: how many exponentials and tanhs, of those asked for, there are in each.
    """

    instructions: int
    kinds: Counter[str]
    places: Counter[str]
    units: Counter[str]


def read(text: str, writers: Collection[str] = ()) -> Program:
    """Count what a program consists of.

    Args:
      text: of the optimised module.
      writers: functions whose exponentials and tanhs are counted, `file.function`.

    Returns:
      The counts.

    Example:
      >>> found = read('''
      ... %fused (x: f32[8]) -> f32[8] {
      ...   %x = f32[8]{0} parameter(0)
      ...   ROOT %t = f32[8]{0} tanh(%x)
      ... }
      ... %body (p: f32[8]) -> f32[8] {
      ...   %p = f32[8]{0} parameter(0)
      ...   ROOT %r = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
      ... }
      ... ENTRY %main (x: f32[8]) -> f32[8] {
      ...   %c = f32[8]{0} copy(%x)
      ...   ROOT %w = f32[8]{0} while(%c), condition=%test, body=%body
      ... }
      ... ''')
      >>> print(found.instructions, dict(found.places), dict(found.kinds))
      6 {'body': 1, 'once': 1} {'fusion': 1, 'copy': 1}
    """
    writer, run = _writer(text), _executed(text)
    place_of = _places(text, writer)
    kinds: Counter[str] = Counter()
    places: Counter[str] = Counter()
    units: Counter[str] = Counter()
    instructions = 0
    for computation, _, opcode, line in collectives.instructions(text):
        instructions += 1
        ends = opcode.endswith(("-done", "-update"))
        if computation in run and opcode not in _NO_KERNELS and not ends:
            kinds[opcode] += 1
            places[place_of(computation)] += 1
        if opcode in _OF_UNITS and writer(line) in writers:
            units[place_of(computation)] += 1
    return Program(instructions, kinds, places, units)


def _executed(text: str) -> set[str]:
    """Return the computations that are more than a part of a kernel."""
    callees: dict[str, list[str]] = {}
    for computation, _, opcode, line in collectives.instructions(text):
        if opcode in ("while", "conditional", "call"):
            called = [name for _, names in collectives.called(line) for name in names]
            callees.setdefault(computation, []).extend(called)
    entry = _ENTRY.search(text)
    waiting, found = [entry[1]] if entry else [], set()
    while waiting:
        computation = waiting.pop()
        found.add(computation)
        waiting += callees.get(computation, [])
    return found


def _places(text: str, writer: Callable[[str], str | None]) -> Callable[[str], str]:
    """Return `computation -> place`."""
    loops, loop_of = collectives.loops(text), collectives.loop_of(text)
    names = {}
    for _, _, opcode, line in collectives.instructions(text):
        if opcode == "while":
            (body,) = dict(collectives.called(line))["body"]
            names[body] = writer(line) or body

    def place(computation: str) -> str:
        body = loop_of(computation)
        while body is not None and loops[body].trips is not None:
            body = loops[body].parent
        return OUTSIDE if body is None else names[body]

    return place


def _writer(text: str) -> Callable[[str], str | None]:
    """Return what finds an instruction's function, the innermost that is not JAX's.

    A module's text begins with tables of files, functions, places and stack frames.
    """
    tables: dict[str, dict[str, str]] = {}
    for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
        _, found, rest = text.partition(f"\n{title}\n")
        rows = rest.partition("\n\n")[0] if found else ""
        tables[title] = dict(_ROW.findall(rows))

    def writer(line: str) -> str | None:
        frame = dict(_NUMBER.findall(line)).get("stack_frame_id", "")
        at = dict(_NUMBER.findall(tables["StackFrames"].get(frame, "")))
        where = tables["FileLocations"].get(at.get("file_location_id", ""), "")
        numbers = dict(_NUMBER.findall(where))
        if not numbers:
            return None
        file = tables["FileNames"][numbers["file_name_id"]].strip('"')
        function = tables["FunctionNames"][numbers["function_name_id"]].strip('"')
        return f"{Path(file).stem}.{function.split('.')[-1]}"

    return writer
