"""Table IV of the Vchitect-2.0 paper, and what the planner predicts for each of its cells. Predictions, nothing is measured.

Two A100s of one node in ZeRO-3; four shapes; `selective ratio` is the fraction of blocks that are recomputed (recomputation),
offloaded (offload), or of which 0.2 are offloaded and the rest recomputed (combination), spread evenly. What that system does
is modelled as such: blocks are plain autograd, a recomputed one keeps its input, an offloaded one moves every tensor that it
saves through pinned memory that torch's caching host allocator rounds up to powers of two, one block is fetched ahead.
The table does not say its batch, so one factor over the whole table is fitted, by least squares of logarithms; nothing else is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.model import Outcome, StepModel
from vchitect_fast.autotune.ways import Way
from vchitect_fast.cluster import Cluster, Link
from vchitect_fast.offload.policy import spread
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Policy
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import DTYPE_BYTES, SAVED_JOINT, SAVED_TEXT, SAVED_TEXT_LAST, SAVED_VISUAL, Workload

SOURCE = "Vchitect-2.0: Parallel Transformer for Scaling Up Video Diffusion Models, Table IV"
CLUSTER = "8xa100-80g-infiniband"
CONFIG, NUM_TEXT_TOKENS, DTYPE = preset("vchitect-2b"), 333, "bfloat16"
NUM_DEVICES = 2
HOST_LINKS = ("device_to_host", "host_to_device")
BASELINE, RECOMPUTATION, OFFLOADING, COMBINATION = STRATEGIES = (
    "baseline",
    "recomputation",
    "offload",
    "combination",
)
OUT_OF_MEMORY, BREAKS_DOWN = "OOM", "breaks down"
AT_ONCE = 1e18  # bytes/s of a link that takes no time
OFFLOADED_WITH = 0.2  # of the blocks, in the combination
NUM_MICROBATCHES = 16  # of one sample, in the predicted step; the fitted factor scales that to the paper's
HIDDEN = 1.02  # an offload is hidden as long as the step takes at most so many times as long as one without
EVERYTHING = Policy(OFFLOAD, OFFLOAD, OFFLOAD, OFFLOAD, OFFLOAD)


@dataclass(frozen=True)
class Row:
    """One row as printed: seconds of an iteration, or what happened instead."""

    shape: str
    ratio: float
    cells: tuple[float | str, ...]  # in the order of STRATEGIES


TABLE = (
    Row("32x256x256", 0.2, (15.7, 14.2, 13.6, 13.6)),
    Row("32x512x384", 0.5, (OUT_OF_MEMORY, 26.6, 58.4, 25.7)),
    Row("32x1024x768", 1.0, (OUT_OF_MEMORY, 67.5, BREAKS_DOWN, 65.3)),
    Row("128x256x256", 0.8, (OUT_OF_MEMORY, 31.2, 130.8, 30.3)),
)


@dataclass(frozen=True)
class Run:
    """One predicted step of NUM_MICROBATCHES microbatches.

    outcome   by the planner's model: this project's runtime, which fetches one offloading block ahead
    least     the same where what leaves is gone at once
    failure   OUT_OF_MEMORY | BREAKS_DOWN | "" where it runs
    """

    outcome: Outcome
    least: Outcome
    failure: str

    @property
    def simulated_s(self) -> float:
        """Seconds under this project's rules, whether it fits or not."""
        return self.outcome.cost.step_s - self.outcome.cost.pressure_s + self.least.cost.pressure_s

    @property
    def hidden_s(self) -> float:
        """Seconds where copies hide perfectly: the longer of what is computed and of what is copied."""
        cost, line = self.outcome.cost, self.outcome.timeline
        return max(
            self.simulated_s - cost.copy_s, self.outcome.layout.accumulation * (line.busy_s("out") + line.busy_s("in"))
        )


@dataclass(frozen=True)
class Cell:
    """One cell of the table, predicted."""

    shape: str
    strategy: str
    paper: float | str
    run: Run
    knee: float  # of its shape

    @property
    def step_s(self) -> float | None:
        """Predicted seconds; None where it does not run."""
        return None if self.run.failure else self.run.hidden_s

    @property
    def simulated_s(self) -> float | None:
        """Predicted seconds under this project's runtime; None where it does not run."""
        return None if self.run.failure else self.run.simulated_s

    @property
    def agrees(self) -> bool:
        """Both run, or both fail in the same way."""
        return self.run.failure == (self.paper if isinstance(self.paper, str) else "")


def predict(cluster: Cluster) -> list[Cell]:
    """Every cell, row by row."""
    found = []
    for row in TABLE:
        case = Case.of(cluster, VideoShape.parse(row.shape)[0])
        hidden = knee(case)
        for strategy, paper in zip(STRATEGIES, row.cells, strict=True):
            found.append(Cell(row.shape, strategy, paper, case.run(*fractions(strategy, row.ratio)), hidden))
    return found


def fractions(strategy: str, ratio: float) -> tuple[float, float]:
    """Of the blocks: recomputed, offloaded."""
    offloaded = {OFFLOADING: ratio, COMBINATION: min(ratio, OFFLOADED_WITH)}.get(strategy, 0.0)
    return {RECOMPUTATION: ratio, COMBINATION: ratio - offloaded}.get(strategy, 0.0), offloaded


@dataclass(frozen=True)
class Case:
    """One shape on the paper's devices: the model of its step, and the one where what leaves is gone at once."""

    model: StepModel
    patient: StepModel
    layout: Layout

    @classmethod
    def of(cls, cluster: Cluster, shape: VideoShape) -> Case:
        """Two devices that share the parameters; microbatches of one sample."""
        job = part_of_node(cluster, NUM_DEVICES)
        at_once = replace(job, links=tuple(_at(AT_ONCE, x) if x.name == "device_to_host" else x for x in job.links))
        whole = cluster.device.memory_bytes  # a step runs out of memory at the end of it, not at the planner's margin
        samples = NUM_DEVICES * NUM_MICROBATCHES
        model, patient = (
            StepModel(Problem(on, CONFIG, shape, samples, NUM_TEXT_TOKENS, DTYPE, NUM_DEVICES), whole)
            for on in (job, at_once)
        )
        return cls(model, patient, Layout(dp_shard=NUM_DEVICES, accumulation=NUM_MICROBATCHES))

    def run(self, recomputed: float, offloaded: float) -> Run:
        """For two fractions of the blocks."""
        ways = [self._way(*item) for item in enumerate(choose(CONFIG.num_layers, recomputed, offloaded))]
        outcome, least = self.model.simulate(self.layout, ways), self.patient.simulate(self.layout, ways)
        limits, failure = self.model.limits(), ""
        if least.memory.peak_bytes > limits.device_bytes:
            failure = OUT_OF_MEMORY
        elif limits.host_bytes is not None and outcome.host_bytes > limits.host_bytes:
            failure = BREAKS_DOWN
        return Run(outcome, least, failure)

    def _way(self, block: int, action: str) -> Way:
        if action == RECOMPUTE:
            return self.model.way(self.layout, Policy.recompute(), block)
        keep = self.model.way(self.layout, Policy.keep(), block)
        if action == KEEP:
            return keep
        work = self.model.problem.workload(self.layout)
        return offload_all(work, keep, last=block == CONFIG.num_layers - 1)


def part_of_node(cluster: Cluster, num_devices: int) -> Cluster:
    """What a job on some devices of one node has: their share of its memory, and host links as they are while in use."""
    share = num_devices / cluster.num_devices_per_node
    return replace(
        cluster,
        num_nodes=1,
        num_devices_per_node=num_devices,
        host_memory_bytes=int(share * cluster.host_memory_bytes),
        links=tuple(_at(busy_rate(x, share), x) if x.name in HOST_LINKS else x for x in cluster.links),
    )


def busy_rate(link: Link, share: float) -> float:
    """Bytes/s of one device while both ways are in use, and the others of its job, a `share` of its node, copy as well."""
    together = link.together_bytes_per_s
    rates = (link.bytes_per_s, link.both_ways_bytes_per_s, together and together / share)
    return min(rate for rate in rates if rate)


def _at(rate: float, link: Link) -> Link:
    """The link at one rate, whatever else uses it."""
    return replace(link, bytes_per_s=rate, both_ways_bytes_per_s=None, together_bytes_per_s=None, points=())


def choose(num_blocks: int, recomputed: float, offloaded: float) -> list[str]:
    """What each block does, for two fractions: the offloaded spread over all, the recomputed over those that are left."""
    actions = [OFFLOAD if moves else KEEP for moves in spread(offloaded, num_blocks)]
    rest = [block for block, action in enumerate(actions) if action == KEEP]
    repeats = spread(min(1.0, recomputed * num_blocks / len(rest)), len(rest)) if rest else ()
    for block, repeat in zip(rest, repeats, strict=True):
        actions[block] = RECOMPUTE if repeat else KEEP
    return actions


def offload_all(work: Workload, keep: Way, *, last: bool = False) -> Way:
    """A block of plain autograd of which every saved tensor goes to host memory and comes back; `keep` is it unmoved."""
    pinned = sum(power_of_two(size) for size in saved_sizes(work, DTYPE_BYTES[DTYPE], last=last))
    return Way(EVERYTHING, 0.0, 0, keep.kept_bytes, pinned, keep.kept_bytes)


def saved_sizes(work: Workload, element_bytes: int, *, last: bool = False) -> Iterator[int]:
    """Bytes of each [rows, D] or [rows, 4D] tensor that a plain block saves (see workload.py); below 1 % is left out."""
    visual, text, joint = (
        element_bytes * work.config.hidden_dim * r for r in (work.visual_rows, work.text_rows, work.rows)
    )
    yield from [4 * visual] * 2 + [visual] * (SAVED_VISUAL - 8) + [joint] * SAVED_JOINT
    yield from [text] * SAVED_TEXT_LAST if last else [4 * text] * 2 + [text] * (SAVED_TEXT - 8)


def power_of_two(num_bytes: int) -> int:
    """The smallest that holds so many bytes."""
    return 1 << max(0, num_bytes - 1).bit_length()


def knee(case: Case) -> float:
    """The largest fraction of the blocks whose offload is still hidden, memory aside; in steps of one block."""

    def seconds(offloaded: float) -> float:
        run = case.run(0.0, offloaded)
        return run.hidden_s - run.least.cost.pressure_s

    base, layers = seconds(0.0), CONFIG.num_layers
    hidden = (seconds(number / layers) <= HIDDEN * base for number in range(1, layers + 1))
    return sum(itertools.takewhile(bool, hidden)) / layers
