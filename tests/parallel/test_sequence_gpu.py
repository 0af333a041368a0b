"""The exchanges through NCCL: on one GPU a group of one rank, its streams and the engine's; with several, `torchrun` them.

pytest -m gpu tests/parallel/test_sequence_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from sequence_cases import FRAMES, SPECS, Case, close_in_fp32

from vchitect_fast.plan import Policy

pytestmark = pytest.mark.gpu
ALL = Policy("offload", "offload", "offload", "offload", "offload")


@pytest.fixture
def _nccl() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_nccl")
@pytest.mark.parametrize("name", SPECS)
def test_every_cut_through_nccl(name: str) -> None:
    cases = [Case(SPECS[name], B=2, T=4, h=12, w=16), Case(SPECS[name], policies=(Policy.recompute(),) * 3)]
    assert close_in_fp32(cases, device="cuda") > 100


@pytest.mark.usefixtures("_nccl")
def test_received_rows_are_offloaded_and_come_back() -> None:
    assert close_in_fp32([Case(FRAMES, B=2, T=6, h=12, w=16, policies=(ALL,) * 3)] * 5, device="cuda") > 100
