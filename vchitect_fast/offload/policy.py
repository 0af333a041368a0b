"""What a Policy means in bytes, and other spellings of it: pure functions, no torch.

A block of which nothing is recomputed or offloaded keeps whatever autograd saves (Workload.saved_bytes_per_block). Any other
block saves the five groups, each kept, offloaded or recomputed, and recomputes the cheap work between them. In chunks a
block that keeps everything keeps little (Workload.chunked_saved_bytes). Letters as in workload.py. `keep_last` blocks at
the end are never offloaded: backward needs them at once.

Where `work` is one rank's share of a sample, `shard` says what the ranks exchange (parallel/sequence.py): what comes from
others belongs to `qkv` and `branch_out` and is saved like the rest. All is of the first rank, the fullest. Without `shard`
exchanges are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Plan, PlanEntry, Policy, ShardSpec
from vchitect_fast.workload import DTYPE_BYTES, Workload

KEEP_LAST = 1
WHOLE = "whole"  # all that autograd saves of a block that keeps everything, its input included
READINGS = ("kept", "recomputed")
SLOT_BYTES = 256  # a slot of the pool is a multiple of this: device access is coalesced, and little is wasted
TURN_BYTES = 2**28  # of parked states that are on the device at once, three times: one leaves, one is used, one comes
CHUNK_BYTES = 64 * 2**30  # of the pool; no slot crosses from one into the next (csrc/pool.h)


@dataclass(frozen=True)
class GroupBytes:
    """Bytes that one block saves of one group, and what becomes of them."""

    block: int
    group: str  # an activation group, or WHOLE
    action: str  # keep | offload | recompute
    sizes: tuple[int, ...]  # bytes of its storages, each a slot of its own

    @property
    def num_bytes(self) -> int:
        """The sum."""
        return sum(self.sizes)


def check_policy(policy: Policy, block: int) -> None:
    """UserError for a mix that spares nothing: attention's outputs and their log-sum-exp come from one op."""
    if (policy.branch_out == RECOMPUTE) != (policy.stats == RECOMPUTE):
        raise UserError(
            f"block {block}: branch_out and stats come from the same op and must both be recomputed or neither, got "
            f"branch_out {policy.branch_out} and stats {policy.stats}; set stats like branch_out."
        )


def without_offload(policy: Policy) -> Policy:
    """The same with every offloaded group kept."""
    changed = {item.name: KEEP for item in fields(policy) if getattr(policy, item.name) == OFFLOAD}
    return replace(policy, **changed)


def effective(policies: Sequence[Policy], keep_last: int = KEEP_LAST) -> tuple[Policy, ...]:
    """What is done: the last `keep_last` blocks keep what they were to offload."""
    first_kept = len(policies) - keep_last
    return tuple(p if i < first_kept else without_offload(p) for i, p in enumerate(policies))


def offloads(policy: Policy) -> bool:
    """Whether any group is offloaded."""
    return policy != without_offload(policy)


def share_of(plan: Plan, entry: PlanEntry, config: TransformerConfig) -> Workload:
    """One rank's share of a microbatch of `entry`."""
    axis = "tokens" if entry.shard.axis == "tokens" else "frames"
    return Workload(
        config, entry.video_shape, entry.microbatch, plan.num_text_tokens, plan.mesh["sp"], axis, entry.num_chunks
    )


@dataclass(frozen=True)
class Resharded:
    """The branch whose rows other ranks have, on the first rank: temporal where frames are cut, spatial where tokens are."""

    visual_rows: int  # that it attends over
    text_rows: int
    num_heads: int  # in which it does
    rows_come: bool  # normed rows come and are projected here; False: q, k and v come, of these heads
    back_rows: int  # of the output that comes back
    first_text_rows: int  # of the first frame, for the cross branch; they come too

    @classmethod
    def of(cls, work: Workload, shard: ShardSpec, *, last: bool) -> Resharded:
        """What `work`'s sp ranks exchange in one block; `last`: where frames are cut, its text rows stay."""
        assert shard.axis == work.axis, (shard, work)
        whole, heads = replace(work, sp=1), work.config.num_attention_heads
        there = replace(work, axis="tokens" if shard.axis == "frames" else "frames")
        first = work.batch * work.num_text_tokens
        if shard.spatial == "heads":
            return cls(whole.visual_rows, whole.text_rows, -(-heads // work.sp), False, work.rows, first)
        only_visual = last and shard.axis == "frames"
        text, back = (0, work.visual_rows) if only_visual else (there.text_rows, work.rows)
        return cls(there.visual_rows, text, heads, True, back, first)

    @property
    def rows(self) -> int:
        """Visual and text."""
        return self.visual_rows + self.text_rows


def block_bytes(
    work: Workload,
    policy: Policy,
    block: int,
    dtype: str,
    *,
    device_kind: str = "cpu",
    shard: ShardSpec | None = None,
) -> list[GroupBytes]:
    """What one block saves by group, for a policy that is already `effective`.

    Exact for the plain block with torch's fused attention (tests/offload/test_blocks.py, tests/parallel/test_sequence_traffic.py
    count the same): in units of [rows, D], the input visual and text, 7 visual and 3 text projections, 3 joint branch outputs,
    the 4D input of each GELU; the log-sum-exp is fp32. The first block's text is one row set a sample, not a frame: it is
    expanded over the frames.
    """
    config, size = work.config, DTYPE_BYTES[dtype]
    last, row = block == config.num_layers - 1, size * config.hidden_dim
    sent = Resharded.of(work, shard, last=last) if shard and shard.axis != "batch" and work.sp > 1 else None
    text_input = work.text_rows // work.num_frames if block == 0 else work.text_rows
    if policy == Policy.keep() and work.num_chunks > 1:
        whole = work.chunked_saved_bytes(size, first=block == 0, last=last)
        return [GroupBytes(block, WHOLE, KEEP, (whole,))]
    if policy == Policy.keep():
        statistics = size if device_kind == "cpu" else 4
        whole = work.saved_bytes_per_block(size, last=last, statistics_bytes=statistics)
        whole += _whole_exchanged_bytes(work, sent, row, last=last) if sent else 0
        return [GroupBytes(block, WHOLE, KEEP, (whole - row * (work.text_rows - text_input),))]
    visual, text, joint = (row * rows for rows in (work.visual_rows, work.text_rows, work.rows))
    qkv, branch_out, stats = [visual] * 7 + [text] * 3, [joint] * 3, [_stats_bytes(work)] * 3
    if sent:
        of_heads = row * sent.num_heads // config.num_attention_heads
        if sent.rows_come:  # they, and their projections; the text's own ones serve the other branches
            there = [row * sent.visual_rows, row * sent.text_rows]
            qkv = [visual] * 4 + [text] * 3 + there * 4
        else:
            qkv = [visual] * 4 + [text] * 3 + [of_heads * sent.rows] * 3
        qkv += [row * sent.first_text_rows] * 3  # they, and their k and v
        branch_out = [joint] * 2 + [of_heads * sent.rows, row * sent.back_rows]
        stats = [_stats_bytes(work)] * 2 + [4 * sent.num_heads * sent.rows]
    found = {
        "block_input": [visual, row * text_input],
        "qkv": qkv,
        "branch_out": branch_out,
        "mlp_pre": [4 * visual] if last else [4 * visual, 4 * text],
        "stats": stats,
    }
    return [
        GroupBytes(block, name, getattr(policy, name), tuple(n for n in sizes if n)) for name, sizes in found.items()
    ]


def _stats_bytes(work: Workload) -> int:
    """The log-sum-exp of one branch over this rank's rows."""
    return 4 * work.config.num_attention_heads * work.rows


def _whole_exchanged_bytes(work: Workload, sent: Resharded, row: int, *, last: bool) -> int:
    """What exchanges add to a block that keeps whatever autograd saves."""
    there = row * sent.num_heads // work.config.num_attention_heads * sent.rows
    more = 4 * (there - row * work.rows)  # q, k, v and output of the branch
    more += there if sent.rows_come else 0
    more += row * (3 * sent.first_text_rows - 2 * work.text_rows)  # the cross branch does not use this rank's k and v
    more += 4 * sent.num_heads * sent.rows - _stats_bytes(work)
    if work.axis == "frames" and work.batch * work.num_frames == 1:  # the output that came back is not saved anyway
        more += row * (work.visual_rows if last else work.rows)
    return more


def step_bytes(
    work: Workload,
    policies: Sequence[Policy],
    dtype: str,
    *,
    keep_last: int = KEEP_LAST,
    device_kind: str = "cpu",
    shard: ShardSpec | None = None,
) -> list[GroupBytes]:
    """`block_bytes` of every block, the `effective` policies applied."""
    done = effective(policies, keep_last)
    return [
        item
        for block, policy in enumerate(done)
        for item in block_bytes(work, policy, block, dtype, device_kind=device_kind, shard=shard)
    ]


def offload_budget_bytes(
    work: Workload,
    policies: Sequence[Policy],
    dtype: str,
    *,
    keep_last: int = KEEP_LAST,
    shard: ShardSpec | None = None,
) -> int:
    """The pool that one forward and backward needs for what is offloaded."""
    moved = [i for i in step_bytes(work, policies, dtype, keep_last=keep_last, shard=shard) if i.action == OFFLOAD]
    return pool_bytes(size for item in moved for size in item.sizes)


def turns(sizes: Mapping[str, int], most_bytes: int = TURN_BYTES) -> list[list[str]]:
    """Names in their order, cut so that what follows each other has at most so many bytes, or is one."""
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = most_bytes
        found[-1].append(name)
        room -= size
    return found


def pool_bytes(sizes: Iterable[int], chunk_bytes: int = CHUNK_BYTES) -> int:
    """The pool in which tensors of these sizes all find room, in any order, while nothing else is in it.

    Whole slots; and where they fill more than one chunk, at the end of each as much as the largest slot may not fit into.
    """
    slots = [-(-size // SLOT_BYTES) * SLOT_BYTES for size in sizes]
    needed, rest = sum(slots), max(slots, default=SLOT_BYTES) - SLOT_BYTES
    if needed <= chunk_bytes or rest >= chunk_bytes:  # a slot that fits no chunk: the pool will say so
        return needed
    num_chunks = -(-(needed - rest) // (chunk_bytes - rest))
    return needed + (num_chunks - 1) * rest


def spread(num_chosen_of: float | Fraction, num_blocks: int) -> tuple[bool, ...]:
    """Which blocks a fraction chooses, evenly spread: block i from 1 is chosen when i x fraction passes 1/2, 3/2, 5/2, ..."""
    ratio, passed, chosen = Fraction(num_chosen_of).limit_denominator(10**6), Fraction(1, 2), []
    for number in range(1, num_blocks + 1):
        chosen.append(number * ratio >= passed)
        passed += chosen[-1]
    return tuple(chosen)


def litegen_recomputed(ratio: float, num_blocks: int) -> set[int]:
    """Blocks, from 0, that LiteGen recomputes: number i from 1 when i (1 - ratio) passes 1/2, 3/2, 5/2, ..., in its floats."""
    share, passed, chosen = 1 - ratio, 0.5, set()
    for number in range(1, num_blocks + 1):
        if number * share >= passed:
            passed += 1
            chosen.add(number - 1)
    return chosen


def from_selective_ratio(
    ratio: float, num_blocks: int, reading: str, *, offload_inputs: bool = False
) -> tuple[Policy, ...]:
    """The Policies that LiteGen's `selective_ratio` stands for, in one of its two readings.

    reading         "kept"        the fraction of blocks that are NOT recomputed: LiteGen's code, which spreads the others
                    "recomputed"  the fraction of blocks that are: the table of the paper
    offload_inputs  the inputs of recomputed blocks are offloaded instead of kept
    """
    if reading not in READINGS:
        raise unknown_name("reading of selective_ratio", reading, READINGS)
    if not 0 <= ratio <= 1:
        raise UserError(
            f"selective_ratio is a fraction from 0 to 1, got {ratio}; give the fraction of blocks {reading}."
        )
    if reading == "kept":
        theirs = litegen_recomputed(ratio, num_blocks)
        recomputed = tuple(block in theirs for block in range(num_blocks))
    else:
        recomputed = spread(ratio, num_blocks)
    again = replace(Policy.recompute(), block_input=OFFLOAD) if offload_inputs else Policy.recompute()
    return tuple(again if item else Policy.keep() for item in recomputed)
