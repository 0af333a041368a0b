"""What costs time in a step, costliest first, each with what to change: a table of rules over the facts of an analysis.

A rule measures microseconds a step, the median over a rank's steps, and speaks when they are a share of the step that is
worth the change; of several ranks the worst speaks. `cost_us` is what the cause costs at most: hiding one thing may expose
another, so costs do not add up. Settings are fields of TrainConfig, of a Plan or of its entries; advice without one is for
the program. Nothing is said about what was not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from vchitect_fast.profiling.facts import (
    ATTENTION,
    COLLECTIVE,
    DATA,
    ELEMENTWISE,
    ELSEWHERE,
    GEMM,
    LAUNCHING,
    SYNCHRONIZING,
    Finding,
    Imbalance,
    OpTime,
    RankAnalysis,
    Roof,
    StepAnalysis,
)

LOW_ROOF = 0.5  # of the roof: below it an op is worth a look
SLOW_OP = 0.05  # of the step that such an op must take
STRAGGLER = 0.03  # above the mean of the ranks
MAX_SLOW_OPS = 3


@dataclass(frozen=True)
class Rule:
    """One cause. In `text` {ms} and {share} stand for its cost, {detail} for what the rule adds."""

    cost_us: Callable[[StepAnalysis], float]
    least: float  # share of the step from which on the rule speaks
    text: str
    remedy: str
    setting: str = ""
    on_device: bool | None = None  # only with a GPU, only without, or both
    detail: Callable[[RankAnalysis], str] = lambda rank: ""


def find(ranks: Sequence[RankAnalysis], roof: Roof | None, imbalance: Imbalance | None) -> tuple[Finding, ...]:
    """All that reach their thresholds, costliest first."""
    found = [finding for rule in RULES if (finding := _apply(rule, ranks)) is not None]
    if ranks and ranks[0].steps:
        found += _slow_ops(ranks[0], roof)
    if imbalance is not None and imbalance.ratio >= STRAGGLER:
        others = mean(imbalance.own_us.values())
        where = f", most of it in {imbalance.explained}" if imbalance.explained else ""
        found.append(
            Finding(
                f"Rank {imbalance.straggler} works {100 * imbalance.ratio:.1f} % longer than the mean of the ranks{where}; the others wait for it.",
                "look at that rank's device (clocks, temperature, other programs) and at what it alone does.",
                "",
                imbalance.own_us[imbalance.straggler] - others,
            )
        )
    return tuple(sorted(found, key=lambda finding: -finding.cost_us))


def rank_names(ranks: Sequence[RankAnalysis]) -> list[str]:
    """The number of each rank, or its file where the number is not known, told apart where two files have one name."""
    names: list[str] = []
    for rank in ranks:
        name = rank.source if rank.rank is None else str(rank.rank)
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def _apply(rule: Rule, ranks: Sequence[RankAnalysis]) -> Finding | None:
    worst: tuple[float, float, RankAnalysis, str] | None = None
    for rank, name in zip(ranks, rank_names(ranks), strict=True):
        if not rank.steps or rule.on_device not in (None, rank.on_device):
            continue
        cost = median(rule.cost_us(step) for step in rank.steps)
        wall = median(step.wall_us for step in rank.steps)
        if wall and cost / wall >= rule.least and cost > 0 and (worst is None or cost > worst[0]):
            worst = cost, wall, rank, name
    if worst is None:
        return None
    cost, wall, rank, name = worst
    text = rule.text.format(ms=f"{cost / 1000:.2f} ms", share=f"{100 * cost / wall:.0f} %", detail=rule.detail(rank))
    return Finding(text if len(ranks) == 1 else f"Rank {name}: {text}", rule.remedy, rule.setting, cost)


def _in_spans(kind: str) -> Callable[[StepAnalysis], float]:
    return lambda step: sum(span.device_us for span in step.by_span if span.kind == kind)


def _exposed(stream: str) -> Callable[[StepAnalysis], float]:
    return lambda step: step.exposed_us[stream]


def _idle(cause: str) -> Callable[[StepAnalysis], float]:
    return lambda step: step.idle_by_cause_us[cause]


def _hidden(stream: str) -> Callable[[RankAnalysis], str]:
    """How much of a stream is hidden already."""

    def detail(rank: RankAnalysis) -> str:
        shares = [share for step in rank.steps if (share := step.overlap[stream]) is not None]
        return f"{100 * median(shares):.0f} %" if shares else "nothing"

    return detail


def _longest_stretch(rank: RankAnalysis) -> str:
    stretches = [stretch for step in rank.steps for stretch in step.launch_bound]
    if not stretches:
        return ""
    worst = max(stretches, key=lambda stretch: stretch.idle_us)
    return f"; the longest stretch is {worst.dur_us / 1000:.2f} ms with {worst.num_kernels} kernels, in {worst.span}"


def _retries(rank: RankAnalysis) -> str:
    return f"{median(step.num_allocator_retries for step in rank.steps):g} times"


def _allocations(rank: RankAnalysis) -> str:
    return f"{median(step.num_device_allocations for step in rank.steps):g} times"


RULES: tuple[Rule, ...] = (
    Rule(
        _idle(DATA), 0.02, "The device waits {ms} a step ({share}) for data.",
        "set cache, so that latents and texts are computed once and then read; if it is set, keep it on a faster disk.", "cache",
    ),
    Rule(
        _in_spans("encode"), 0.05, "Encoding videos and texts takes {ms} a step ({share}).",
        "set cache, so that latents and texts are computed once and then read.", "cache",
    ),
    Rule(
        _idle(LAUNCHING), 0.02, "The CPU launches more slowly than the device works: {ms} a step ({share}) idle{detail}.",
        "give each launch more to do: a larger microbatch, fused kernels, or a compiled block.", "microbatch",
        on_device=True, detail=_longest_stretch,
    ),
    Rule(
        _idle(SYNCHRONIZING), 0.02, "The CPU waits for the device to finish and only then goes on: {ms} a step ({share}) idle.",
        "read no value back in the step (.item(), .cpu(), printing a tensor), or read it a step later.", on_device=True,
    ),
    Rule(
        _idle(ELSEWHERE), 0.05,
        "The device is idle for {ms} a step ({share}) while the CPU neither launches, waits for it nor is in a data span.",
        "open spans around what the program does there, or record with_stack=True, and look at the timeline.", on_device=True,
    ),
    Rule(
        lambda step: step.idle_us - step.idle_by_cause_us[DATA], 0.10,
        "Between ops, in the interpreter, pass {ms} a step ({share}).",
        "give each op more to do: a larger microbatch.", "microbatch", on_device=False,
    ),
    Rule(
        _exposed("copy_out"), 0.01, "Copies to main memory are not hidden for {ms} a step ({share}); {detail} of their time is.",
        "offload less: plan again with `vchitect-fast autotune`, or recompute more groups in the Plan's policy.", "policy",
        detail=_hidden("copy_out"),
    ),
    Rule(
        _exposed("copy_in"), 0.01, "Copies back to the device are not hidden for {ms} a step ({share}); {detail} of their time is.",
        "offload less: plan again with `vchitect-fast autotune`, or recompute more groups in the Plan's policy.", "policy",
        detail=_hidden("copy_in"),
    ),
    Rule(
        _exposed("copy_within"), 0.03, "Copies and memory sets within the device take {ms} a step ({share}) for themselves.",
        "avoid them in the program: write into the buffer that is read, and fill none that is overwritten.", on_device=True,
    ),
    Rule(
        _exposed(COLLECTIVE), 0.02, "Collectives are not hidden for {ms} a step ({share}); {detail} of their time is.",
        "cut over fewer ranks, or keep the ranks that exchange most within a node: the Plan's mesh.", "mesh",
        detail=_hidden("collective"),
    ),
    Rule(
        _in_spans("recompute"), 0.05, "Recomputing activations takes {ms} a step ({share}).",
        "if memory is left (`vchitect-fast memory`), keep or offload more groups in the Plan's policy.", "policy",
    ),
    Rule(
        _in_spans("optimizer"), 0.15, "The optimizer takes {ms} a step ({share}).",
        "if a larger batch suits the run, raise accumulation: the optimizer then steps less often.", "accumulation",
    ),
    Rule(
        lambda step: step.by_class_us[ELEMENTWISE], 0.25, "Elementwise and reduction kernels take {ms} a step ({share}).",
        "fuse them: the hand-written block (model.set_kernels), a fused optimizer, or torch.compile.", on_device=True,
    ),
    Rule(
        lambda step: step.allocator_us if step.num_allocator_retries else 0.0, 0.0,
        "Memory is short: {detail} a step the allocator gave its cache back to the driver before it got more, {ms} ({share}).",
        "lower the peak: more num_chunks or a smaller microbatch; or set PYTORCH_ALLOC_CONF=expandable_segments:True.",
        "num_chunks", on_device=True, detail=_retries,
    ),
    Rule(
        lambda step: step.allocator_us if step.num_device_allocations and not step.num_allocator_retries else 0.0, 0.0,
        "Memory is taken from the driver {detail} a step, {ms} ({share}): the step has not settled.",
        "record later steps; if it stays, sizes change from step to step: set PYTORCH_ALLOC_CONF=expandable_segments:True.",
        on_device=True, detail=_allocations,
    ),
)  # fmt: skip


def _slow_ops(rank: RankAnalysis, roof: Roof | None) -> list[Finding]:
    """Products in float32 where a shorter type is measured faster, and long ops far below the roof."""
    num_steps, found = len(rank.steps), []
    wall = median(step.wall_us for step in rank.steps)
    wide = (
        sum(op.device_us for op in rank.ops if op.kernel_class in (GEMM, ATTENTION) and op.dtype == "float32")
        / num_steps
    )
    peaks = roof.matmul_flops if roof else {}
    gain = 1 - peaks.get("float32", 0.0) / peaks["bfloat16"] if peaks.get("bfloat16") else 0.0
    if rank.on_device and wide >= 0.2 * wall and gain > 0.3:
        text = f"Matrix products and attention in float32 take {wide / 1000:.2f} ms a step ({100 * wide / wall:.0f} %)."
        found.append(
            Finding(
                text,
                "plan with bfloat16: compute_dtype; masters and optimizer stay float32.",
                "compute_dtype",
                gain * wide,
            )
        )
    slow = [op for op in rank.ops if op.roof_share is not None and op.roof_share < LOW_ROOF]
    for op in [op for op in slow if op.device_us / num_steps >= SLOW_OP * wall][:MAX_SLOW_OPS]:
        assert op.roof_share is not None
        text = (
            f"{op.name} of {op.shapes} reaches {100 * op.roof_share:.0f} % of the measured roof, in "
            f"{op.device_us / num_steps / 1000:.2f} ms a step."
        )
        found.append(Finding(text, *_advice(op), (1 - op.roof_share) * op.device_us / num_steps))
    return found


def _advice(op: OpTime) -> tuple[str, str]:
    """(remedy, setting) for a class."""
    if op.kernel_class == ATTENTION:
        return (
            "try another backend for the branch: the Plan's attention, measured by `vchitect-fast autotune`.",
            "attention",
        )
    if op.kernel_class == GEMM:
        return "make the product larger (microbatch), and its sizes multiples of 64.", "microbatch"
    return "fuse it with its neighbours: the hand-written block (model.set_kernels) or torch.compile.", ""
