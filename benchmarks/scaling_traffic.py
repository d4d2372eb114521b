"""Sums up a compiled update's collectives by where they stand in it."""

from collections import Counter
from typing import NamedTuple

from benchmarks import collectives
from benchmarks.collectives import Collective, Loop

OUTSIDE = "once"
ROUND = "start of CG"
ITERATION = "CG iteration"
KEPT = "f during CG"
BACKTRACKING = "backtracking"
LINE_SEARCH = "line search"
PLACES = (OUTSIDE, ROUND, ITERATION, KEPT, BACKTRACKING, LINE_SEARCH)
"""Where a collective of an update can stand; but for the first, each is a loop, or a
branch of one. A product compiled for itself is an `ITERATION`."""


class Traffic(NamedTuple):
    """What a device takes part in, each time that one place of a program is run.

    Attributes:
      counts: of collectives, by kind.
      reduced: bytes of the results of reductions.
      gathered: bytes of the results of all others.
    """

    counts: Counter[str]
    reduced: int
    gathered: int


def by_place(text: str) -> dict[str, Traffic]:
    """Sum up a program's collectives by where they stand.

    Loops of a known number of trips, as scans over layers are, count as unrolled.

    Args:
      text: of the optimised module.

    Returns:
      The traffic of each place, each time that it is run.
    """
    loops = collectives.loops(text)
    searches = [
        body
        for body, loop in loops.items()
        if loop.parent is None and loop.trips is None and not _has_inner(body, loops)
    ]
    found: dict[str, Traffic] = {}
    for one in collectives.read(text):
        times, body, branch = _times(one, loops)
        place = _place(body, branch, loops, searches)
        counts, reduced, gathered = found.get(place, Traffic(Counter(), 0, 0))
        counts[one.kind] += times
        amount = times * one.bytes
        if one.kind in ("all-reduce", "reduce-scatter"):
            reduced += amount
        else:
            gathered += amount
        found[place] = Traffic(counts, reduced, gathered)
    return {place: found[place] for place in PLACES if place in found}


def _times(one: Collective, loops: dict[str, Loop]) -> tuple[int, str | None, bool]:
    """Return how often it is run in a trip of the loop around it of unknown length."""
    times, body, branch = 1, one.loop, one.conditional
    while body is not None and (trips := loops[body].trips) is not None:
        times *= trips
        body, branch = loops[body].parent, branch or loops[body].conditional
    return times, body, branch


def _has_inner(body: str, loops: dict[str, Loop]) -> bool:
    return any(loop.parent == body and loop.trips is None for loop in loops.values())


def _place(
    body: str | None, branch: bool, loops: dict[str, Loop], searches: list[str]
) -> str:
    if body is None:
        return OUTSIDE
    if _has_inner(body, loops):
        return ROUND
    if loops[body].parent is not None or len(searches) == 1:
        return KEPT if branch else ITERATION
    return BACKTRACKING if body == searches[0] else LINE_SEARCH
