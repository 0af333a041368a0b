"""The tasks of one microbatch: what each stream does in forward and backward, and what waits for what.

    forward of a block     gathered parameters -> compute, cut where its exchanges are; then its offloaded bytes leave
    backward of a block    gathered parameters, bytes that came back -> what is made again -> compute; gradients reduced

What the runtime does, followed here (docs/design.md, "Sequence", "Offload"; parallel/shard.py): with frames cut, the first
exchange runs behind the spatial branch, in backward the last; with tokens cut, compute waits for both. The parameters of one
block are gathered ahead. When backward reaches the blocks the first `prefetch_depth` offloading ones are fetched; one that is asked for fetches
its own bytes and those of as many more. Gradients are reduced in the last microbatch alone. Seconds come from StepModel; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vchitect_fast.autotune.block import BlockSeconds
from vchitect_fast.autotune.rates import Seconds
from vchitect_fast.autotune.streams import COMPUTE, EXCHANGE, GATHER, IN, OUT, Task
from vchitect_fast.autotune.ways import Way
from vchitect_fast.plan import RECOMPUTE, ShardSpec


@dataclass(frozen=True)
class Prices:
    """Seconds of everything that one microbatch does, on one rank; lists have one item a block."""

    parts: Sequence[BlockSeconds]
    ends: Seconds  # around the blocks: embedding, output, loss
    exchange_in_s: float  # one all-to-all into the branch that reshards, and one back
    exchange_out_s: float
    gather_s: float  # parameters of one block
    reduce_s: Sequence[float]  # gradients of one block, shards and replicas
    reduce_rest_s: float  # of what is outside the blocks
    out_s: Sequence[float]  # copies of what the block offloads
    in_s: Sequence[float]


@dataclass
class Microbatch:
    """Builds the list of tasks; `forward_end` and the others are places of tasks in it, by block."""

    prices: Prices
    shard: ShardSpec
    chosen: Sequence[Way]
    prefetch_depth: int
    reduces: bool  # the last microbatch of a step

    def __post_init__(self) -> None:
        self.tasks: list[Task] = []
        self._known: dict[int, dict[str, Seconds]] = {}
        layers = len(self.chosen)
        self.forward_end, self.backward_begin, self.backward_end = ([-1] * layers for _ in range(3))
        self.out_task, self.in_task, self._gathered = ([-1] * layers for _ in range(3))
        self.last_compute = -1  # of the tasks so far
        for block in range(layers):
            self._forward(block)
        self.forward_done = self._compute("ends", self.prices.ends.forward_s, None)
        self._gathered[-1] = self._gather(layers - 1, self.forward_done)
        self._compute("ends", self.prices.ends.backward_s, None)
        moving = [block for block in reversed(range(layers)) if self.chosen[block].moved_bytes]
        fetched = min(self.prefetch_depth, len(moving))  # when backward reaches the last block
        for other in moving[:fetched]:
            self._fetch(other)
        for block in reversed(range(layers)):
            if self.chosen[block].moved_bytes:  # asked for: itself, then those that come next
                until = moving.index(block) + 1 + self.prefetch_depth
                for other in moving[fetched:until]:
                    self._fetch(other)
                fetched = max(fetched, until)
            self._backward(block)
        if self.reduces and self.prices.reduce_rest_s:
            self._add("reduce", GATHER, self.prices.reduce_rest_s, (self.last_compute,))

    def _add(self, name: str, stream: int, seconds: float, after: Sequence[int], block: int | None = None) -> int:
        waits = tuple(place for place in after if place >= 0)
        self.tasks.append(Task(name, stream, seconds, waits, block))
        return len(self.tasks) - 1

    def _compute(self, name: str, seconds: float, block: int | None, *after: int) -> int:
        self.last_compute = self._add(name, COMPUTE, seconds, after, block)
        return self.last_compute

    def _gather(self, block: int, after: int) -> int:
        if not self.prices.gather_s:
            return -1
        return self._add("gather", GATHER, self.prices.gather_s, (after,), block)

    def _fetch(self, block: int) -> None:
        after = (self.last_compute, self.out_task[block])
        self.in_task[block] = self._add("copy in", IN, self.prices.in_s[block], after, block)

    def _forward(self, block: int) -> None:
        gathered = self._gather(block, self.forward_end[block - 2] if block > 1 else -1)
        parts = self._forward_seconds(block)
        parts["behind"] += self.chosen[block].ahead_s
        self._branches(block, "forward", parts, (gathered,), True, True)
        self.forward_end[block] = self.last_compute
        if self.chosen[block].moved_bytes:
            seconds = self.prices.out_s[block]
            self.out_task[block] = self._add("copy out", OUT, seconds, (self.last_compute,), block)

    def _forward_seconds(self, block: int) -> dict[str, float]:
        return {part: seconds.forward_s for part, seconds in self._divided(block).items()}

    def _divided(self, block: int) -> dict[str, Seconds]:
        """Seconds of each part of the division; blocks that are alike are added up once."""
        parts = self.prices.parts[block]
        if id(parts) not in self._known:
            self._known[id(parts)] = {part: self._of(parts, *names) for part, names in self._division().items()}
        return self._known[id(parts)]

    def _division(self) -> dict[str, tuple[str, ...]]:
        """Parts of BlockSeconds before the first exchange is needed, between the two, and behind the second."""
        if self.shard.axis == "frames":
            before = ("spatial_in", "text_in", "cross_in", "spatial", "cross")
            return {"before": before, "between": ("temporal_in", "temporal"), "behind": ("out", "mlp_in", "cheap")}
        rest = ("temporal_in", "cross_in", "temporal", "cross", "out", "mlp_in", "cheap")
        if self.shard.spatial == "heads":
            return {"before": ("spatial_in", "text_in"), "between": ("spatial",), "behind": rest}
        # Rows travel, and are projected where they arrive.
        return {"before": (), "between": ("spatial_in", "text_in", "spatial"), "behind": rest}

    @staticmethod
    def _of(parts: BlockSeconds, *names: str) -> Seconds:
        return parts.sum(*names) if names else Seconds(0.0, 0.0)

    def _branches(
        self, block: int, name: str, seconds: dict[str, float], after: Sequence[int], sends_in: bool, sends_out: bool
    ) -> None:
        """A forward, or a part of it again: compute cut by its two exchanges where there are ranks to exchange with."""
        ahead = self.last_compute
        if not self.prices.exchange_in_s or not (sends_in or sends_out):
            self._compute(name, sum(seconds.values()), block, *after)
            return
        arrived = returned = -1
        if self.shard.axis == "frames":  # on the way while the spatial branch is computed
            arrived = self._exchange(name, self.prices.exchange_in_s, block, ahead, *after) if sends_in else -1
            self._compute(name, seconds["before"], block, *after)
        else:
            sent = self._compute(name, seconds["before"], block, *after)
            arrived = self._exchange(name, self.prices.exchange_in_s, block, sent) if sends_in else -1
        between = self._compute(name, seconds["between"], block, arrived)
        if sends_out:
            returned = self._exchange(name, self.prices.exchange_out_s, block, between)
        self._compute(name, seconds["behind"], block, returned)

    def _exchange(self, name: str, seconds: float, block: int, *after: int) -> int:
        return self._add(f"exchange, {name}", EXCHANGE, seconds, after, block)

    def _backward(self, block: int) -> None:
        chosen = self.chosen[block]
        self.backward_begin[block] = self.last_compute
        if block:  # on its way while this block's backward runs, before this block's gradients are reduced
            self._gathered[block - 1] = self._gather(block - 1, self.last_compute)
        needs = (self._gathered[block], self.in_task[block])
        if chosen.again_s > chosen.ahead_s:
            self._again(block, chosen, needs)
        self._behind(block, needs)
        self.backward_end[block] = self.last_compute
        if self.reduces and self.prices.reduce_s[block]:
            self._add("reduce", GATHER, self.prices.reduce_s[block], (self.last_compute,), block)

    def _again(self, block: int, chosen: Way, needs: Sequence[int]) -> None:
        """What the Policy makes again; what an exchange brought is sent again only where its group is recomputed."""
        policy = chosen.policy
        sends_in, sends_out = policy.qkv == RECOMPUTE, policy.branch_out == RECOMPUTE
        seconds = self._forward_seconds(block)
        whole = sum(seconds.values())
        share = {
            part: value * (chosen.again_s - chosen.ahead_s) / whole if whole else 0.0 for part, value in seconds.items()
        }
        self._branches(block, "recompute", share, needs, sends_in, sends_out)

    def _behind(self, block: int, needs: Sequence[int]) -> None:
        """Backward is forward turned round: what came back last is sent first."""
        seconds = {part: divided.backward_s for part, divided in self._divided(block).items()}
        if not self.prices.exchange_in_s:
            self._compute("backward", sum(seconds.values()), block, *needs)
            return
        behind = self._compute("backward", seconds["behind"], block, *needs)
        arrived = self._exchange("backward", self.prices.exchange_out_s, block, behind)
        between = self._compute("backward", seconds["between"], block, arrived)
        returned = self._exchange("backward", self.prices.exchange_in_s, block, between)
        if self.shard.axis == "frames":  # the spatial branch's backward runs meanwhile; the norm waits for both
            self._compute("backward", seconds["before"], block)
            self._compute("backward", 0.0, block, returned)
        else:
            self._compute("backward", seconds["before"], block, returned)
