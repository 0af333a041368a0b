"""What tests/autotune/test_probe_ranks.py asks of ranks: the probe with tiny sizes, over ranks that stand on one node or two."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from vchitect_fast.autotune.probe import Grid, Sizes, measure
from vchitect_fast.parallel.mesh import CPU, make_mesh

GRID = Grid(
    rows=(8, 64), widths=(16, 64), attention_rows=(64, 128), attention_width=64, lengths=(8, 16), elements=(1024, 4096),
    square=64, copy_bytes=2**16, held_out_linear=((32, 32),), held_out_attention=((96, 12),), held_out_elements=(2048,),
    held_out_products=((32, 16, 64),), pool_bytes=2**20, seconds_per_point=0.0,
)  # fmt: skip
SMALL = Sizes(
    GRID, copies=(2**14, 2**16), slab_bytes=2**20, collectives=(2**8, 2**12, 2**16), side=64, mini_batches=(),
    frame_side=32, disk_bytes=2**16, num_clips=1,
)  # fmt: skip


def probed(local_world_size: int) -> tuple[dict[str, Any], list[str]]:
    """(the Cluster as JSON, what was said) with so many ranks a node."""
    ranks, lines = dist.get_world_size(), []
    mesh = make_mesh({"dp_replicate": 1, "dp_shard": ranks, "sp": 1}, "global", CPU, local_world_size)
    return measure(mesh, SMALL, False, None, lines.append).to_json(), lines
