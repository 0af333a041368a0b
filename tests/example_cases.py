"""The examples as a module each, for the ranks of tests/parallel/test_examples.py."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from vchitect_fast.parallel.mesh import CPU, Mesh, make_mesh

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 3


class PlainAdamW:
    """torch's own, for what MasterAdamW is asked for."""

    def __init__(
        self, model: nn.Module, *, weight_decay: float, betas: tuple[float, float], dtype: torch.dtype
    ) -> None:
        self.parameters = list(model.to(dtype).parameters())
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (0.0, weight_decay)]
        for parameter in self.parameters:  # matrices decay, biases and norms do not
            groups[parameter.ndim >= 2]["params"].append(parameter)
        self.inner = torch.optim.AdamW(groups, betas=betas, fused=True)

    def step(self, learning_rate: float, clip_norm: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.inner.step()
        self.inner.zero_grad()


PLAIN: dict[str, Any] = {  # in place of everything of ours that an example uses
    "parallelize_blocks": lambda *args, **options: None,
    "reduce_gradients": lambda model, now: None,
    "Engine": lambda *args: None,
    "Saving": lambda engine: SimpleNamespace(step=nullcontext),
    "MasterAdamW": PlainAdamW,
}


def load(name: str) -> ModuleType:
    """The example, fresh."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def losses(name: str, mesh: Mesh, *, plain: bool = False) -> list[float]:
    """Of an example's steps in fp64; plain: its loop with nothing of ours."""
    example = load(name)
    if plain:
        for word, instead in PLAIN.items():
            assert hasattr(example, word)
            setattr(example, word, instead)
    torch.set_default_dtype(torch.float64)
    try:
        return example.train(mesh, torch.float64, STEPS)
    finally:
        torch.set_default_dtype(torch.float32)


def losses_on(name: str) -> list[float]:
    return losses(name, make_mesh({"dp_replicate": 1, "dp_shard": 2, "sp": 1}, "global", CPU))
