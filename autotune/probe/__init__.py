"""Measures this machine, with one process or with all ranks of torchrun -> a Cluster: rates, links and their source.

    ops            linear layers, attention, elementwise passes, AdamW, memory            -> Cluster.device
    host_link      host memory and back: each way, both ways, all ranks of a node         -> device_to_host, host_to_device
    exchanges      all_to_all, all_gather, reduce_scatter, all_reduce over sizes          -> intra_node, inter_node, .../KIND
    contention     compute beside copies and beside collectives                           -> Cluster.slowdown
    data           SD3's encoder; with clips their disk, and decoding                     -> Cluster.codec_flops, disk

Every number is the median of several repeats and says how far they spread. What cannot be measured here is left out and
the reason is said; nothing is made up in its place. All ranks measure at once, as they train; rank 0's view is the result.
It decides nothing. Needs torch.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from vchitect_fast.autotune.probe.bar import Bar, bars
from vchitect_fast.autotune.probe.contention import beside_collectives, beside_copies
from vchitect_fast.autotune.probe.data import measure_codec, measure_decode, measure_disk
from vchitect_fast.autotune.probe.exchanges import measure_exchanges, places
from vchitect_fast.autotune.probe.host_link import measure_host_link, open_copies
from vchitect_fast.autotune.probe.ops import CPU_GRID, CUDA_GRID, Grid, measure_ops
from vchitect_fast.clips import read_clips
from vchitect_fast.cluster import COLLECTIVES, Cluster, Device, Link
from vchitect_fast.errors import UserError
from vchitect_fast.machine import host_memory_bytes, this_device
from vchitect_fast.manifest import Clip
from vchitect_fast.parallel.mesh import Mesh, launched, on_all, on_first, read_launch

__all__ = ["CPU_SIZES", "CUDA_SIZES", "Grid", "Sizes", "is_first", "measure", "probe"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """What is timed; () leaves a part out."""

    ops: Grid
    copies: tuple[int, ...]  # bytes to host memory and back
    slab_bytes: int  # of host memory that is set up
    collectives: tuple[int, ...]  # bytes of the whole tensor on one rank
    side: int  # of the matrix product beside copies and collectives
    mini_batches: tuple[int, ...]  # frames that the codec encodes at once
    frame_side: int  # pixels
    disk_bytes: int  # of clips that are read
    num_clips: int  # that are decoded


CPU_SIZES = Sizes(
    CPU_GRID, copies=(2**20, 2**24, 2**28), slab_bytes=2**28, collectives=tuple(2**k for k in range(12, 26, 2)), side=1024,
    mini_batches=(1, 2), frame_side=64, disk_bytes=2**27, num_clips=5,
)  # fmt: skip
CUDA_SIZES = Sizes(
    CUDA_GRID, copies=(2**20, 2**24, 2**28), slab_bytes=2**32, collectives=tuple(2**k for k in range(14, 30, 2)), side=8192,
    mini_batches=(1, 2, 4, 8, 16), frame_side=512, disk_bytes=2**30, num_clips=10,
)  # fmt: skip


def probe(
    progress: bool = True, sizes: Sizes | None = None, manifest: str | None = None, say: Say | None = None
) -> Cluster:
    """Measure this machine and, where torchrun or Slurm started ranks, the links between all of them.

    progress  a bar on standard error
    sizes     what to time; CPU_SIZES or CUDA_SIZES by default
    manifest  of clips whose files are read and decoded, or tars (clips.py); None leaves disk and decoding out
    say       gets a line for each part that is left out, and why; standard error by default

    The same Cluster on every rank; `is_first` tells who writes it. UserError as `launched`, and for clips that are not there.
    """
    launch = read_launch(os.environ)
    ranks = launch.world_size if launch else 1
    with launched({"dp_replicate": 1, "dp_shard": ranks, "sp": 1}) as mesh:
        sizes = sizes or (CUDA_SIZES if mesh.device.type == "cuda" else CPU_SIZES)
        return measure(mesh, sizes, progress, manifest, say or (lambda line: print(line, file=sys.stderr)))


def is_first() -> bool:
    """This process writes what all ranks measured: it is rank 0, or the only one."""
    launch = read_launch(os.environ)
    return launch is None or launch.rank == 0


def measure(mesh: Mesh, sizes: Sizes, progress: bool, manifest: str | None, say: Say) -> Cluster:
    """The same with ranks that are there already. Every rank calls it; rank 0's Cluster on all."""
    if not mesh.is_first:
        progress, say = False, _silent
    found = this_device(mesh.device.index or 0)
    source = _source(mesh, found)
    files = on_all(mesh.host_group, lambda: read_clips(manifest) if manifest else [])
    with bars(progress) as bar:
        device = on_all(
            mesh.host_group, lambda: measure_ops(replace(found, source=source), mesh.device, sizes.ops, bar)
        )
        links, slowdown = _copies(mesh, sizes, source, bar, say)
        more, beside = _collectives(mesh, sizes, source, bar, say)
        with bar("the codec", len(sizes.mini_batches)) as advance:
            codec = on_all(mesh.host_group, lambda: _codec(mesh, sizes, advance, say))
        disk = on_first(mesh.host_group, lambda: _data(files, sizes, source, say))
    nodes = mesh.world_size // mesh.local_world_size
    cluster = Cluster(
        name=f"this machine: {found.name}" if nodes == 1 else f"{nodes} nodes like this one: {found.name}",
        device=device,
        num_nodes=nodes,
        num_devices_per_node=mesh.local_world_size,
        host_memory_bytes=host_memory_bytes(),
        links=(*links, *more, *disk),
        slowdown=slowdown | beside,
        codec_flops=max(codec.values(), default=None),
        sources=_sources(slowdown | beside, codec, sizes, source),
    )
    return on_first(mesh.host_group, lambda: cluster)


def _copies(mesh: Mesh, sizes: Sizes, source: str, bar: Bar, say: Say) -> tuple[tuple[Link, ...], dict[str, float]]:
    if not sizes.copies:
        return (), {}
    with bar("copies to host memory", 2 * len(sizes.copies) + 2) as advance:
        try:
            links = measure_host_link(mesh, sizes.copies, sizes.slab_bytes, source, advance)
            copies = on_all(mesh.host_group, lambda: open_copies(max(sizes.copies), mesh.device))
        except UserError as error:  # on all ranks
            say(f"the host link is not measured: {error}")
            return (), {}
        ratio = beside_copies(mesh, copies, sizes.side)
        advance()
    return links, _slowdown("copy", ratio, say)


def _collectives(
    mesh: Mesh, sizes: Sizes, source: str, bar: Bar, say: Say
) -> tuple[tuple[Link, ...], dict[str, float]]:
    if mesh.world_size == 1:
        say("links between devices are not measured: there is one rank; start one a device with torchrun.")
        return (), {}
    links: list[Link] = []
    groups = places(mesh)
    with bar("collectives", len(groups) * len(COLLECTIVES) * len(sizes.collectives) + 1) as advance:
        for place in groups:
            links += measure_exchanges(mesh, place, sizes.collectives, source, advance)
        ratio = beside_collectives(mesh, groups[0].group, max(sizes.collectives), sizes.side)
        advance()
    return tuple(links), _slowdown("collective", ratio, say)


def _slowdown(what: str, ratio: float | None, say: Say) -> dict[str, float]:
    if ratio is None:
        say(f"what a {what} costs other work is not measured: too few products ran beside it.")
        return {}
    return {what: ratio}


def _codec(mesh: Mesh, sizes: Sizes, advance: Callable[[], None], say: Say) -> dict[int, float]:
    """FLOP/s by mini-batch; nothing where it cannot run."""
    try:
        return measure_codec(mesh.device, sizes.mini_batches, sizes.frame_side, advance) if sizes.mini_batches else {}
    except UserError as error:
        say(f"the codec is not measured: {error}")
        return {}


def _sources(slowdown: dict[str, float], codec: dict[int, float], sizes: Sizes, source: str) -> dict[str, str]:
    """Of what is no Device and no Link, by its place in the Cluster."""
    found = {
        f"slowdown.{what}": f"{source}; a product of side {sizes.side} beside a {what}, over the same alone"
        for what in slowdown
    }
    if codec:
        rates = ", ".join(f"{number} at once {flops / 1e9:,.1f}" for number, flops in codec.items())
        side = sizes.frame_side
        found["codec_flops"] = f"{source}; SD3's encoder, random weights, frames of {side}x{side}, GFLOP/s: {rates}"
    return found


def _data(files: list[Clip], sizes: Sizes, source: str, say: Say) -> tuple[Link, ...]:
    """The disk's Link, decoding in its source; on the first rank."""
    if not files:
        say("disk and decoding are not measured: no clips are given; give --manifest.")
        return ()
    try:
        rate, text = measure_decode(files, sizes.num_clips)
        said = f"one thread decodes {rate / 1e6:,.1f} million source pixels a second ({text})"
    except UserError as error:
        said = f"decoding is not measured: {error}"
    say(said)
    try:
        link = measure_disk(files, sizes.disk_bytes, source)
    except UserError as error:
        say(f"the disk is not measured: {error}")
        return ()
    return (replace(link, source=f"{link.source}; {said}"),)


def _source(mesh: Mesh, device: Device) -> str:
    """When, by what, on what."""
    nodes, ranks = mesh.world_size // mesh.local_world_size, mesh.world_size
    parts = [
        f"measured {datetime.now(UTC).date().isoformat()} by vchitect-fast autotune probe",
        f"torch {torch.__version__}",
    ]
    if device.kind == "cpu":
        parts.append(f"{device.num_threads} threads")
    else:
        parts.append(f"CUDA {torch.version.cuda}")
    parts.append(f"{platform.system()} {platform.release()}")
    if ranks > 1:
        parts.append(f"{'NCCL' if device.kind == 'cuda' else 'gloo'}, {ranks} ranks on {nodes} nodes at once")
    return ", ".join(parts)


def _silent(line: str) -> None:
    """Of ranks other than the first."""
