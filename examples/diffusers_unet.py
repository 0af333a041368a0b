"""A diffusers UNet (random weights) with its parameters in shards, some of its blocks recomputed and the middle offloaded.

    python examples/diffusers_unet.py                                one process
    torchrun --nproc-per-node=2 examples/diffusers_unet.py           two ranks

Needs the extra [sd3] for diffusers. A UNet has no list of equal blocks: any modules that are called one after the other will
do, here its resolutions on the way down, the middle, and those on the way up. Their skip connections are arguments and results
as any other. Only what stands between the lines of dashes is ours.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel

from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import parallelize_blocks
from vchitect_fast.parallel.mesh import Mesh, launched
from vchitect_fast.parallel.shard import reduce_gradients

SAMPLES = 4  # a step, over all ranks: each takes as many


def build() -> UNet2DConditionModel:
    """Two resolutions, small enough for a laptop."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        cross_attention_dim=24, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def train(mesh: Mesh, dtype: torch.dtype, num_steps: int) -> list[float]:
    """The loss of each step, which is the same for any number of ranks that divides SAMPLES."""
    if SAMPLES % mesh.num_dp:  # a rank without a sample would not gather, and the others would wait for it
        raise SystemExit(f"{SAMPLES} samples a step do not divide over {mesh.num_dp} ranks; start fewer.")
    torch.manual_seed(0)
    model = build().to(mesh.device)
    # -----
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    actions = ["recompute"] * len(model.down_blocks) + ["offload"] + ["keep"] * len(model.up_blocks)
    saving = Saving(Engine(2**26, mesh.device))
    parallelize_blocks(model, blocks, mesh, actions=actions, saving=saving, compute_dtype=dtype)
    optimizer = MasterAdamW(model, weight_decay=0.01, betas=(0.9, 0.99), dtype=dtype)
    # -----
    losses = []
    for step in range(num_steps):
        total = torch.zeros((), device=mesh.device)
        for sample in range(mesh.dp_rank, SAMPLES, mesh.num_dp):
            draw = torch.Generator().manual_seed(1000 * step + sample)
            clean, noise = (torch.randn(1, 4, 16, 16, generator=draw).to(mesh.device, dtype) for _ in range(2))
            text = torch.randn(1, 7, 24, generator=draw).to(mesh.device, dtype)
            timestep = torch.randint(1000, (1,), generator=draw).to(mesh.device)
            level = (timestep / 1000).to(dtype)
            # -----
            reduce_gradients(model, now=sample + mesh.num_dp >= SAMPLES)
            with saving.step():
                predicted = model((1 - level) * clean + level * noise, timestep, text).sample
                loss = (predicted - noise).float().square().mean() * mesh.num_dp / SAMPLES
                loss.backward()
            # -----
            total += loss.detach() / mesh.num_dp
        optimizer.step(learning_rate=1e-2, clip_norm=1.0)
        if mesh.axes is not None:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


if __name__ == "__main__":
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with launched({"dp_replicate": 1, "dp_shard": ranks, "sp": 1}) as mesh:
        if mesh.is_first:
            print(mesh.table(), mesh.equation(1, SAMPLES // mesh.num_dp), sep="\n")
        losses = train(mesh, torch.bfloat16, num_steps=10)
        if mesh.is_first:
            print("\n".join(f"step {step}  loss {loss:.4f}" for step, loss in enumerate(losses, 1)))
