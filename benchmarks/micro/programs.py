"""Reads compiled programs: their kernels, their loops, how often the model is in them.

Works on the text of an optimised HLO module, `jax.jit(f).lower(…).compile().as_text()`,
of any backend. A kernel is what a device executes as one: a fusion, a matrix product, a
copy, a call of a library. Loops, branches, and instructions that only name or regroup
values are not kernels.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

OUTSIDE = "once"
"""The place of what stands outside of all loops."""

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
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
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
      origins: how many kernels each function leads to, by place and function.
      units: how many exponentials and tanhs of the model there are in each place.
    """

    instructions: int
    kinds: Counter[str]
    places: Counter[str]
    origins: Counter[tuple[str, str]]
    units: Counter[str]


def read(text: str, writers: Collection[str] = ()) -> Program:
    """Count what a program consists of.

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
    origins: Counter[tuple[str, str]] = Counter()
    units: Counter[str] = Counter()
    count = 0
    for computation, _, opcode, line in instructions(text):
        count += 1
        ends = opcode.endswith(("-done", "-update"))
        if computation in run and opcode not in _NO_KERNELS and not ends:
            place = place_of(computation)
            kinds[opcode] += 1
            places[place] += 1
            origins[place, writer(line) or opcode] += 1
        if opcode in _OF_UNITS and writer(line) in writers:
            units[place_of(computation)] += 1
    return Program(count, kinds, places, origins, units)


class Loop(NamedTuple):
    """A while loop.

    Attributes:
      parent: the loop around it, by the name of its body; `None` outside of all.
      trips: how often it runs, where XLA knows, as it does for a scan.
    """

    parent: str | None
    trips: int | None


def loops(hlo_text: str) -> dict[str, Loop]:
    """Read the while loops, by the names of their bodies.

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
    around, found = loop_of(hlo_text), {}
    for computation, _, opcode, line in instructions(hlo_text):
        if opcode == "while":
            (body,) = dict(called(line))["body"]
            trips = _TRIPS.search(line)
            found[body] = Loop(around(computation), int(trips[1]) if trips else None)
    return found


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield each instruction: its computation, result shape, opcode and line."""
    computation = ""
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            computation = header[1]
        elif instruction := _INSTRUCTION.match(line):
            yield computation, instruction[1], instruction[2], line


def called(line: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the computations that an instruction calls, by role."""
    return [
        (role, tuple(re.findall(r"[\w.\-]+", names)))
        for role, names in _CALLED.findall(line)
    ]


def loop_of(text: str) -> Callable[[str], str | None]:
    """Return what finds the innermost loop around a computation, by its body's name.

    In an optimised module every computation in a loop is called from one place, because
    XLA makes copies.
    """
    calls: dict[str, tuple[str, str | None]] = {}
    for computation, _, opcode, line in instructions(text):
        callees = called(line)
        body = dict(callees)["body"][0] if opcode == "while" else None
        for role, names in callees:
            loop = body if role in ("body", "condition") else None
            calls.update((name, (computation, loop)) for name in names)

    def find(computation: str) -> str | None:
        while computation in calls:
            computation, loop = calls[computation]
            if loop is not None:
                return loop
        return None

    return find


def _executed(text: str) -> set[str]:
    """Return the computations that are more than a part of a kernel."""
    callees: dict[str, list[str]] = {}
    for computation, _, opcode, line in instructions(text):
        if opcode in ("while", "conditional", "call"):
            its = [name for _, names in called(line) for name in names]
            callees.setdefault(computation, []).extend(its)
    entry = _ENTRY.search(text)
    waiting, found = [entry[1]] if entry else [], set()
    while waiting:
        computation = waiting.pop()
        found.add(computation)
        waiting += callees.get(computation, [])
    return found


def _places(text: str, writer: Callable[[str], str | None]) -> Callable[[str], str]:
    """Return `computation -> place`."""
    known, around = loops(text), loop_of(text)
    names = {}
    for _, _, opcode, line in instructions(text):
        if opcode == "while":
            (body,) = dict(called(line))["body"]
            names[body] = writer(line) or body

    def place(computation: str) -> str:
        body = around(computation)
        while body is not None and known[body].trips is not None:
            body = known[body].parent
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
