"""One block's forward and backward under every way of sequence parallelism: bytes, messages, and the time left exposed.

    python -m vchitect_fast.benchmarks.parallel --ranks 4                        starts gloo ranks on this machine
    torchrun --nproc-per-node=8 -m vchitect_fast.benchmarks.parallel             NCCL where there are GPUs

Bytes and messages are counted at torch.distributed (link.py) and exact. Times:
    on GPUs    real: the layer's, and how much shorter it is when its exchanges move nothing (exposed)
    on a CPU   the compute is measured in CPU time, the link is SIMULATED: each is scaled so that a volume takes as large a
               part of our layer's compute here as it does of a 2B layer at 40x768x432 on as many H100s, by arithmetic from
               peak FLOP/s (data sheet) and NCCL's effective bandwidth (nccl-tests issues 212, 290); latency is assumed.
Ways take turns within a round; a round's time is that of its slowest rank. Ratios are to the first way, ours by frames.
Records go to benchmarks/results/ (`--out` elsewhere). Not measured: several layers, FSDP's collectives beside these.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from vchitect_fast.architecture import TransformerConfig, preset
from vchitect_fast.benchmarks.case import Sizes
from vchitect_fast.benchmarks.exchanges import WAYS, Layer, Way
from vchitect_fast.benchmarks.link import Event, Watch, exposed_s
from vchitect_fast.benchmarks.record import BOTH, Record, append, origin, results_file
from vchitect_fast.benchmarks.timing import Clock, Samples, Work, summary
from vchitect_fast.cluster import Link
from vchitect_fast.errors import UserError
from vchitect_fast.parallel.mesh import Mesh, launched, read_launch
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

PEAK_FLOPS = 989e12  # H100 SXM, bf16 dense; NVIDIA's data sheet
LATENCY_S = 20e-6  # assumed
LINKS = (
    Link("NVLink 4", 370e9, LATENCY_S, "nccl-tests issue 212: effective, of 450"),
    Link("400 Gb/s InfiniBand", 46e9, LATENCY_S, "nccl-tests issue 290: effective, a NIC a GPU"),
)
THERE = VideoShape.parse("40x768x432")[0]  # what the simulated links are scaled to, with 333 text tokens
CPU_SIZES, CUDA_SIZES = "8,32,8,8", "40,1296,333,24"  # frames, visual and text tokens a frame, heads


@dataclass(frozen=True)
class Traffic:
    """What one rank did under one way: counts of a layer, and its samples."""

    sent_bytes: int
    num_collectives: int
    num_messages: int
    compute_s: tuple[float, ...]  # a round each; on a GPU, of the layer whose exchanges move nothing
    events: tuple[tuple[Event, ...], ...] = ()  # a round each
    layer_s: tuple[float, ...] = ()  # on a GPU only


@dataclass(frozen=True)
class Row:
    """A way over a link: what all ranks send, and the time of the slowest."""

    way: str
    link: str
    num_ranks: int
    sent_bytes: int  # all ranks together
    num_collectives: int
    num_messages: int  # all ranks together
    volumes: float | None  # sent_bytes over what one all-to-all of [B, T, J, D] sends; None for one rank
    layer: Samples
    exposed_s: float


def watch_rank(mesh: Mesh, config: TransformerConfig, sizes: Sizes, rounds: int) -> dict[str, Traffic]:
    """By way, on this rank; every rank calls it. The group is all ranks."""
    assert mesh.axes is not None
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    group = mesh.axes.get_group("sp")
    layers = {way.name: Layer(way, config, sizes, group, mesh.device, dtype) for way in WAYS}
    clock = Clock(mesh.device)
    found = {name: _sample(layer, clock) for name, layer in layers.items()}  # warms up; the counts stay
    samples: dict[str, list[Traffic]] = {name: [] for name in layers}
    for _ in range(rounds):
        for name, layer in layers.items():
            dist.barrier()
            samples[name].append(_sample(layer, clock))
    return {
        name: replace(
            found[name],
            compute_s=tuple(one.compute_s[0] for one in many),
            events=tuple(one.events[0] for one in many),
            layer_s=tuple(one.layer_s[0] for one in many if one.layer_s),
        )
        for name, many in samples.items()
    }


def _sample(layer: Layer, clock: Clock) -> Traffic:
    if clock.device.type == "cpu":
        with Watch() as watch:
            layer.run()
            compute_s = watch.now_s()
        layer_s: tuple[float, ...] = ()
    else:
        work = Work(lambda _: layer.run())
        with Watch() as watch:
            layer_s = (clock.sample_s(work),)
        dist.barrier()
        with Watch(silent=True):
            compute_s = clock.sample_s(work)
    counts = watch.sent_bytes, watch.num_collectives, watch.num_messages
    return Traffic(*counts, (compute_s,), (tuple(watch.events),), layer_s)


def scaled(link: Link, num_ranks: int, sizes: Sizes, compute_s: float) -> Link:
    """A link as fast beside a layer that computes for `compute_s` here as `link` is beside a 2B layer on as many H100s."""
    there = Workload(preset("vchitect-2b"), THERE, 1, 333)
    flops = 3 * (there.linear_flops() + there.attention_flops()) / num_ranks
    slower = compute_s / (flops / PEAK_FLOPS)
    there_bytes = Sizes.of(THERE, 333, 24, 64).rows * there.config.hidden_dim * 2  # bf16
    here_bytes = sizes.rows * sizes.D * 4  # fp32
    return replace(
        link, bytes_per_s=link.bytes_per_s / slower * here_bytes / there_bytes, latency_s=link.latency_s * slower
    )


def rows(by_rank: Sequence[Mapping[str, Traffic]], sizes: Sizes) -> list[Row]:
    """Every way over every link; on a GPU over NCCL."""
    num_ranks, first = len(by_rank), WAYS[0].name
    if by_rank[0][first].layer_s:
        return [_row(way, "NCCL", [rank[way.name] for rank in by_rank], sizes, None) for way in WAYS]
    compute_s = max(summary(rank[first].compute_s).median_s for rank in by_rank)
    return [
        _row(way, f"simulated {link.name}", [rank[way.name] for rank in by_rank], sizes, near)
        for link in LINKS
        for near in [scaled(link, num_ranks, sizes, compute_s)]
        for way in WAYS
    ]


def _row(way: Way, name: str, ranks: Sequence[Traffic], sizes: Sizes, link: Link | None) -> Row:
    layer_s, waited_s = [], []
    for number in range(len(ranks[0].compute_s)):
        if link is None:
            slowest, waited = max((one.layer_s[number], one.layer_s[number] - one.compute_s[number]) for one in ranks)
        else:
            waits = [(one.compute_s[number], exposed_s(one.events[number], link)) for one in ranks]
            slowest, waited = max((compute + wait, wait) for compute, wait in waits)
        layer_s.append(slowest)
        waited_s.append(waited)
    sent = sum(one.sent_bytes for one in ranks)
    itemsize = 4 if link else 2
    volume = sizes.rows * sizes.D * itemsize * (len(ranks) - 1) / len(ranks)
    return Row(
        way.name, name, len(ranks), sent, ranks[0].num_collectives, sum(one.num_messages for one in ranks),
        sent / volume if volume else None, summary(layer_s), max(0.0, summary(waited_s).median_s),
    )  # fmt: skip


def table(found: Sequence[Row]) -> str:
    """For people. Volumes are of forward and backward together."""
    lines = []
    for link in dict.fromkeys(row.link for row in found):
        at = [row for row in found if row.link == link]
        lines.append(f"{link}, {at[0].num_ranks} ranks")
        lines.append(
            f"  {'way':<32}{'MB sent':>9}{'volumes':>9}{'exchanges':>11}{'messages':>10}{'exposed':>9}{'layer':>9}"
        )
        for row in at:
            volumes = "-" if row.volumes is None else f"{row.volumes:.2f}"
            part, ratio = row.exposed_s / row.layer.median_s, row.layer.median_s / at[0].layer.median_s
            lines.append(
                f"  {row.way:<32}{row.sent_bytes / 1e6:>9.2f}{volumes:>9}{row.num_collectives:>11}{row.num_messages:>10}"
                f"{part:>9.1%}{ratio:>8.2f}x"
            )
    return "\n".join(lines)


def to_record(row: Row, sizes: Sizes, dtype: str, command: str) -> Record:
    """median_s is the layer's time, of which exposed_s waits; simulated where the shape says so."""
    shape = f"{row.num_ranks} ranks, {sizes.T}x({sizes.S}+{sizes.N}) tokens, D {sizes.D}, {row.link}"
    return Record(
        bench="sequence parallelism", provider=row.way, shape=shape, dtype=dtype, direction=BOTH, **asdict(row.layer),
        rate=None, unit=None, error_vs_fp64=None, ceiling=None, saved_bytes=None, exposed_s=row.exposed_s,
        sent_bytes=row.sent_bytes, num_messages=row.num_messages, **asdict(origin(command)),
    )  # fmt: skip


def parse_sizes(text: str) -> Sizes:
    """ "8,32,8,8": frames, visual and text tokens a frame, heads of 64 columns. UserError."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"expected --sizes frames,visual,text,heads such as {CPU_SIZES}, got {text!r}; give four numbers."
        )
    T, S, N, H = map(int, parts)
    return Sizes(1, T, S, N, H, 64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one sentence for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m vchitect_fast.benchmarks.parallel", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks to start where no launcher did (2)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each way (7)")
    parser.add_argument("--sizes", help=f"frames,visual,text,heads; {CPU_SIZES} on a CPU, {CUDA_SIZES} on a GPU")
    parser.add_argument("--out", type=Path, help="Records go here instead of benchmarks/results/DEVICE.jsonl")
    args = parser.parse_args(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        launch = read_launch(os.environ)
        if launch is None:
            return _start_ranks(args.ranks, given)
        with launched({"dp_replicate": 1, "dp_shard": 1, "sp": launch.world_size}) as mesh:
            return _measure(mesh, args, given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _start_ranks(num_ranks: int, given: Sequence[str]) -> int:
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, *start, "-m", "vchitect_fast.benchmarks.parallel", *given]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def _measure(mesh: Mesh, args: argparse.Namespace, given: Sequence[str]) -> int:
    on_gpu = mesh.device.type == "cuda"
    sizes = parse_sizes(args.sizes or (CUDA_SIZES if on_gpu else CPU_SIZES))
    if mesh.world_size > sizes.H:
        raise UserError(
            f"expected at most {sizes.H} ranks for {sizes.H} heads, got {mesh.world_size}; give more heads in --sizes."
        )
    torch.set_num_threads(1)
    config = replace(
        preset("vchitect-2b"), num_attention_heads=sizes.H, attention_head_dim=sizes.C, caption_projection_dim=sizes.D
    )
    traffic = watch_rank(mesh, config, sizes, args.rounds)
    by_rank: list[dict[str, Traffic]] = [{} for _ in range(mesh.world_size)]
    dist.all_gather_object(by_rank, traffic, group=mesh.host_group)
    if mesh.is_first:
        found = rows(by_rank, sizes)
        print(table(found), flush=True)
        command = " ".join(["python -m vchitect_fast.benchmarks.parallel", *given])
        records = [to_record(row, sizes, "bfloat16" if on_gpu else "float32", command) for row in found]
        out = args.out or results_file(records[0].device)
        for record in records:
            append(out, record)
        print(f"{len(records)} Records in {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
