"""Way: what one block does between forward and backward, with its price in seconds and bytes on one rank, one microbatch.

A Policy is priced by what backward computes a second time (block.py), what stays on the device, what goes to host memory
and comes back (offload/policy.py), and what is rebuilt for its own backward. A block that keeps everything is plain
autograd; any other Policy makes the cheap work and the products behind the saved groups again (docs/design.md, "Activation
groups"). Layer 0 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from vchitect_fast.autotune.block import BlockSeconds
from vchitect_fast.offload.policy import SLOT_BYTES, GroupBytes, block_bytes, offloads, without_offload
from vchitect_fast.plan import ACTIONS, KEEP, OFFLOAD, RECOMPUTE, Policy, ShardSpec
from vchitect_fast.workload import Workload

MADE_AGAIN = {  # parts of BlockSeconds that recomputing a group costs
    "qkv": ("spatial_in", "temporal_in", "cross_in", "text_in"),
    "branch_out": ("spatial", "temporal", "cross"),
    "mlp_pre": ("mlp_in",),
}
POLICIES = tuple(  # every one that spares something: attention's outputs and their log-sum-exp come from one op
    Policy(block_input, qkv, branch_out, mlp_pre, branch_out)
    for block_input, qkv, branch_out, mlp_pre in product((KEEP, OFFLOAD), ACTIONS, ACTIONS, ACTIONS)
)


CHUNKED = tuple(policy for policy in POLICIES if policy.qkv == policy.branch_out == policy.mlp_pre == RECOMPUTE)


@dataclass(frozen=True)
class Way:
    """One block's choice and its price."""

    policy: Policy
    again_s: float  # that the Policy adds: compute that backward does a second time, and what saving costs the host
    kept_bytes: int  # stay on the device between forward and backward
    moved_bytes: int  # go to host memory and come back
    host_bytes: int  # of the pool, whole slots
    working_bytes: int  # on the device beside what is kept, only while this block is in backward
    ahead_s: float = 0.0  # of again_s, in forward


def way(
    work: Workload, parts: BlockSeconds, policy: Policy, block: int, dtype: str, device_kind: str, shard: ShardSpec,
    whole: int | None = None,
) -> Way:  # fmt: skip
    """The price of one Policy of one block; of the last block offloaded groups are kept, as the runtime does.

    `whole`: what keeping everything saves, where it is known.
    """

    def saved(policy: Policy) -> list[GroupBytes]:
        return block_bytes(work, policy, block, dtype, device_kind=device_kind, shard=shard)

    if whole is None:
        whole = sum(item.num_bytes for item in saved(Policy.keep()))
    done = without_offload(policy) if block == work.config.num_layers - 1 else policy
    if done == Policy.keep():
        return Way(policy, 0.0, whole, 0, 0, 0)
    groups = saved(done)
    kept = sum(item.num_bytes for item in groups if item.action == KEEP)
    moved = [size for item in groups if item.action == OFFLOAD for size in item.sizes]
    again = ["cheap", "out"]
    for group, names in MADE_AGAIN.items():
        again += names if getattr(done, group) == RECOMPUTE else ()
    slots = sum(-(-size // SLOT_BYTES) * SLOT_BYTES for size in moved)
    framed = not done.qkv == done.branch_out == done.mlp_pre == RECOMPUTE  # as offload/hooks.py decides
    host = parts.frame if framed else parts.checkpoint
    again_s = parts.sum(*again).forward_s + host.forward_s + host.backward_s
    return Way(policy, again_s, kept, sum(moved), slots, max(0, whole - kept), host.forward_s)


def ways(work: Workload, parts: BlockSeconds, block: int, dtype: str, device_kind: str, shard: ShardSpec) -> list[Way]:
    """Of every Policy that the runtime has, for one block: in chunks it keeps everything or recomputes all but the input.

    Of the last block of those that offload nothing, the others are the same there.
    """
    last = block == work.config.num_layers - 1
    several = (Policy.keep(), *CHUNKED) if work.num_chunks > 1 else POLICIES
    asked = (policy for policy in several if not (last and offloads(policy)))
    whole = way(work, parts, Policy.keep(), block, dtype, device_kind, shard).kept_bytes
    return [way(work, parts, policy, block, dtype, device_kind, shard, whole) for policy in asked]


def host_bytes(chosen: Sequence[Way]) -> int:
    """The pool that one forward and backward needs."""
    return sum(item.host_bytes for item in chosen)
