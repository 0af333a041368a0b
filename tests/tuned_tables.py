"""What the tests of tuned tables share: rows and tables that nobody measured, for the versions that run here."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch.distributed as dist

from vchitect_fast.kernels import tuned
from vchitect_fast.kernels.tuned import Choice, Measured, Row, Table

GPU = "Made-up GPU 80GB"


def flash_choice(block_queries: int, block_keys: int = 64, num_warps: int = 4, num_stages: int = 2) -> Choice:
    return {
        "block_queries": block_queries, "block_keys": block_keys, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


def make_row(op: str, kernel: str, choice: Choice, *, dtype: str = "bfloat16", **sizes: int) -> Row:
    def measured(chosen: Choice, scale: float) -> Measured:
        return Measured(chosen, 9, 1e-3 * scale, 0.9e-3 * scale, 1.2e-3 * scale, 2e-3)

    return Row(op, kernel, dtype, sizes, measured(choice, 0.5), measured(flash_choice(16), 1.0))


def make_table(*rows: Row, **fields: Any) -> Table:
    default = {
        "gpu": GPU, "torch": version("torch"), "triton": version("triton"), "commit": "0123456789ab",
        "command": "vchitect-fast tune kernels", "date": "2026-11-30T00:00:00+00:00",
    }  # fmt: skip
    return Table(**{**default, **fields}, rows=rows)


def check_on_ranks(paths: list[str], gpu: str = GPU) -> str:
    """On each rank of a test: parallel.apply.check_tuned with this rank's file, on a GPU of that name; the error, or nothing."""
    from vchitect_fast.errors import UserError
    from vchitect_fast.parallel.apply import check_tuned
    from vchitect_fast.parallel.mesh import Mesh, host_group

    tuned.gpu_name = lambda: gpu
    os.environ[tuned.ENVIRONMENT] = paths[dist.get_rank()]
    tuned.forget()
    try:
        check_tuned(Mesh(rank=dist.get_rank(), host_group=host_group()))
    except UserError as error:
        return str(error)
    return ""
