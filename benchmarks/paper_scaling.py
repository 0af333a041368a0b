"""Fig. 8 and Fig. 9 of the Vchitect-2.0 paper predicted: what its hybrid parallelism gains. Nothing is measured, nothing fitted.

Fig. 9  4 nodes x 6 A100s, 24 samples a step by accumulation: sequence parallelism (SP) of 6 ranks inside a node with data
        parallelism over the nodes, recompute and offload, against SP of 12 and of 24 ranks across nodes without either.
        All shard parameters inside a node, all exchange q, k, v by heads.
Fig. 8  one node of 8 A100s, SP 8, video encoded in the step: every rank encodes all frames and holds an equal part of text
        and visual tokens laid end to end (baseline); text and visual tokens are each divided (separate sharding); each rank
        encodes its frames (frame-wise VAE).
What the blocks do: the fastest of LADDER that fits. Time and memory are the planner's for this project's runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vchitect_fast.autotune.collectives import Group
from vchitect_fast.autotune.layout import Layout, Problem
from vchitect_fast.autotune.model import Outcome, StepModel
from vchitect_fast.benchmarks.paper_table import CONFIG, DTYPE, EVERYTHING, NUM_TEXT_TOKENS, OFFLOADED_WITH, choose
from vchitect_fast.cluster import Cluster
from vchitect_fast.offload.policy import from_selective_ratio
from vchitect_fast.plan import KEEP, OFFLOAD, RECOMPUTE, Policy, ShardSpec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

NUM_NODES, PER_NODE, BATCH = 4, 6, 24
BY_HEADS, BY_FRAMES = ShardSpec("tokens", spatial="heads"), ShardSpec("frames", temporal="tokens")
SIZES = ((720, 576), (1024, 768), (1920, 1088))
FRAMES = (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 96, 112, 128, 144)
LONGEST = 1024  # frames that are tried
KEEP_ALL = (Policy.keep(),) * CONFIG.num_layers
ACTIONS = {KEEP: Policy.keep(), RECOMPUTE: Policy.recompute(), OFFLOAD: EVERYTHING}
# Blocks recomputed: none, an eighth ... all; without offload and with the paper's fifth of the blocks offloaded; and all
# recomputed with their inputs offloaded.
LADDER = (
    *(
        tuple(ACTIONS[action] for action in choose(CONFIG.num_layers, min(eighth / 8, 1 - offloaded), offloaded))
        for offloaded in (0.0, OFFLOADED_WITH)
        for eighth in range(9)
    ),
    from_selective_ratio(1.0, CONFIG.num_layers, "recomputed", offload_inputs=True),
)
ENCODED = (VideoShape(32, 1088, 768), VideoShape(128, 1088, 768))  # the paper's 1080, rounded
# Achieved FLOP/s of the encoder on an A100 where the cluster file has none: an RTX 4090 encodes one 1024x1024 image with SD
# 1.5's, the same but for 4 latent channels, in 78 ms (huggingface.co/docs/diffusers, "VAE encode", fp16), 38 % of that
# card's 165 TFLOP/s; the same part of the A100's 312 (both data sheets, dense fp16 with fp32 accumulation).
CODEC_FLOPS = 0.38 * 312e12


@dataclass(frozen=True)
class System:
    """One way to place 24 ranks; `ladder` is what its blocks may do."""

    name: str
    sp: int
    ladder: tuple[tuple[Policy, ...], ...]
    shard: ShardSpec = BY_HEADS


SYSTEMS = (
    System("SP 6 in a node x DP 4, recompute and offload", 6, LADDER),
    System("SP 12 over 2 nodes x DP 2", 12, (KEEP_ALL,)),
    System("SP 24 over 4 nodes", 24, (KEEP_ALL,)),
)
OURS = System("as the first, frames divided", 6, LADDER, BY_FRAMES)  # this project's exchange; not in the paper


@dataclass(frozen=True)
class Point:
    """One system at one shape; `outcome` None where nothing of its ladder fits."""

    system: System
    shape: VideoShape
    outcome: Outcome | None

    @property
    def tokens_per_s(self) -> float:
        """Visual tokens of all ranks."""
        return 0.0 if self.outcome is None else BATCH * self.shape.num_visual_tokens() / self.outcome.cost.step_s


class _InNode(Layout):
    """Shards parameters over the ranks of a node, whatever sp is; the paper's ZeRO group."""

    @property
    def num_shards(self) -> int:
        return min(PER_NODE, self.num_ranks)


class _InNodeProblem(Problem):
    """Each shard has a replica on every node."""

    def shard_group(self, layout: Layout) -> Group:
        return Group(layout.num_shards, 1)

    def replica_group(self, layout: Layout) -> Group:
        number = layout.num_ranks // layout.num_shards
        return Group(number, number)


def point(cluster: Cluster, system: System, shape: VideoShape) -> Point:
    """The fastest of the system's ladder that fits, on NUM_NODES x PER_NODE of the cluster's devices."""
    return Point(system, shape, fastest(*_placed(cluster, system, shape), system.ladder))


def _placed(cluster: Cluster, system: System, shape: VideoShape) -> tuple[StepModel, Layout]:
    nodes = replace(cluster, num_nodes=NUM_NODES, num_devices_per_node=PER_NODE)
    number = NUM_NODES * PER_NODE
    problem = _InNodeProblem(nodes, CONFIG, shape, BATCH, NUM_TEXT_TOKENS, DTYPE, number)
    layout = _InNode(
        dp_replicate=number // system.sp, sp=system.sp, shard=system.shard, accumulation=BATCH * system.sp // number
    )
    return StepModel(problem), layout


def fastest(model: StepModel, layout: Layout, ladder: tuple[tuple[Policy, ...], ...]) -> Outcome | None:
    """Of the Policies that fit, None where none does."""
    outcomes = [model.predict(layout, policies) for policies in ladder]
    return min((o for o in outcomes if fits(model, o)), key=lambda o: o.cost.step_s, default=None)


def fits(model: StepModel, outcome: Outcome) -> bool:
    """In the device's memory and in its share of the node's."""
    limits = model.limits()
    host = limits.host_bytes is None or outcome.host_bytes <= limits.host_bytes
    return host and outcome.memory.peak_bytes <= limits.device_bytes


def twenty_times_slower(cluster: Cluster) -> Cluster:
    """With the paper's word on its own network: between nodes a twentieth of what there is inside."""
    between = cluster.link("intra_node").bytes_per_s / 20
    slower = (replace(link, bytes_per_s=between) if link.name == "inter_node" else link for link in cluster.links)
    return replace(cluster, links=tuple(slower))


def curves(cluster: Cluster) -> Iterator[Point]:
    """Fig. 9: every size, every system and OURS, over FRAMES."""
    for width, height in SIZES:
        for system in (*SYSTEMS, OURS):
            for frames in FRAMES:
                yield point(cluster, system, VideoShape(frames, width, height))


def longest(cluster: Cluster, system: System, width: int, height: int) -> VideoShape | None:
    """The most frames that fit, up to LONGEST; None where one does not."""
    low, high = 0, LONGEST + 1  # `low` fit or are 0, `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        model, layout = _placed(cluster, system, VideoShape(middle, width, height))
        fitting = any(fits(model, model.predict(layout, policies)) for policies in reversed(system.ladder))
        low, high = (middle, high) if fitting else (low, middle)
    return VideoShape(low, width, height) if low else None


@dataclass(frozen=True)
class Stage:
    """One step of Fig. 8 and what it takes."""

    name: str
    step_s: float
    encode_s: float


class _Concatenated(Workload):
    """Text and visual tokens of a frame laid end to end and divided equally: the fullest rank has visual tokens only."""

    @property
    def visual_rows(self) -> int:
        tokens = self.shape.tokens_per_frame(self.config.patch_size) + self.num_text_tokens
        return self.batch * self.shape.num_frames * -(-tokens // self.sp)

    @property
    def text_rows(self) -> int:
        return self.batch  # at least a row, so that a product has a size


class _ConcatenatedProblem(Problem):
    def workload(self, layout: Layout) -> Workload:
        axis = "tokens"
        return _Concatenated(self.config, self.shape, layout.microbatch, self.num_text_tokens, layout.sp, axis)


PAPER_STAGES = {
    "baseline": "",
    "separate sharding": "up to 20 %",
    "frame-wise VAE": "another 30 %",
}  # gains as it words them


def workflow(cluster: Cluster, shape: VideoShape) -> list[Stage]:
    """Fig. 8's three stages at one shape, one sample a step."""
    rate = cluster.codec_flops or CODEC_FLOPS
    node = replace(cluster, num_nodes=1, codec_flops=rate)
    sp = node.num_devices_per_node
    arguments = (node, CONFIG, shape, 1, NUM_TEXT_TOKENS, DTYPE, sp)
    layout = Layout(sp=sp, shard=BY_HEADS)
    separate = StepModel(Problem(*arguments, encode=True))
    chosen = fastest(separate, layout, LADDER)
    assert chosen is not None, f"{shape} does not fit one node"
    joint = StepModel(_ConcatenatedProblem(*arguments, encode=True)).predict(layout, chosen.policies)
    own_s = chosen.cost.encode_s  # of the fullest rank's frames
    all_s = sp * own_s if shape.num_frames % sp == 0 else own_s * shape.num_frames / -(-shape.num_frames // sp)
    return [
        Stage("baseline", joint.cost.step_s - joint.cost.encode_s + all_s, all_s),
        Stage("separate sharding", chosen.cost.step_s - own_s + all_s, all_s),
        Stage("frame-wise VAE", chosen.cost.step_s, own_s),
    ]
