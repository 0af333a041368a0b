"""A diffusers video transformer (Wan's, random weights) with its parameters in shards, blocks recomputed and blocks offloaded.

    python examples/diffusers_transformer.py                                one process
    torchrun --nproc-per-node=2 examples/diffusers_transformer.py           two ranks

Needs the extra [sd3] for diffusers. Sequence parallelism is not for it: our exchanges stand inside our own block, and its
attention is another one. The steps are a user's own loop; only what stands between the lines of dashes is ours.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel

from vchitect_fast.offload.engine import Engine
from vchitect_fast.offload.hooks import Saving
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import parallelize_blocks
from vchitect_fast.parallel.mesh import Mesh, launched
from vchitect_fast.parallel.shard import reduce_gradients

SAMPLES = 4  # a step, over all ranks: each takes as many
ACTIONS = ("recompute", "offload", "keep")  # of the three blocks


def build() -> WanTransformer3DModel:
    """Small enough for a laptop: D = 32, 3 blocks."""
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24, freq_dim=32, ffn_dim=64,
        num_layers=len(ACTIONS), rope_max_seq_len=32,
    )  # fmt: skip


def train(mesh: Mesh, dtype: torch.dtype, num_steps: int) -> list[float]:
    """The loss of each step, which is the same for any number of ranks that divides SAMPLES."""
    if SAMPLES % mesh.num_dp:  # a rank without a sample would not gather, and the others would wait for it
        raise SystemExit(f"{SAMPLES} samples a step do not divide over {mesh.num_dp} ranks; start fewer.")
    torch.manual_seed(0)
    model = build().to(mesh.device)
    # -----
    saving = Saving(Engine(2**26, mesh.device))
    parallelize_blocks(model, list(model.blocks), mesh, actions=ACTIONS, saving=saving, compute_dtype=dtype)
    optimizer = MasterAdamW(model, weight_decay=0.01, betas=(0.9, 0.99), dtype=dtype)
    # -----
    losses = []
    for step in range(num_steps):
        total = torch.zeros((), device=mesh.device)
        for sample in range(mesh.dp_rank, SAMPLES, mesh.num_dp):
            draw = torch.Generator().manual_seed(1000 * step + sample)
            clean, noise = (torch.randn(1, 4, 4, 8, 8, generator=draw).to(mesh.device, dtype) for _ in range(2))
            text = torch.randn(1, 7, 24, generator=draw).to(mesh.device, dtype)
            timestep = torch.randint(1000, (1,), generator=draw).to(mesh.device)
            sigma = (timestep / 1000).to(dtype)
            # -----
            reduce_gradients(model, now=sample + mesh.num_dp >= SAMPLES)
            with saving.step():
                velocity = model((1 - sigma) * clean + sigma * noise, timestep, text).sample
                loss = (velocity - (noise - clean)).float().square().mean() * mesh.num_dp / SAMPLES
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
