"""Problem, what is to be planned, and Layout, where the ranks of a run stand and how one step is divided among them.

Ranks fill the nodes in order: those of an sp group are neighbours, then those of dp_shard, then dp_replicate
(parallel/mesh.py). A Layout says nothing of what blocks keep (ways.py) and predicts nothing (model.py). Layer 0 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.autotune.collectives import Group
from vchitect_fast.cluster import Cluster
from vchitect_fast.plan import ShardSpec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

if TYPE_CHECKING:
    from vchitect_fast.autotune.calibrate import Calibration

ONE_RANK = Group(1, 1)
NOT_CUT = ShardSpec()


@dataclass(frozen=True)
class Layout:
    """The mesh of a run and the division of one step; every field as in the Plan.

    microbatch and accumulation count what one data-parallel rank does.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    sp: int = 1
    shard: ShardSpec = NOT_CUT
    microbatch: int = 1  # samples a forward
    accumulation: int = 1  # microbatches a step
    num_chunks: int = 1
    vae_mini_batch: int = 8  # frames encoded at once
    prefetch_depth: int = 1  # offloading blocks fetched ahead of use in backward

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.dp_replicate * self.dp_shard * self.sp

    @property
    def num_dp(self) -> int:
        """Ranks, or sp groups, that have samples of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def num_shards(self) -> int:
        """Ranks that share the parameters: FSDP shards over dp_shard and sp together."""
        return self.dp_shard * self.sp

    @property
    def mesh(self) -> dict[str, int]:
        """As the Plan has it."""
        return {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "sp": self.sp}


@dataclass(frozen=True)
class Problem:
    """One shape of one model on one cluster."""

    cluster: Cluster
    config: TransformerConfig
    shape: VideoShape
    batch: int  # samples a step, of all ranks together
    num_text_tokens: int
    dtype: str  # of activations and products: "float32" | "bfloat16"
    num_devices: int = 1  # ranks of the run
    ema: bool = True
    encode: bool = False  # the codec encodes inside the step: latents are not cached
    calibration: Calibration | None = None  # what measured steps said about the formulas
    parked: tuple[str, ...] = ()  # plan.PARKABLE: states that lie in host memory between their uses

    def workload(self, layout: Layout) -> Workload:
        """One microbatch, on the fullest of the ranks that share it."""
        axis = "tokens" if layout.shard.axis == "tokens" else "frames"
        return Workload(
            self.config, self.shape, layout.microbatch, self.num_text_tokens, layout.sp, axis, layout.num_chunks
        )

    def sp_group(self, layout: Layout) -> Group:
        """Ranks that share a sample."""
        return self._neighbours(layout.sp)

    def shard_group(self, layout: Layout) -> Group:
        """Ranks that share the parameters."""
        return self._neighbours(layout.num_shards)

    def replica_group(self, layout: Layout) -> Group:
        """Ranks that hold the same shard; one stands in each stretch of num_shards neighbours."""
        if layout.dp_replicate == 1:
            return ONE_RANK
        inside = max(1, self.cluster.num_devices_per_node // layout.num_shards)  # of them on one node
        return Group(layout.dp_replicate, -(-layout.dp_replicate // inside))

    def _neighbours(self, number: int) -> Group:
        """Of all such groups of the run, the one that touches most nodes: it decides when the others go on."""
        per_node = self.cluster.num_devices_per_node
        nodes = -(-number // per_node)
        cut = self.num_devices > per_node and number > 1 and per_node % number and number % per_node
        return Group(number, min(number, nodes + 1 if cut else nodes))
