"""StepModel: predicts the time and the memory of a step for a Layout and what every block does, by simulating its streams.

    step   = (accumulation - 1) x microbatch + last microbatch (which reduces gradients) + optimizer
    microbatch = the tasks of tasks.py run by streams.py; compute from block.py and the device's rates, copies from the host
             links, exchanges and gathers from collectives.py
    memory = memory.moments, plus at each of them the offloaded bytes that have not left yet or are back already
    pressure = GiB of the peak above Device.pressure_fraction x what giving one back and taking it again costs

A part of the step that the cluster file has no figure for is left out and named in `Outcome.left_out`; nothing is guessed.
Not included: reading and decoding data, text encoding, logging, validation, saving. Layer 0 only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vchitect_fast.autotune.block import BlockSeconds, block_parts
from vchitect_fast.autotune.codec import encode_flops
from vchitect_fast.autotune.collectives import Group, collective_seconds
from vchitect_fast.autotune.cost import StepCost, accumulation_seconds, ends_seconds, optimizer_seconds
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.memory import GIB, Moment, StepMemory, moments, parked_bytes, whole_bytes
from vchitect_fast.autotune.rates import Seconds, rates_of
from vchitect_fast.autotune.streams import Contention, Timeline, simulate
from vchitect_fast.autotune.tasks import Microbatch, Prices
from vchitect_fast.autotune.ways import Way, host_bytes, way, ways
from vchitect_fast.cluster import Link
from vchitect_fast.errors import UserError
from vchitect_fast.offload.policy import TURN_BYTES
from vchitect_fast.plan import Policy, ShardSpec
from vchitect_fast.workload import DTYPE_BYTES, Workload

SAFETY = 0.9  # of the device's memory; the rest is for what memory.py does not count
HOST_SAFETY = 0.6  # of a node's memory that may be pinned: the rest is the data loader's and the system's
REDUCE_BYTES = 4  # a gradient is reduced in fp32


@dataclass(frozen=True)
class Limits:
    """Bytes that one rank may use; None is not limited."""

    device_bytes: int  # in the terms of StepMemory.peak_bytes
    host_bytes: int | None  # pinned; on a CPU the pool is part of the device's memory


@dataclass(frozen=True)
class Outcome:
    """What is predicted of one Layout and what every block does in it."""

    layout: Layout
    ways: tuple[Way, ...]  # one a block
    cost: StepCost
    fullest: Moment
    host_bytes: int  # pinned memory of one rank
    timeline: Timeline  # of the last microbatch
    left_out: tuple[str, ...]  # what the cluster file has no figure for

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One a block."""
        return tuple(item.policy for item in self.ways)

    @property
    def memory(self) -> StepMemory:
        """At the fullest moment."""
        return self.fullest.memory


@dataclass(frozen=True)
class _Work:
    """What depends on the Layout's division of a step, not on what blocks do."""

    prices: Prices  # copies are filled in later
    whole: list[int]
    exchange_bytes: int
    row_bytes: int  # of one [rows, D]
    forward_s: float  # compute of one microbatch, nothing made again
    backward_s: float


class StepModel:
    """Predictions for one Problem; what Layouts have in common is computed once.

    limit_bytes  device memory that may be used, in the terms of a peak; SAFETY of the device's, less its context, by default

    Raises UserError for a device without rates.
    """

    def __init__(self, problem: Problem, limit_bytes: int | None = None) -> None:
        self.problem = problem
        self.device, self.config, self.dtype = problem.cluster.device, problem.config, problem.dtype
        self.rates = rates_of(self.device)
        self.calibration = problem.calibration
        if self.calibration:
            self.calibration.check(model=self.config.fingerprint(), device=self.device.fingerprint(), dtype=self.dtype)
        self._limit_bytes = limit_bytes
        self._work: dict[Layout, _Work] = {}
        self._parts: dict[tuple[Workload, bool], tuple[list[BlockSeconds], Seconds]] = {}
        self._ways: dict[tuple[Workload, ShardSpec, int], dict[Policy, Way]] = {}

    def limits(self) -> Limits:
        """Of one rank; a node's host memory is shared by its ranks."""
        cluster, cuda = self.problem.cluster, self.device.kind == "cuda"
        limit = int(SAFETY * self.device.memory_bytes) if self._limit_bytes is None else self._limit_bytes
        on_a_node = min(self.problem.num_devices, cluster.num_devices_per_node)
        host = int(HOST_SAFETY * cluster.host_memory_bytes / on_a_node) if cluster.host_memory_bytes and cuda else None
        return Limits(limit - (self.device.process_bytes or 0 if cuda else 0), host)

    def ways(self, layout: Layout) -> tuple[list[Way], list[Way], list[Way]]:
        """Every Policy's price in the first block, in those between, and in the last."""
        blocks = (0, min(1, self.config.num_layers - 1), self.config.num_layers - 1)
        work, parts = self.problem.workload(layout), self._block_parts(layout)[0]
        first, middle, last = (
            [self._calibrated(item) for item in ways(work, parts[i], i, self.dtype, self.device.kind, layout.shard)]
            for i in blocks
        )
        return first, middle, last

    def way(self, layout: Layout, policy: Policy, block: int) -> Way:
        """One Policy's price in one block."""
        work, layers = self.problem.workload(layout), self.config.num_layers
        alike = block if block in (0, layers - 1) else 1
        known = self._ways.setdefault((work, layout.shard, alike), {})
        if policy not in known:
            parts = self._block_parts(layout)[0]
            found = way(work, parts[block], policy, block, self.dtype, self.device.kind, layout.shard)
            known[policy] = self._calibrated(found)
        return known[policy]

    def _calibrated(self, found: Way) -> Way:
        """What is made again is part of the measured backward."""
        if not self.calibration:
            return found
        behind_s = (found.again_s - found.ahead_s) * self.calibration.backward / self.calibration.forward
        return replace(found, again_s=found.ahead_s + behind_s)

    def predict(self, layout: Layout, policies: Sequence[Policy]) -> Outcome:
        """Time and memory of a step; one Policy a block."""
        if len(policies) != self.config.num_layers:
            raise UserError(
                f"expected a Policy for each of {self.config.num_layers} blocks, got {len(policies)}; give one a block."
            )
        return self.simulate(layout, [self.way(layout, policy, block) for block, policy in enumerate(policies)])

    def simulate(self, layout: Layout, chosen: Sequence[Way]) -> Outcome:
        """As `predict`, for what blocks do given by its price."""
        work, left_out = self._work_of(layout), self._left_out(layout, chosen)
        prices = replace(
            work.prices,
            out_s=[self._copy_s("device_to_host", item.moved_bytes) for item in chosen],
            in_s=[self._copy_s("host_to_device", item.moved_bytes) for item in chosen],
        )
        last = Microbatch(prices, layout.shard, chosen, layout.prefetch_depth, reduces=True)
        line = simulate(last.tasks, self._contention(layout))
        reduces = any(prices.reduce_s) or prices.reduce_rest_s > 0
        other = line
        if layout.accumulation > 1 and reduces:
            earlier = Microbatch(prices, layout.shard, chosen, layout.prefetch_depth, reduces=False)
            other = simulate(earlier.tasks, self._contention(layout))
        points = self._adjusted(layout, self._memory(layout, chosen, last, line, work), line, work)
        parked = parked_bytes(self.problem.workload(layout), self.problem.parked, num_shards=layout.num_shards)
        fullest = max((moment for _, moment in points), key=lambda item: item.memory.peak_bytes)
        cost = self._cost(layout, chosen, work, line, other, fullest.memory.peak_bytes)
        memory = tuple((time_s, moment.memory.peak_bytes) for time_s, moment in points)
        timeline = replace(line, memory=memory)
        pinned = host_bytes(chosen) + sum(parked.values())
        return Outcome(layout, tuple(chosen), cost, fullest, pinned, timeline, left_out)

    def unhindered(self, layout: Layout) -> tuple[StepCost, int]:
        """A step that keeps everything while nothing waits for anything, and its peak in bytes; nothing is simulated.

        No choice for the blocks computes less, and none spares more of this peak than it keeps less (bounds.py).
        """
        chosen = [self.way(layout, Policy.keep(), block) for block in range(self.config.num_layers)]
        work, idle = self._work_of(layout), Timeline(())
        points = [(0.0, moment) for moment in self._moments(layout, chosen, work)]
        peak = max(moment.memory.peak_bytes for _, moment in self._adjusted(layout, points, idle, work))
        return self._cost(layout, chosen, work, idle, idle, peak), peak

    def _moments(self, layout: Layout, chosen: Sequence[Way], work: _Work) -> list[Moment]:
        """Without what is on its way to host memory or back."""
        return moments(
            self.problem.workload(layout), self.device, self.dtype, [item.kept_bytes for item in chosen], work.whole,
            accumulation=layout.accumulation, ema=self.problem.ema, num_shards=layout.num_shards,
            pool_bytes=host_bytes(chosen) if self.device.kind == "cpu" else 0,  # the pool is the same memory there
            exchange_bytes=work.exchange_bytes,
        )  # fmt: skip

    def _adjusted(
        self, layout: Layout, points: list[tuple[float, Moment]], line: Timeline, work: _Work
    ) -> list[tuple[float, Moment]]:
        """Without states that are parked, and as the calibration says."""
        parked = parked_bytes(self.problem.workload(layout), self.problem.parked, num_shards=layout.num_shards)
        if parked and self.device.kind != "cpu":
            points = self._away(layout, points, line, parked)
        if self.calibration:
            points = [(t, replace(m, memory=self.calibration.memory(m.memory, work.row_bytes))) for t, m in points]
        return points

    def _block_parts(self, layout: Layout) -> tuple[list[BlockSeconds], Seconds]:
        work, twice = self.problem.workload(layout), _resharded(layout)
        if (work, twice) not in self._parts:
            middle = block_parts(work, self.rates, self.dtype, text_twice=twice)
            last = block_parts(work, self.rates, self.dtype, last=True, text_twice=twice)
            ends = ends_seconds(work, self.rates, self.dtype)
            if known := self.calibration:
                middle, last = (item.scaled(known.forward, known.backward) for item in (middle, last))
                ends = Seconds(ends.forward_s * known.forward, ends.backward_s * known.backward)
            self._parts[work, twice] = [middle] * (self.config.num_layers - 1) + [last], ends
        return self._parts[work, twice]

    def _work_of(self, layout: Layout) -> _Work:
        key = replace(layout, accumulation=1, prefetch_depth=1, vae_mini_batch=1)
        if key not in self._work:
            work, size = self.problem.workload(layout), DTYPE_BYTES[self.dtype]
            volume = size * self.config.hidden_dim * work.rows  # [B, T, S + N, D], one rank's
            into = 3 * volume if layout.shard.spatial == "heads" else volume  # q, k and v, or rows
            sp, shards, replicas = (
                group(layout) for group in (self.problem.sp_group, self.problem.shard_group, self.problem.replica_group)
            )
            layers = self.config.num_layers
            sizes = [self.config.num_block_parameters(last=i == layers - 1) for i in range(layers)]
            rest = self.config.num_parameters() - sum(sizes)
            parts, ends = self._block_parts(layout)
            prices = Prices(
                parts=parts,
                ends=ends,
                exchange_in_s=self._collective_s("all_to_all", into, sp),
                exchange_out_s=self._collective_s("all_to_all", volume, sp),
                gather_s=self._collective_s("all_gather", size * sizes[0], shards),
                reduce_s=[self._reduce_s(number, shards, replicas) for number in sizes],
                reduce_rest_s=self._reduce_s(rest, shards, replicas),
                out_s=(),
                in_s=(),
            )
            exchange = 2 * into if layout.sp > 1 else 0  # packed, and arrived
            whole = whole_bytes(work, self.device, self.dtype, layout.shard)
            sums = [item.sum() for item in parts]
            forward_s = sum(item.forward_s for item in sums) + ends.forward_s
            backward_s = sum(item.backward_s for item in sums) + ends.backward_s
            self._work[key] = _Work(prices, whole, exchange, volume, forward_s, backward_s)
        return self._work[key]

    def _collective_s(self, kind: str, num_bytes: float, group: Group) -> float:
        try:
            return collective_seconds(self.problem.cluster, kind, num_bytes, group)
        except UserError:  # a link that nobody measured or declared: left out, and said
            return 0.0

    def _reduce_s(self, num_parameters: int, shards: Group, replicas: Group) -> float:
        whole = REDUCE_BYTES * num_parameters
        return self._collective_s("reduce_scatter", whole, shards) + self._collective_s(
            "all_reduce", whole / shards.num_ranks, replicas
        )

    def _link(self, name: str) -> Link | None:
        return next((link for link in self.problem.cluster.links if link.name == name), None)

    def _copy_s(self, name: str, num_bytes: int) -> float:
        link = self._link(name)
        if link is None or not num_bytes:
            return 0.0
        alone = link.seconds(num_bytes)
        together = link.together_bytes_per_s
        shared = together is not None and min(self.problem.num_devices, self.problem.cluster.num_devices_per_node) > 1
        return alone * link.bytes_per_s / together if shared and together else alone

    def _both_ways(self, name: str) -> float:
        link = self._link(name)
        return max(1.0, link.bytes_per_s / link.both_ways_bytes_per_s) if link and link.both_ways_bytes_per_s else 1.0

    def _contention(self, layout: Layout) -> Contention:
        cluster = self.problem.cluster
        sp, shards = self.problem.sp_group(layout), self.problem.shard_group(layout)
        same_links = (sp.num_nodes > 1) == (shards.num_nodes > 1)
        return Contention(
            copy=cluster.slowdown.get("copy", 1.0),
            collective=cluster.slowdown.get("collective", 1.0),
            both_out=self._both_ways("device_to_host"),
            both_in=self._both_ways("host_to_device"),
            both_collectives=2.0 if same_links else 1.0,
        )

    def _memory(
        self, layout: Layout, chosen: Sequence[Way], batch: Microbatch, line: Timeline, work: _Work
    ) -> list[tuple[float, Moment]]:
        """The moments of the microbatch, in order of time, with the offloaded bytes that are there."""
        on_cpu = self.device.kind == "cpu"
        end = [task.end_s for task in line.tasks]

        def at(place: int) -> float:
            return end[place] if place >= 0 else 0.0

        away = []  # (block, from, until) that its bytes are on the device beside the block's own forward and backward
        for block, item in enumerate(chosen):
            if item.moved_bytes and not on_cpu:
                away.append((block, at(batch.forward_end[block]), at(batch.out_task[block]), item.moved_bytes))
                back = line.tasks[batch.in_task[block]].start_s
                away.append((block, back, at(batch.backward_begin[block]), item.moved_bytes))
        points = []
        for moment in self._moments(layout, chosen, work):
            if moment.block is None:
                start = until = at(batch.forward_done)
            else:
                start, until = at(batch.backward_begin[moment.block]), at(batch.backward_end[moment.block])
            there = sum(num for own, since, till, num in away if own != moment.block and since < until and till > start)
            share = {"text MLP": 0.0, "visual MLP": 0.5, "attention": 1.0}.get(moment.phase, 0.0)
            if there:
                moment = replace(moment, memory=replace(moment.memory, in_flight_bytes=there))
            points.append((start + share * (until - start), moment))
        return points

    def _away(
        self, layout: Layout, points: list[tuple[float, Moment]], line: Timeline, parked: dict[str, int]
    ) -> list[tuple[float, Moment]]:
        """The same without parked states, and one moment more: the update, for which they come and go in turns."""
        away = sum(parked.values())
        gone = [(t, replace(m, memory=replace(m.memory, states_bytes=m.memory.states_bytes - away))) for t, m in points]
        gradients = 4 * self.config.num_parameters(layout.num_shards)
        states = gone[-1][1].memory.states_bytes + min(3 * TURN_BYTES, max(parked.values()))
        update = replace(
            gone[-1][1].memory, states_bytes=states, gradients_bytes=gradients, saved_bytes=0,
            working_bytes=0, exchange_bytes=0, in_flight_bytes=0,
        )  # fmt: skip
        return [*gone, (line.total_s, Moment("update", None, update))]

    def _cost(
        self, layout: Layout, chosen: Sequence[Way], work: _Work, line: Timeline, other: Timeline, peak_bytes: int
    ) -> StepCost:
        times, workload = layout.accumulation, self.problem.workload(layout)

        def exposed(*streams: str) -> float:
            return sum(line.exposed_s(name) + (times - 1) * other.exposed_s(name) for name in streams)

        return StepCost(
            forward_s=times * (work.forward_s + sum(item.ahead_s for item in chosen)),
            backward_s=times * work.backward_s + accumulation_seconds(workload, self.rates, self.dtype, times),
            recompute_s=times * sum(item.again_s - item.ahead_s for item in chosen),
            optimizer_s=(self.calibration.optimizer if self.calibration else 1.0)
            * optimizer_seconds(workload, self.rates, self.dtype, ema=self.problem.ema, num_shards=layout.num_shards),
            exchange_s=exposed("exchange"),
            gather_s=exposed("gather"),
            copy_s=exposed("out", "in") + self._parked_s(layout),
            encode_s=times * self._encode_s(layout),
            pressure_s=times * self._pressure_s(peak_bytes),
        )

    def _parked_s(self, layout: Layout) -> float:
        """Parked states come and go at once; the first turn comes alone, the last leaves alone. No update hides them."""
        parked = parked_bytes(self.problem.workload(layout), self.problem.parked, num_shards=layout.num_shards)
        ways = ("host_to_device", "device_to_host")
        return sum(
            max(self._copy_s(name, num_bytes) * self._both_ways(name) for name in ways)
            * (1 + 1 / -(-num_bytes // TURN_BYTES))
            for num_bytes in parked.values()
        )

    def _encode_s(self, layout: Layout) -> float:
        """The codec on this rank's frames of one microbatch: frames are independent, each rank encodes its own."""
        rate = self.problem.cluster.codec_flops
        if not self.problem.encode or not rate:
            return 0.0
        frames = math.ceil(self.problem.shape.num_frames / layout.sp)
        return layout.microbatch * encode_flops(replace(self.problem.shape, num_frames=frames)) / rate

    def _pressure_s(self, peak_bytes: int) -> float:
        fraction, cost = self.device.pressure_fraction, self.device.remap_s_per_gib
        if fraction is None or cost is None:
            return 0.0
        used = peak_bytes + (self.device.process_bytes or 0 if self.device.kind == "cuda" else 0)
        return max(0.0, used - fraction * self.device.memory_bytes) / GIB * cost

    def _left_out(self, layout: Layout, chosen: Sequence[Way]) -> tuple[str, ...]:
        sp, shards, replicas = (
            group(layout) for group in (self.problem.sp_group, self.problem.shard_group, self.problem.replica_group)
        )
        found = []
        names = {link.name for link in self.problem.cluster.links}
        moves = any(item.moved_bytes for item in chosen) or self.problem.parked
        if moves and not {"device_to_host", "host_to_device"} <= names:
            found.append("copies to host memory")
        for what, group in (
            ("exchanges", sp),
            ("gathered parameters and reduced gradients", shards),
            ("reduced gradients", replicas),
        ):
            lacks_inside = group.num_ranks > group.num_nodes and "intra_node" not in names
            if group.num_ranks > 1 and (lacks_inside or (group.num_nodes > 1 and "inter_node" not in names)):
                found.append(what)
        if self.problem.encode and not self.problem.cluster.codec_flops:
            found.append("encoding")
        return tuple(found)


def _resharded(layout: Layout) -> bool:
    """Whether rows are resharded, so that each rank projects the text of two cuts."""
    return layout.sp > 1 and layout.shard.spatial != "heads"
