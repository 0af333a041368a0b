"""What the ranks of tests/parallel/test_mesh.py do. As a program, under a launcher: say the mesh, then lose rank 1."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist

from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import CPU, launched, make_mesh, on_all, on_first


def place(sizes: dict[str, int], fsdp_group: str) -> dict[str, Any]:
    """Where this rank stands, by number, and with whom by its groups."""
    mesh = make_mesh(sizes, fsdp_group, CPU)
    assert mesh.fsdp is not None
    return {
        "dp": mesh.dp_rank,
        "sp": mesh.sp_rank,
        "sp_group": dist.get_process_group_ranks(mesh.sp_group) if mesh.sp_group else None,
        "sharded_over": dist.get_process_group_ranks(mesh.fsdp.get_group(mesh.fsdp.ndim - 1)),
        "world": dist.get_process_group_ranks(mesh.host_group),
    }


def refused(sizes: dict[str, int], fsdp_group: str, local_world_size: int | None) -> str:
    try:
        make_mesh(sizes, fsdp_group, CPU, local_world_size)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def agree() -> dict[str, Any]:
    """Results and errors of on_first and on_all as this rank sees them."""
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()

    def fail(on: int, error: Exception) -> int:
        if rank == on:
            raise error
        return rank

    def said(call: Any) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return {
        "first": on_first(group, lambda: rank + 10),
        "all": on_all(group, lambda: rank + 10),
        "first_fails": said(lambda: on_first(group, lambda: fail(0, UserError("mend this.")))),
        "one_fails": said(lambda: on_all(group, lambda: fail(1, UserError("mend that.")))),
        "one_breaks": said(lambda: on_all(group, lambda: fail(1, KeyError("x")))),
        "in_step": on_all(group, lambda: "still"),
        "alone": on_first(None, lambda: rank),
    }


if __name__ == "__main__":
    with launched({"dp_replicate": 1, "dp_shard": 1, "sp": 2}) as mesh:
        total = torch.ones(1)
        dist.all_reduce(total)
        if mesh.is_first:
            print(f"{total.item():.0f} ranks\n{mesh.table()}\n{mesh.equation(1, 4)}", flush=True)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(total)
