"""What every block keeps, recomputes or offloads within one Layout: the fastest that fits, found with few predictions.

    PolicySearch(model, layout, limits)     predicts "keep everything" once
        .least_s                            no choice of this layout takes less: so layouts can be left out
        .search(cutoff_s) -> Found          the best choice, if one beats the cutoff
        .polish()                           goes on from there, for the layout that is chosen

Time and memory are those of `model.predict`, which takes milliseconds; so what is worth predicting is found with a sketch.

    families  of each family of choices.py the member that just fits in the sketch; those with the best bound first
    downhill  from the best: one or two blocks changed, another order, depth of fetching or last block, as long as it helps
    predicted where that ends; if it does not fit after all, the sketch learns by how much, and goes on
    exact     where a model has few blocks, every assignment whose bound beats the best is predicted (Found.proven)

Copies that have no price (a cluster without host links) or spare nothing (a CPU's pool is the same memory) are not chosen.
Refused: nothing; where no choice fits Found.best is None. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from vchitect_fast.autotune.bounds import Bounds, Kind, dominant, fits
from vchitect_fast.autotune.choices import WHOLE, Choice, Counts, Path, arranged, neighbours, paths, placed, useful
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.sketch import Limit, Sketch
from vchitect_fast.autotune.space import PREFETCH_DEPTHS
from vchitect_fast.autotune.ways import Way
from vchitect_fast.offload.policy import offloads
from vchitect_fast.plan import Policy

if TYPE_CHECKING:
    from vchitect_fast.autotune.cost import StepCost
    from vchitect_fast.autotune.model import Limits, Outcome

NUM_ROUNDS = 6  # of making a choice leaner until it fits
DOWNHILL = 0.05  # a start that is slower than the time to beat by more than this is not followed
ALIKE = 0.02  # nor one that is slower than the best start, or at the end of the first stage, by more than this
SKETCH_ERROR = 0.01  # what is sketched above the time to beat by no more than this is predicted all the same
EXACT_LAYERS = 5  # up to so many blocks every assignment is looked at,
EXACT_NODES = 20_000  # unless there are more beginnings of assignments than this
EXACT_PREDICTIONS = 300  # or more predictions


class Model(Protocol):
    """What is asked of StepModel (model.py)."""

    problem: Problem

    def ways(self, layout: Layout) -> tuple[list[Way], list[Way], list[Way]]:
        """Of the first block, the ones between, and the last: every Policy with its price."""
        ...

    def predict(self, layout: Layout, policies: Sequence[Policy]) -> Outcome:
        """Time and memory of a step."""
        ...

    def unhindered(self, layout: Layout) -> tuple[StepCost, int]:
        """A step that keeps everything while nothing waits, and its peak in bytes."""
        ...

    def limits(self) -> Limits:
        """What one rank may use."""
        ...


@dataclass(frozen=True)
class Found:
    """The outcome of one search."""

    best: Outcome | None  # fits, and is faster than the cutoff
    leanest: Outcome  # of all that were predicted, the one with the least memory
    proven: bool  # nothing in this layout beats `best`; False: nothing better was found


class Blocks:
    """What the blocks of one Layout may do; the same for all layouts whose ranks have the same rows."""

    def __init__(self, model: Model, layout: Layout) -> None:
        cluster, layers = model.problem.cluster, model.problem.config.num_layers
        names = {link.name for link in cluster.links}
        copies = cluster.device.kind != "cpu" and {"host_to_device", "device_to_host"} <= names
        everything = model.ways(layout)
        self.way = [{way.policy: way for way in ways} for ways in everything]  # of a first, a middle, a last block
        first, self.middle, self.last = (
            dominant(_allowed(ways, copies)) for ways in everything
        )  # the first of each keeps everything
        kinds = [Kind(1, first), Kind(layers - 2, self.middle)] if layers > 1 else []
        self.kinds = [kind for kind in (*kinds, Kind(1, self.last)) if kind.number]


def _allowed(ways: Sequence[Way], copies: bool) -> list[Way]:
    found = [way for way in ways if copies or not way.moved_bytes]
    return sorted(found, key=lambda way: way.policy != WHOLE)


class PolicySearch:
    """One Layout of one Problem. `fixed`, a Policy a block, leaves nothing but the depth of fetching to choose."""

    def __init__(
        self, model: Model, layout: Layout, limits: Limits, fixed: Sequence[Policy] | None = None,
        blocks: Callable[[], Blocks] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.layout, self.limits, self.fixed = model, layout, limits, fixed
        self.num_layers = model.problem.config.num_layers
        self._make_blocks = blocks or (lambda: Blocks(model, layout))
        self.seen: dict[tuple[int, tuple[Policy, ...]], Outcome] = {}
        self.best: Outcome | None = None
        self.cutoff_s = math.inf
        self.keep = self.predict((WHOLE,) * self.num_layers)
        self.bounds = Bounds(
            self.keep.cost, self.keep.memory.peak_bytes, layout.accumulation, lambda: self.blocks.kinds, model.problem,
            limits.device_bytes,
        )  # fmt: skip

    @cached_property
    def blocks(self) -> Blocks:
        """What the blocks may do; not needed where everything can be kept."""
        return self._make_blocks()

    @property
    def least_s(self) -> float:
        """No choice of this layout takes less; math.inf where none fits."""
        return self.bounds.keep_s if self.fixed else max(self.bounds.keep_s, self.bounds.relaxed_s)

    def search(self, cutoff_s: float = math.inf) -> Found:
        """The fastest that fits; only what beats the cutoff counts."""
        self.cutoff_s = cutoff_s
        proven = True
        if self.fixed is not None:
            for depth in PREFETCH_DEPTHS if self._moves(self.fixed) else (1,):
                self.attempt(self.fixed, depth)
        elif not self.attempt(self.keep.policies) or self.keep.cost.parts()["pressure_s"]:
            if not math.isinf(self.least_s):  # else nothing fits
                self._choose(self._sketch())
                proven = self._every()
            if self.best is None:
                for policies in self._lean():
                    self.attempt(policies)
        return Found(self.best, min(self.seen.values(), key=lambda item: item.memory.peak_bytes), proven)

    def predict(self, policies: Sequence[Policy], depth: int = 1) -> Outcome:
        """`model.predict`, once."""
        key = depth, tuple(policies)
        if key not in self.seen:
            self.seen[key] = self.model.predict(replace(self.layout, prefetch_depth=depth), key[1])
        return self.seen[key]

    def attempt(self, policies: Sequence[Policy], depth: int = 1) -> bool:
        """Predict it, and keep it where it is the best so far. Returns whether it fits."""
        outcome = self.predict(policies, depth)
        if not fits(outcome, self.limits):
            return False
        if outcome.cost.step_s < self.cutoff_s and (self.best is None or _rank(outcome) < _rank(self.best)):
            self.best = outcome
        return True

    @property
    def target_s(self) -> float:
        """What is to be beaten."""
        return self.best.cost.step_s if self.best else self.cutoff_s

    def _sketch(self) -> Sketch:
        """Taught by what keeps least."""
        device = self.model.problem.cluster.device
        limit = float(self.limits.device_bytes)
        pressed, price = math.inf, 0.0
        if device.pressure_fraction is not None and device.remap_s_per_gib is not None:
            context = (device.process_bytes or 0) if device.kind == "cuda" else 0
            pressed, price = device.pressure_fraction * device.memory_bytes - context, device.remap_s_per_gib
        whole = [way.kept_bytes for way in self._placed(Choice(((WHOLE, self.num_layers - 1),)))]
        sketch = Sketch(self.keep, Limit(limit, pressed, price), whole)
        leanest, *_ = self._lean()
        self.attempt(leanest)
        sketch.learn_rates(self.predict(leanest))
        return sketch

    def _lean(self) -> list[tuple[Policy, ...]]:
        """What keeps least: with copies, if there are any, and without, as far as these are not the same."""
        last, middle = min(self.blocks.last, key=_leanness).policy, self.blocks.middle
        kinds = (middle, [way for way in middle if not way.moved_bytes])
        each = dict.fromkeys(min(ways, key=_leanness).policy for ways in kinds)
        return [(policy,) * (self.num_layers - 1) + (last,) for policy in each]

    # Numbers of blocks

    def _choose(self, sketch: Sketch) -> None:
        """Sketch the families, go downhill from the best, and from the best of other kinds that are hardly slower."""
        ways = useful(self.blocks.middle, self.bounds.in_s)
        starts = self._starts(sketch, paths(ways, self.num_layers - 1, self.bounds.in_s))
        for seconds, start in starts:
            if seconds < min((1 + DOWNHILL) * self.target_s, (1 + ALIKE) * starts[0][0]):
                self._follow(start, sketch, ((ways, False), (self.blocks.middle, False)))

    def polish(self) -> None:
        """From the best go on with any Way; for the layout that is chosen in the end."""
        if self.best is None or self.fixed is not None or self.best is self.keep:
            return
        *before, last = self.best.policies
        counts = tuple((policy, before.count(policy)) for policy in dict.fromkeys(before))
        choice = Choice(counts, last, depth=self.best.layout.prefetch_depth)
        for start in (choice, replace(choice, spread=True)):
            if arranged(start, self.blocks.way[1]) == self.best.policies:
                ways = useful(self.blocks.middle, self.bounds.in_s)
                self._follow(start, self._sketch(), ((ways, False), (self.blocks.middle, False), (ways, True)))
                return

    def _follow(self, choice: Choice, sketch: Sketch, stages: Sequence[tuple[Sequence[Way], bool]]) -> None:
        """Downhill, and predict where that ends; if it does not fit after all, the sketch learns by how much, and goes on."""
        whole = self.blocks.middle[0]
        slopes = (way.again_s / max(1, whole.kept_bytes - way.kept_bytes) for way in self.blocks.middle)
        steep = 4 * self.bounds.times * max(slopes)

        def value(choice: Choice) -> float:
            excess, seconds = sketch.cost(self._placed(choice), choice.depth)
            return seconds + steep * excess

        for _ in range(NUM_ROUNDS):
            choice = self._downhill(choice, value, stages[:1])
            if value(choice) >= (1 + ALIKE) * self.target_s:
                return
            choice = self._downhill(choice, value, stages)
            if value(choice) >= (1 + SKETCH_ERROR) * self.target_s:
                return
            policies = arranged(choice, self.blocks.way[1])
            if (choice.depth, policies) in self.seen or self.attempt(policies, choice.depth):
                return
            sketch.learn_bytes(self.predict(policies, choice.depth))

    def _starts(self, sketch: Sketch, families: Sequence[Path]) -> list[tuple[float, Choice]]:
        """The best members of the families with copies, in both orders, and without: (seconds, Choice), the best first."""
        best: dict[tuple[bool, bool], tuple[float, Choice]] = {}
        deficits = {
            self.bounds.deficit_bytes,
            self.keep.memory.peak_bytes - int(min(sketch.limit.pressed_bytes, 2**60)),
        }
        bounded: list[tuple[float, int, Path, Counts]] = []
        for path in families:
            for deficit in deficits:
                if deficit >= self.bounds.deficit_bytes and (counts := path.counts(deficit)) is not None:
                    bounded.append((self._least(Choice(counts)), len(bounded), path, counts))
        for least_s, _, path, counts in sorted(bounded, key=lambda item: item[:2]):
            moves = any(self.blocks.way[1][policy].moved_bytes for policy, _ in counts)
            for order in (False, True) if moves else (False,):
                known_s = best[moves, order][0] if (moves, order) in best else math.inf
                if least_s >= min(known_s, self.target_s):
                    continue
                for _ in range(NUM_ROUNDS):  # leaner, until it fits
                    choice = Choice(counts, spread=order)
                    excess, seconds = sketch.cost(self._placed(choice), 1)
                    if not excess:
                        if seconds < known_s:
                            best[moves, order] = seconds, choice
                        break
                    leaner = path.counts(self._spares(choice) + excess)
                    if leaner is None or seconds >= known_s:
                        break
                    counts = leaner
        return sorted(best.values(), key=lambda item: item[0])

    def _downhill(
        self, choice: Choice, value: Callable[[Choice], float], stages: Sequence[tuple[Sequence[Way], bool]]
    ) -> Choice:
        """The best neighbour, as long as it is better; each stage, (Ways, two blocks), where those before it do not help."""
        best_s, stage = value(choice), 0
        while stage < len(stages):
            several, two = stages[stage]
            near = [
                item for item in neighbours(choice, several, self.blocks.last, two=two) if self._least(item) < best_s
            ]
            least_s, number = min(((value(item), i) for i, item in enumerate(near)), default=(math.inf, 0))
            if least_s < best_s:
                choice, best_s, stage = near[number], least_s, 0
            else:
                stage += 1
        return choice

    def _least(self, choice: Choice) -> float:
        """Seconds that it at least takes; nothing bounds what does not fit into host memory."""
        items = [(self.blocks.way[1][policy], number) for policy, number in choice.counts]
        host = self.limits.host_bytes
        if host is not None and sum(way.host_bytes * number for way, number in items) > host:
            return math.inf
        again_s = sum(way.again_s * number for way, number in items) + self.blocks.way[2][choice.last].again_s
        return self.bounds.step_s(again_s, sum(way.moved_bytes * number for way, number in items))

    def _spares(self, choice: Choice) -> int:
        """Bytes less between forward and backward than when everything is kept."""
        whole = self.blocks.way[1][WHOLE].kept_bytes
        return sum((whole - self.blocks.way[1][policy].kept_bytes) * number for policy, number in choice.counts)

    def _placed(self, choice: Choice) -> list[Way]:
        """For the sketch: the first block as one of those between."""
        return [*placed(choice, self.blocks.way[1]), self.blocks.way[2][choice.last]]

    @staticmethod
    def _moves(policies: Sequence[Policy]) -> bool:
        return any(offloads(policy) for policy in policies[:-1])  # the last block is never moved

    # Every assignment

    def _every(self) -> bool:
        """Predict every assignment whose bound beats the best, where they are few. Returns whether all were looked at."""
        if self.num_layers > EXACT_LAYERS:
            return False
        leaves = self._leaves()
        if leaves is None:
            return False
        until = len(self.seen) + EXACT_PREDICTIONS
        for least_s, _, policies in sorted(leaves):
            if least_s >= self.target_s:
                return True
            if len(self.seen) >= until:
                return False
            for depth in PREFETCH_DEPTHS if self._moves(policies) else (1,):
                self.attempt(policies, depth)
        return True

    def _leaves(self) -> list[tuple[float, int, tuple[Policy, ...]]] | None:
        """(bound, number, assignment) of all that may be better and fit; None where there are too many."""
        blocks = [kind for kind in self.blocks.kinds for _ in range(kind.number)]
        most = [max(kind.spares(way) for way in kind.ways) for kind in blocks]
        host = math.inf if self.limits.host_bytes is None else self.limits.host_bytes
        beginnings: list[tuple[float, float, float, float, tuple[Policy, ...]]] = [(0.0, 0.0, 0.0, 0.0, ())]
        for block, kind in enumerate(blocks):
            rest, found = sum(most[block + 1 :]), []
            for again_s, moved, spared, pool, policies in beginnings:
                for way in kind.ways:
                    item = (again_s + way.again_s, moved + way.moved_bytes, spared + kind.spares(way))
                    if item[2] + rest < self.bounds.deficit_bytes or pool + way.host_bytes > host:
                        continue
                    if self.bounds.step_s(item[0], item[1]) < self.target_s:
                        found.append((*item, pool + way.host_bytes, (*policies, way.policy)))
            beginnings = found
            if len(beginnings) > EXACT_NODES:
                return None
        return [(self.bounds.step_s(item[0], item[1]), number, item[4]) for number, item in enumerate(beginnings)]


def _leanness(way: Way) -> tuple[int, int, float]:
    return way.kept_bytes, way.moved_bytes, way.again_s


def _rank(outcome: Outcome) -> tuple[float, int]:
    return outcome.cost.step_s, outcome.memory.peak_bytes
