"""The mesh: how torch.distributed starts and ends, and where a rank stands in dp_replicate x dp_shard x sp.

    with launched(plan.mesh, plan.fsdp_group) as mesh: ...   ranks from torchrun's or Slurm's environment, or one process
    mesh = make_mesh(sizes, fsdp_group, device)              where torch.distributed is up already

Ranks of an sp group are neighbours: rank = (dp_replicate x num dp_shard + dp_shard) x num sp + sp. Gloo carries what lies on
the CPU (objects, checkpoints), NCCL what lies on a GPU. Refused: sizes whose product is not the number of ranks, with the
nearest that are right. What is sharded over the axes is shard.py's and sequence.py's, not decided here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vchitect_fast.errors import UserError, unknown_name

AXES = ("dp_replicate", "dp_shard", "sp")
FSDP_GROUPS = ("none", "node", "global")  # parameters whole on every rank; sharded inside a node; over any ranks
MAX_ROWS = 16  # of the printed table
CPU = torch.device("cpu")
R = TypeVar("R")


@dataclass(frozen=True)
class Launch:
    """This process among those that the launcher started."""

    rank: int
    world_size: int
    local_rank: int  # on this node
    local_world_size: int  # ranks on this node
    master: tuple[str, int] | None = None  # where rank 0 listens; None = MASTER_ADDR and MASTER_PORT are set


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh; as it stands by default, one process without torch.distributed."""

    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 1))
    rank: int = 0
    local_world_size: int = 1  # ranks on a node
    device: torch.device = CPU
    axes: DeviceMesh | None = None  # AXES
    fsdp: DeviceMesh | None = None  # [fsdp] or [replicate, fsdp]: parameters are sharded over fsdp
    host_group: dist.ProcessGroup | None = None  # gloo, all ranks: for objects and agreements

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes.values())

    @property
    def num_dp(self) -> int:
        """Groups of ranks that see different samples: dp_replicate x dp_shard."""
        return self.world_size // self.sizes["sp"]

    @property
    def dp_rank(self) -> int:
        """Which of `num_dp` this rank is in; all ranks of an sp group are in the same."""
        return self.rank // self.sizes["sp"]

    @property
    def sp_rank(self) -> int:
        """Position in the sp group."""
        return self.rank % self.sizes["sp"]

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's samples; None when it is alone with them."""
        return self.axes.get_group("sp") if self.axes is not None and self.sizes["sp"] > 1 else None

    @property
    def is_first(self) -> bool:
        """Rank 0, which prints and writes what is written once."""
        return self.rank == 0

    @property
    def sp_crosses_nodes(self) -> bool:
        """An sp group has ranks on two nodes."""
        return self.local_world_size % self.sizes["sp"] != 0

    def equation(self, microbatch: int, accumulation: int) -> str:
        """Samples a step and their factors, in one line."""
        factors = {"microbatch": microbatch, "accumulation": accumulation} | self.sizes
        del factors["sp"]
        product = " x ".join(f"{name} {size}" for name, size in factors.items())
        return f"samples a step {math.prod(factors.values())} = {product}"

    def table(self) -> str:
        """Ranks by axes, a row an sp group, and what to know of them."""
        sp, per_node = self.sizes["sp"], self.local_world_size
        nodes = -(-self.world_size // per_node)
        head = f"{_count(self.world_size, 'rank')} on {_count(nodes, 'node')}: {_product(self.sizes)}"
        rows = [("ranks", "dp_replicate", "dp_shard", "sp", "node")]
        for group in range(min(self.num_dp, MAX_ROWS)):
            first, last = group * sp, group * sp + sp - 1
            replicate, shard = divmod(group, self.sizes["dp_shard"])
            span = _span(first // per_node, last // per_node)
            rows.append((_span(first, last), str(replicate), str(shard), _span(0, sp - 1), span))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            head,
            *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
        ]
        if self.num_dp > MAX_ROWS:
            lines.append(f"... and {self.num_dp - MAX_ROWS} more sp groups")
        if self.sp_crosses_nodes:
            lines.append(
                f"sp groups of {sp} lie across nodes of {_count(per_node, 'rank')}: every block exchanges activations between "
                f"nodes; an sp that divides {per_node} stays inside."
            )
        return "\n".join(lines)


ALONE = Mesh()
_number_launched = count()  # of this process; the ranks count alike, as they start and end together


@contextmanager
def launched(
    sizes: Mapping[str, int], fsdp_group: str = "global", environ: Mapping[str, str] | None = None
) -> Iterator[Mesh]:
    """Join the other ranks for the time of the block. UserError as `read_launch`, `make_mesh`, or without its GPU.

    One process that no launcher started never touches torch.distributed.
    """
    launch = read_launch(os.environ if environ is None else environ)
    check_sizes(sizes, launch.world_size if launch else 1)
    cuda = torch.cuda.is_available()
    if launch is None:
        yield Mesh(device=torch.device("cuda" if cuda else "cpu"))
        return
    if cuda and launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {launch.rank} is number {launch.local_rank} on its node, which has {torch.cuda.device_count()} GPUs; "
            "start one rank a GPU."
        )
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # A name of its own each time: in the launcher's store the ranks would find each other's addresses of the time before.
    store = dist.PrefixStore(f"launched/{next(_number_launched)}", _store(launch))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size)
    try:
        yield make_mesh(sizes, fsdp_group, device, launch.local_world_size)
    finally:
        dist.destroy_process_group()


@cache
def _store(launch: Launch) -> dist.Store:
    """Where the ranks meet, for the life of the process: its port cannot be opened twice."""
    place = "env://" if launch.master is None else f"tcp://{launch.master[0]}:{launch.master[1]}"
    return next(dist.rendezvous(place, launch.rank, launch.world_size))[0]


def make_mesh(
    sizes: Mapping[str, int], fsdp_group: str, device: torch.device, local_world_size: int | None = None
) -> Mesh:
    """The mesh over all ranks of torch.distributed, which is up; every rank calls it.

    fsdp_group        "none": parameters whole on every rank; "node": sharded over ranks of one node; "global": of any
    local_world_size  ranks on a node; all of them by default

    UserError as `check_sizes`, or for sizes that the fsdp_group cannot have.
    """
    world_size = dist.get_world_size()
    local_world_size = local_world_size or world_size
    check_sizes(sizes, world_size)
    replicate, shard, sp = (sizes[name] for name in AXES)
    _check_fsdp_group(fsdp_group, shard, sp, local_world_size)
    axes = init_device_mesh(device.type, (replicate, shard, sp), mesh_dim_names=AXES)
    if replicate > 1:
        fsdp = init_device_mesh(device.type, (replicate, shard * sp), mesh_dim_names=("replicate", "fsdp"))
    else:
        fsdp = init_device_mesh(device.type, (shard * sp,), mesh_dim_names=("fsdp",))
    return Mesh(
        {name: sizes[name] for name in AXES}, dist.get_rank(), local_world_size, device, axes, fsdp,
        host_group(),
    )  # fmt: skip


def host_group() -> dist.ProcessGroup:
    """A new gloo group of all ranks, for what lies on the CPU; every rank calls it."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def _check_fsdp_group(fsdp_group: str, shard: int, sp: int, local_world_size: int) -> None:
    if fsdp_group not in FSDP_GROUPS:
        raise unknown_name("fsdp_group", fsdp_group, FSDP_GROUPS)
    if fsdp_group == "none" and shard * sp > 1:
        raise UserError(
            f"the Plan shards no parameters (fsdp_group none) and has dp_shard {shard} and sp {sp}, whose ranks share them; "
            "use fsdp_group node or global, or dp_replicate alone."
        )
    if fsdp_group == "node" and local_world_size % (shard * sp):
        raise UserError(
            f"fsdp_group node shards over dp_shard {shard} x sp {sp} = {shard * sp} ranks of one node, which has {local_world_size}; "
            "use a product that divides it, or fsdp_group global."
        )


def read_launch(environ: Mapping[str, str]) -> Launch | None:
    """What torchrun, or srun with several tasks, says of this process; None without either. torchrun inside srun wins."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        return Launch(rank, world_size, _number(environ, "LOCAL_RANK"), _number(environ, "LOCAL_WORLD_SIZE"))
    if "SLURM_PROCID" not in environ or environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return None  # also a shell of an allocation, and a batch script: srun starts the tasks
    nodes = _expanded(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environ, "SLURM_NODEID")
    if node >= len(nodes):
        raise UserError(
            f"expected the tasks of {node + 1} or more nodes in SLURM_STEP_TASKS_PER_NODE, got "
            f"{environ.get('SLURM_STEP_TASKS_PER_NODE')!r}; start with srun, or with torchrun on each node."
        )
    port = 20000 + (_number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")) % 20000
    address = environ.get("MASTER_ADDR") or _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    master = address, int(environ.get("MASTER_PORT", port))
    ranks = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    return Launch(*ranks, _number(environ, "SLURM_LOCALID"), nodes[node], master)


def check_sizes(sizes: Mapping[str, int], world_size: int) -> None:
    """UserError unless the sizes name AXES, are positive and multiply to `world_size`; it names the nearest that do."""
    if sizes.keys() != set(AXES) or any(type(size) is not int or size < 1 for size in sizes.values()):
        raise UserError(
            f"expected a mesh of {', '.join(AXES)}, each a whole number from 1 up, got {dict(sizes)}; plan it again."
        )
    needed = math.prod(sizes.values())
    if needed == world_size:
        return
    near = "; ".join(_product(mesh) for mesh in nearest_meshes(sizes, world_size))
    raise UserError(
        f"the mesh {_product(sizes)} is for {_count(needed, 'rank')}, here {'is' if world_size == 1 else 'are'} {world_size}; "
        f"start {needed}, or plan one of the nearest meshes of {_count(world_size, 'rank')}: {near}."
    )


def nearest_meshes(sizes: Mapping[str, int], world_size: int, count: int = 3) -> list[dict[str, int]]:
    """The meshes of `world_size` ranks whose sizes differ least from `sizes`, by the sum of the factors between them."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    meshes = [
        dict(zip(AXES, (replicate, shard, world_size // replicate // shard), strict=True))
        for replicate in divisors
        for shard in divisors
        if world_size % (replicate * shard) == 0
    ]
    return sorted(meshes, key=lambda mesh: sum(abs(math.log(mesh[name] / sizes[name])) for name in AXES))[:count]


def on_first(group: dist.ProcessGroup | None, call: Callable[[], R]) -> R:
    """call() on the group's first rank; its result, or its error, on every rank. Without a group: call()."""
    if group is None:
        return call()
    first = dist.get_global_rank(group, 0)
    answer: list[R | Exception | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            answer[0] = call()
        except Exception as error:  # the other ranks wait for an answer
            dist.broadcast_object_list([_portable(error, first)], src=first, group=group)
            raise
    dist.broadcast_object_list(answer, src=first, group=group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]  # type: ignore[return-value]


def on_all(group: dist.ProcessGroup | None, call: Callable[[], R]) -> R:
    """call() on every rank of the group; where one fails, all raise its error. Without a group: call()."""
    if group is None:
        return call()
    result, failure = None, None
    try:
        result = call()
    except Exception as error:  # the other ranks would go on and wait for this one
        failure = error
    failures: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure and _portable(failure, dist.get_rank()), group=group)
    if failure is not None:
        raise failure
    if first := next((error for error in failures if error is not None), None):
        raise first
    return result  # type: ignore[return-value]


def agreed(mesh: Mesh, call: Callable[[], R]) -> R:
    """As on_all over the whole mesh, for what every step does: while no rank fails, one number is all that they exchange."""
    result, failure = None, None
    try:
        result = call()
    except Exception as error:
        failure = error

    def fail() -> None:
        if failure is not None:
            raise failure

    if over_ranks(mesh, [], [float(failure is not None)])[1][0]:
        on_all(mesh.host_group, fail)
    return result  # type: ignore[return-value]


def over_ranks(mesh: Mesh, to_mean: list[float], to_max: list[float]) -> tuple[list[float], list[float]]:
    """Means and maxima over all ranks, the same on each; every rank calls it with as many."""
    if mesh.axes is None:
        return to_mean, to_max
    found = []
    for values, op in ((to_mean, dist.ReduceOp.SUM), (to_max, dist.ReduceOp.MAX)):
        packed = torch.tensor(values, dtype=torch.float64, device=mesh.device)
        if values:
            dist.all_reduce(packed, op)
        found.append(packed.tolist())
    return [value / mesh.world_size for value in found[0]], found[1]


def _portable(error: Exception, rank: int) -> Exception:
    """As another rank shall see it: what a user can mend says it all, of anything else the rank is worth knowing."""
    if isinstance(error, UserError | OSError):
        return error
    return RuntimeError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "")
    if not value.isdigit():
        raise UserError(f"expected a number in {name}, got {value!r}; start with torchrun, or with srun.")
    return int(value)


def _expanded(counts: str) -> list[int]:
    """Slurm's "4(x2),3" -> 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", counts)
    return [int(tasks) for tasks, repeats in found for _ in range(int(repeats or 1))]


def _first_host(names: str) -> str:
    """Slurm's "gpu-[003-007,9],login" -> gpu-003."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", names)
    if not found:
        raise UserError(f"expected node names in SLURM_STEP_NODELIST, got {names!r}; set MASTER_ADDR to rank 0's node.")
    return "".join(part or "" for part in found.groups())


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {sizes[name]}" for name in AXES)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
