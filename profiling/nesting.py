"""Which of many intervals is innermost at a moment: ranges of one thread, begun inside each other.

`innermost` cuts the time into stretches with one owner each, the interval that began last among those still open; it takes
any intervals, also ones that end in the wrong order. `Innermost.at` answers for many moments at once. Knows no traces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Innermost:
    """Time in stretches: from edge k to edge k + 1 the interval `owner[k]` is innermost, -1 for none.

    edge float64 [K], ascending; owner int64 [K], the last one -1: after the last edge nothing is open.
    """

    edge: np.ndarray
    owner: np.ndarray

    def at(self, moments: np.ndarray) -> np.ndarray:
        """int64 [N], the innermost interval at each moment; one that starts at it counts, one that ends at it does not."""
        if not len(self.edge):
            return np.full(len(moments), -1, dtype=np.int64)
        place = np.searchsorted(self.edge, moments, side="right") - 1
        return np.where(place >= 0, self.owner[np.maximum(place, 0)], -1)

    def cut(self, moments: np.ndarray) -> Innermost:
        """The same with an edge at each of these moments, so that no stretch lies across one."""
        edge = np.unique(np.concatenate([self.edge, moments]))
        return Innermost(edge, self.at(edge))

    def stretches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start, end, owner) of the stretches that have an owner: what each interval does itself, without those inside."""
        if not len(self.edge):
            return np.empty(0), np.empty(0), np.empty(0, dtype=np.int64)
        start, end, owner = self.edge[:-1], self.edge[1:], self.owner[:-1]
        real = (owner >= 0) & (end > start)
        return start[real], end[real], owner[real]


def innermost(start: np.ndarray, end: np.ndarray) -> Innermost:
    """For intervals sorted by start, parents before children where starts are equal; empty ones own nothing."""
    some = np.flatnonzero(end > start)
    num = len(some)
    moments = np.concatenate([start[some], end[some]])
    # At one moment ends come before starts.
    order = np.lexsort((np.concatenate([np.ones(num), np.zeros(num)]), moments))
    edges, owners = np.empty(2 * num), np.empty(2 * num, dtype=np.int64)
    stack: list[int] = []
    is_open = [False] * num
    for place, which in enumerate(order.tolist()):
        if which < num:
            stack.append(which)
            is_open[which] = True
        else:
            is_open[which - num] = False
            while stack and not is_open[stack[-1]]:
                stack.pop()
        edges[place] = moments[which]
        owners[place] = some[stack[-1]] if stack else -1
    return Innermost(edges, owners)
