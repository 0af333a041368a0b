"""What the ranks of tests/parallel/test_sample.py do: make one video together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast.parallel.mesh import make_mesh
from vchitect_fast.sample import Pipeline
from vchitect_fast.shapes import VideoShape


def generate(folder: Path, prompts: list[str], shape: VideoShape, options: list[dict[str, Any]]) -> list[Tensor]:
    """This rank's result for each set of options."""
    sizes = {"dp_replicate": 1, "dp_shard": 1, "sp": dist.get_world_size()}
    mesh = make_mesh(sizes, "global", torch.device("cpu"))
    pipeline = Pipeline.load(folder, None, None, mesh.device, mesh)
    return [pipeline.generate(prompts, shape, seeds=range(len(prompts)), num_steps=3, **each) for each in options]
