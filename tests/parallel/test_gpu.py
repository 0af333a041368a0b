"""The same on a GPU: NCCL at world size 1, bf16, a pinned copy for the checkpoint. Never run yet where this was written.

pytest -m gpu tests/parallel/test_gpu.py
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from offloading import loss_of, make_inputs, make_model, work_of
from resume_cases import plan_of_ranks
from shard_cases import full

from vchitect_fast import checkpoint
from vchitect_fast.checkpoint_writer import Writer
from vchitect_fast.ema import EMA
from vchitect_fast.optimizer import MasterAdamW
from vchitect_fast.parallel.apply import parallelize
from vchitect_fast.parallel.mesh import ALONE, Mesh, launched
from vchitect_fast.parallel.shard import reduce_gradients
from vchitect_fast.plan import ShardSpec
from vchitect_fast.resume import run_tensors

pytestmark = pytest.mark.gpu
SIZES = {"dp_replicate": 1, "dp_shard": 1, "sp": 1}


def steps(mesh: Mesh, run: Path | None = None) -> dict[str, Any]:
    """Three steps of two microbatches in bf16; a checkpoint in the background after the second."""
    device = torch.device("cuda", 0)
    model = make_model().to(device)
    plan = plan_of_ranks((1, 1, 1), ShardSpec(), compute_dtype="bfloat16", fsdp_group="none")
    parallelize(model, plan, mesh)
    optimizer = MasterAdamW(model, weight_decay=0.1, betas=(0.9, 0.95), dtype=torch.bfloat16)
    ema = EMA(optimizer.masters, 0.5)
    losses, saved = [], {}
    with Writer(run or Path(), 2, mesh) as writer:
        for step in range(3):
            for micro in range(2):
                reduce_gradients(model, now=micro == 1)
                inputs = [x.to(device) for x in make_inputs(work_of("3x32x32", batch=1), seed=10 * step + micro)]
                loss = loss_of(model, inputs)
                loss.backward()
                losses.append(loss.item())
            optimizer.step(1e-3, 1.0)
            ema.update(step)
            if run and step == 1:
                tensors = run_tensors(model, optimizer, ema)
                saved = {name: full(tensor).cpu() for name, tensor in tensors.items()}
                writer.save(2, tensors, {"seed": 3})
    return {"losses": losses, "saved": saved}


def test_nccl_at_world_size_1_trains_as_one_process_and_saves_while_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(replace(ALONE, device=torch.device("cuda", 0)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with launched(SIZES) as mesh:
        assert dist.get_backend(mesh.axes.get_group("dp_shard")) == "nccl"
        assert mesh.device == torch.device("cuda", 0)
        found = steps(mesh, tmp_path)
    assert not dist.is_initialized()
    assert found["losses"] == pytest.approx(expected["losses"], rel=4 * torch.finfo(torch.bfloat16).eps)
    loaded = checkpoint.load_prefix(tmp_path / "checkpoint-00000002", "")
    assert loaded.keys() == found["saved"].keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in found["saved"].items())
