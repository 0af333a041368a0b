"""In which order backward asks for what forward moved, learnt from the first backward, and what to fetch ahead of it.

    Pass     one forward: its bundles (what one block moved) in the order they were made, and those that backward has used
    Orders   the order of use of every kind of Pass seen so far; until one is learnt, the reverse of forward is assumed

A Pass belongs to one forward, so several forwards before a backward do not mix, nor do two models, and a forward without
gradients moves nothing and teaches nothing. A wrong guess costs time, never a value: what was not fetched ahead is fetched
when it is asked for. No tensors here, and nothing of streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from vchitect_fast.offload.engine import Entry

MAX_LEARNT = 64  # kinds of Pass; a run has one a VideoShape and Policy


@dataclass
class Bundle:
    """What is fetched together: the entries that one block moved. Held weakly, the graph owns them."""

    key: Hashable
    entries: list[weakref.ref[Entry]] = field(default_factory=list)
    num_bytes: int = 0
    fetched: bool = False


class Orders:
    """Learnt orders by kind of Pass: the keys and bytes of its bundles."""

    def __init__(self) -> None:
        self._learnt: dict[Hashable, tuple[int, ...]] = {}
        self.num_ahead = self.num_late = 0  # bundles that had been fetched, or not, when backward asked for them

    def of(self, kind: Hashable, num_bundles: int) -> tuple[int, ...]:
        """Positions of bundles in the order of use."""
        return self._learnt.get(kind, tuple(reversed(range(num_bundles))))

    def learn(self, kind: Hashable, used: tuple[int, ...]) -> None:
        """Remember the first complete order of a kind."""
        if kind not in self._learnt and len(self._learnt) < MAX_LEARNT:
            self._learnt[kind] = used

    def __len__(self) -> int:
        return len(self._learnt)


class Pass:
    """The bundles of one forward. `fetch` starts the copy back of an entry; `depth` bundles are fetched ahead of use."""

    def __init__(self, orders: Orders, fetch: Callable[[Entry], None], depth: int) -> None:
        self._orders, self._fetch, self._depth = orders, fetch, depth
        self.bundles: list[Bundle] = []
        self._used: dict[int, None] = {}  # in order
        self._order: tuple[int, ...] = ()  # expected, and where each bundle stands in it
        self._place: dict[int, int] = {}

    def add(self, key: Hashable, entry: Entry) -> int:
        """Put an entry into the bundle of `key`, which must be the newest or new. Returns the bundle's position."""
        if not self.bundles or self.bundles[-1].key != key:
            self.bundles.append(Bundle(key))
        bundle = self.bundles[-1]
        if not any(known() is entry for known in bundle.entries):
            bundle.entries.append(weakref.ref(entry))
            bundle.num_bytes += entry.num_bytes
        return len(self.bundles) - 1

    @property
    def kind(self) -> Hashable:
        """What an order is learnt for."""
        return tuple((bundle.key, bundle.num_bytes) for bundle in self.bundles)

    def begin(self) -> None:
        """Backward begins: fetch the first `depth` bundles, behind the blocks that come before them."""
        self._expect()
        for position in self._order[: self._depth]:
            self._bring(position)

    def _expect(self) -> None:
        if len(self._order) != len(self.bundles):  # the first time, as a rule
            self._order = self._orders.of(self.kind, len(self.bundles))
            self._place = {bundle: place for place, bundle in enumerate(self._order)}

    def use(self, position: int) -> None:
        """Backward asks for a bundle: fetch what is left of it, then those that come next."""
        if position in self._used:
            return
        self._used[position] = None
        if self.bundles[position].fetched:
            self._orders.num_ahead += 1
        else:
            self._orders.num_late += 1
        self._expect()
        self._bring(position)
        num_ahead = 0
        for place in range(self._place.get(position, len(self._order)) + 1, len(self._order)):
            if num_ahead == self._depth:
                break
            if self._order[place] not in self._used:
                self._bring(self._order[place])
                num_ahead += 1
        if len(self._used) == len(self.bundles):
            self._orders.learn(self.kind, tuple(self._used))

    def _bring(self, position: int) -> None:
        bundle = self.bundles[position]
        if not bundle.fetched:
            bundle.fetched = True
            for reference in bundle.entries:
                if (entry := reference()) is not None:
                    self._fetch(entry)
