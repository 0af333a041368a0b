"""The examples as a module each, for the ranks of tests/parallel/test_examples.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from vchitect_fast.parallel.mesh import CPU, Mesh, make_mesh

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 3


def losses(name: str, mesh: Mesh) -> list[float]:
    """Of an example's steps in fp64."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_default_dtype(torch.float64)
    try:
        return example.train(mesh, torch.float64, STEPS)
    finally:
        torch.set_default_dtype(torch.float32)


def losses_on(name: str) -> list[float]:
    return losses(name, make_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 1}, "global", CPU))
