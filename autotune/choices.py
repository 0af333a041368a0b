"""Choices for the blocks of one Layout as numbers of blocks by Way, and the families in which good ones are found.

    Choice        how many blocks do what, in which order, how far ahead they are fetched
    arranged      the Policy of each block; placed, its Way
    useful        the Ways that are worth mixing: corners of convex hulls, for several prices of a copied byte
    paths         families: m blocks of one offloading Way, the rest down a hull of Ways, a block at a time
    neighbours    a Choice with one block changed, or two, or with another order, depth or last block

What keeps least comes first, because its turn in backward comes last, when the others are freed; offloading blocks stand
first or evenly spread. Nothing is predicted and nothing decided here: policies.py does. Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise, product

from vchitect_fast.autotune.bounds import lower_hull
from vchitect_fast.autotune.space import PREFETCH_DEPTHS
from vchitect_fast.autotune.ways import Way
from vchitect_fast.offload.policy import spread
from vchitect_fast.plan import Policy

WHOLE = Policy.keep()
PRICES = (0.0, 0.25, 0.5, 1.0)  # of a copied byte, in the seconds that the link takes for it
NUMBERS = (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 36, 48, 64, 85)  # of blocks that offload alike; neighbours fill the gaps
Counts = tuple[tuple[Policy, int], ...]


@dataclass(frozen=True)
class Choice:
    """Numbers of blocks by what they do, without the last block; and what decides the rest."""

    counts: Counts
    last: Policy = WHOLE
    spread: bool = False  # offloading blocks evenly spread, not first
    depth: int = 1  # of fetching ahead


@dataclass(frozen=True)
class Path:
    """m blocks of `fixed`, the others from the first Way of `hull` to its last, one block after the other."""

    fixed: Way | None
    num_fixed: int
    hull: tuple[Way, ...]
    number: int  # of blocks in all, without the last

    def counts(self, spared_bytes: float) -> Counts | None:
        """The least that spares so many bytes of what keeping everything keeps; None where the path's end spares less."""
        start, rest = self.hull[0].kept_bytes, self.number - self.num_fixed
        done = [(self.fixed.policy, self.num_fixed)] if self.fixed is not None and self.num_fixed else []
        left = spared_bytes - (self.num_fixed * (start - self.fixed.kept_bytes) if self.fixed is not None else 0)
        if left <= 0:
            return _merged([*done, (self.hull[0].policy, rest)])
        for one, next_ in pairwise(self.hull):
            each = one.kept_bytes - next_.kept_bytes
            if left <= each * rest:
                moved = int(-(-left // each))
                return _merged([*done, (next_.policy, moved), (one.policy, rest - moved)])
            left -= each * rest
        return None


def _merged(items: Sequence[tuple[Policy, int]]) -> Counts:
    """Each Policy once, those of no block left out."""
    found: dict[Policy, int] = {}
    for policy, number in items:
        found[policy] = found.get(policy, 0) + number
    return tuple((policy, number) for policy, number in found.items() if number)


def _hull(ways: Sequence[Way], price: float) -> tuple[Way, ...]:
    whole = ways[0].kept_bytes
    points = [(whole - way.kept_bytes, way.again_s + price * way.moved_bytes) for way in ways]
    return tuple(ways[i] for i in lower_hull(points))


def useful(ways: Sequence[Way], seconds_a_byte: float) -> list[Way]:
    """In the order of `ways`, of which the first keeps everything; a byte copied takes `seconds_a_byte` at the link's rate."""
    still = [way for way in ways if not way.moved_bytes]
    corners = {*_hull(still, 0.0)}.union(*(_hull(ways, price * seconds_a_byte) for price in PRICES))
    return [way for way in ways if way in corners]


def paths(ways: Sequence[Way], number: int, seconds_a_byte: float) -> list[Path]:
    """Every family of useful Ways."""
    still = [way for way in ways if not way.moved_bytes]
    hulls = dict.fromkeys([_hull(still, 0.0), *(_hull(ways, price * seconds_a_byte) for price in PRICES)])
    numbers = [m for m in NUMBERS if m < number] + [number]
    moving = [way for way in ways if way.moved_bytes]
    plain = [Path(None, 0, hull, number) for hull in hulls]
    return plain + [Path(way, m, hull, number) for way, hull in product(moving, hulls) for m in numbers]


def arranged(choice: Choice, ways: Mapping[Policy, Way]) -> tuple[Policy, ...]:
    """A Policy for each block, in order; `ways` of the blocks between the first and the last."""
    return (*(way.policy for way in placed(choice, ways)), choice.last)


def placed(choice: Choice, ways: Mapping[Policy, Way]) -> list[Way]:
    """The same as Ways, without the last block's."""
    counts = sorted([(ways[policy], number) for policy, number in choice.counts], key=_first)
    moving: list[Way] = []
    others: list[Way] = []
    for way, number in counts:
        (moving if way.moved_bytes else others).extend([way] * number)
    if not choice.spread or not moving:
        return moving + others
    sources = {True: iter(moving), False: iter(others)}
    return [next(sources[item]) for item in _spread(len(moving), len(moving) + len(others))]


def _first(item: tuple[Way, int]) -> tuple[int, bool]:
    return item[0].kept_bytes, item[0].policy == WHOLE


@cache
def _spread(chosen: int, number: int) -> tuple[bool, ...]:
    return spread(Fraction(chosen, number), number)


def neighbours(choice: Choice, ways: Sequence[Way], lasts: Sequence[Way], *, two: bool = False) -> Iterator[Choice]:
    """Every other Choice one step away; `two`: those with two blocks changed instead."""
    steps = [(policy, way.policy) for policy, _ in choice.counts for way in ways if way.policy != policy]
    if two:
        for place, one in enumerate(steps):
            for other in steps[place:]:
                counts = _stepped(_stepped(choice.counts, one), other)
                if all(number > 0 for _, number in counts) and dict(counts) != dict(choice.counts):
                    yield replace(choice, counts=counts)
        return
    for step in steps:
        yield replace(choice, counts=_stepped(choice.counts, step))
    if any(way.moved_bytes for way in ways):
        yield replace(choice, spread=not choice.spread)
        yield from (replace(choice, depth=depth) for depth in PREFETCH_DEPTHS if depth != choice.depth)
    yield from (replace(choice, last=last.policy) for last in lasts if last.policy != choice.last)


def _stepped(counts: Counts, step: tuple[Policy, Policy]) -> Counts:
    """One block from the first Policy to the second."""
    return _merged([*counts, (step[0], -1), (step[1], 1)])
