"""What an analysis says, as frozen dataclasses: the contract between what computes (`analysis.py`) and what shows it.

All times are microseconds, on the device's clock of one trace. A share is 0 to 1, None where there is nothing to share.
Nothing is computed here but sums; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the time of a device goes into. The first four are compute; what overlaps with them is hidden.
GEMM, ATTENTION, ELEMENTWISE, OTHER = "gemm", "attention", "elementwise", "other"
COPY, COLLECTIVE, IDLE = "copy", "collective", "idle"
COMPUTE = (GEMM, ATTENTION, ELEMENTWISE, OTHER)
CLASSES = (*COMPUTE, COPY, COLLECTIVE)  # of kernels; IDLE beside them is the time when none runs

# What can be hidden behind compute: collectives, and copies by direction (device to host, host to device, within).
STREAMS = ("collective", "copy_out", "copy_in", "copy_within")

# Why the device was idle, that is, why the CPU was late with what came next: it was busy launching; it had waited for the
# device to finish and only then went on; it was in a data span. ELSEWHERE: it did something else, or was not late at all
# (the launch itself takes microseconds; the work may wait for another stream). Without a GPU: DATA or ELSEWHERE.
LAUNCHING, SYNCHRONIZING, DATA, ELSEWHERE = "launching", "synchronizing", "data", "elsewhere"
CAUSES = (LAUNCHING, SYNCHRONIZING, DATA, ELSEWHERE)

NO_SPAN = "(no span)"


@dataclass(frozen=True)
class SpanTime:
    """One span's name in one step: `kind/name`, or any name of another program's."""

    name: str
    kind: str  # what stands before the slash when it is one of the span kinds, else ""
    num_calls: int  # 0 for backward/x that was led back to the ops of forward/x: it has no range of its own
    cpu_us: float  # on the CPU, from its begin to its end, summed over calls, spans inside it included
    device_us: float  # of device work launched in it and in no span inside it, summed over streams
    by_class_us: dict[str, float]  # device_us by kernel class


@dataclass(frozen=True)
class Stretch:
    """A stretch of time in which the device waited for the CPU's launches, small kernels in between included."""

    start_us: float
    dur_us: float
    idle_us: float  # of dur_us
    num_kernels: int  # launched one by one in it
    span: str  # in which most of them were launched


@dataclass(frozen=True)
class StepAnalysis:
    """Where the time of one step of one rank went.

    A step begins when the CPU begins it or when the device has done the steps before, whichever is later, so that
    steps do not overlap. compute_us + exposed_any_us + idle_us = wall_us.
    """

    step: int
    start_us: float
    wall_us: float
    compute_us: float  # at least one compute kernel runs
    exposed_any_us: float  # no compute, but a collective or a copy runs
    idle_us: float  # nothing runs
    by_span: tuple[SpanTime, ...]  # longest device_us first
    by_class_us: dict[str, float]  # CLASSES and IDLE; sums over streams, so that together they may exceed wall_us
    stream_us: dict[str, float]  # STREAMS: time when at least one of the kind runs
    exposed_us: dict[str, float]  # STREAMS: of that, without compute beside it
    overlap: dict[str, float | None]  # STREAMS: share hidden behind compute
    idle_by_cause_us: dict[str, float]  # CAUSES, together idle_us
    launch_bound: tuple[Stretch, ...]  # longest first
    coverage: float  # share of the step's time on its CPU thread that spans inside it cover
    attributed: float | None  # share of device time whose span is known
    num_device_allocations: int  # cudaMalloc and the like: none in a step that has settled
    num_allocator_retries: int  # allocations that first gave cached memory back
    allocator_us: float = 0.0  # of the CPU, in the calls that take memory from the driver and give it back


@dataclass(frozen=True)
class OpTime:
    """One op with one set of input shapes, over all steps of a rank; a kernel of which no op is known, under its own name."""

    name: str
    kernel_class: str
    shapes: str  # "4096x1536 1536x1536", "" where not recorded
    dtype: str  # "bfloat16", "" where not recorded
    num_calls: int
    device_us: float
    flops: float | None  # of all calls, from the shapes; None where no rule knows the op
    num_bytes: float | None  # read and written by all calls, each input and output once; moved, of a copy
    flops_per_s: float | None
    bytes_per_s: float | None
    roof_share: float | None  # of what the measured peaks allow at this intensity; None where not measured


@dataclass(frozen=True)
class Roof:
    """The measured ceilings of a device; None where not measured."""

    device_name: str
    matmul_flops: dict[str, float]  # FLOP/s by dtype
    memory_bytes_per_s: float | None
    source: str


@dataclass(frozen=True)
class RankAnalysis:
    """One trace."""

    rank: int | None
    source: str
    tool: str  # "torch" | "nsys"
    on_device: bool | None  # False: the CPU's threads are the device and its ops the kernels; None: spans alone, no ops
    steps: tuple[StepAnalysis, ...]
    ops: tuple[OpTime, ...]  # longest device_us first, at most 200
    notes: tuple[str, ...]  # what could not be said of this trace, and why


@dataclass(frozen=True)
class Imbalance:
    """Ranks side by side over the steps that all of them have.

    A rank's own time is its step without exposed collectives: in those it waits for others, which evens out the steps.
    """

    num_steps: int
    own_us: dict[str, float]  # rank -> median own time a step; ranks as text, files where a rank is not known
    straggler: str  # with the most own time
    ratio: float  # its own time / the mean - 1: what the others wait for, as a share
    explained: str  # the span, or "idle", that is most above the mean of the ranks; "" where none is


@dataclass(frozen=True)
class Finding:
    """One sentence that says what costs time, and one that says what to change."""

    text: str
    remedy: str
    setting: str  # field of a Plan or a TrainConfig, or an option; "" where no setting is concerned
    cost_us: float  # a step: what it costs at most


@dataclass(frozen=True)
class Analysis:
    """One run: its ranks, what they say together, and what to do first."""

    ranks: tuple[RankAnalysis, ...]
    roof: Roof | None
    imbalance: Imbalance | None  # of two ranks or more
    findings: tuple[Finding, ...]  # costliest first
