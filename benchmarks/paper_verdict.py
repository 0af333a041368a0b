"""What the predictions of Table IV say beside the paper's: ratios within a row, order, gains, and what they hang on.

Times between rows cannot be compared without the batch, which the paper does not state; so a row's unit is its own time of
recomputation, the one strategy that runs in all four, and one factor over the whole table is fitted for the seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vchitect_fast.benchmarks.paper_table import COMBINATION, CONFIG, HOST_LINKS, NUM_TEXT_TOKENS, RECOMPUTATION, Cell
from vchitect_fast.cluster import Cluster, Device, Link
from vchitect_fast.shapes import VideoShape
from vchitect_fast.workload import Workload

WITHIN = 0.10  # what a ratio may be off by
WHAT_IF_REMAP_S = 0.02  # nobody's figure: shows what a cost of memory pressure would do


@dataclass(frozen=True)
class Ratio:
    """A cell's time over that of recomputation, the one strategy that every row has."""

    cell: Cell
    predicted: float
    paper: float

    @property
    def error(self) -> float:
        """Predicted / paper - 1."""
        return self.predicted / self.paper - 1


@dataclass(frozen=True)
class Summary:
    """What the whole table says."""

    factor: float
    num_cells: int
    num_agreeing: int
    num_ratios: int
    num_within: int  # of WITHIN
    worst: float  # error of a ratio
    out_of_order: list[tuple[str, str, str]]
    gains: dict[str, tuple[float, float]]
    knees: dict[str, float]


def summary(cells: Sequence[Cell]) -> Summary:
    """Counts over all cells."""
    found = ratios(cells)
    return Summary(
        factor=factor(cells),
        num_cells=len(cells),
        num_agreeing=sum(cell.agrees for cell in cells),
        num_ratios=len(found),
        num_within=sum(abs(ratio.error) <= WITHIN for ratio in found),
        worst=max((ratio.error for ratio in found), key=abs),
        out_of_order=out_of_order(cells),
        gains=gains(cells),
        knees={cell.shape: cell.knee for cell in cells},
    )


def ratios(cells: Sequence[Cell]) -> list[Ratio]:
    """Of every cell that runs in the paper and here, but recomputation itself."""
    base = {cell.shape: cell for cell in cells if cell.strategy == RECOMPUTATION}
    found = []
    for cell in cells:
        unit = base[cell.shape]
        if cell is unit or cell.step_s is None or unit.step_s is None or isinstance(cell.paper, str):
            continue
        assert not isinstance(unit.paper, str)
        found.append(Ratio(cell, cell.step_s / unit.step_s, cell.paper / unit.paper))
    return found


def factor(cells: Sequence[Cell]) -> float:
    """The one fitted number: the paper's seconds over the predicted ones, least squares of logarithms."""
    logs = [math.log(cell.paper / cell.step_s) for cell in cells if cell.step_s and not isinstance(cell.paper, str)]
    return math.exp(sum(logs) / len(logs))


def own_factor(cells: Sequence[Cell], shape: str) -> float:
    """What `factor` would be for one row alone: how its batch differs from the other rows', if nothing else does."""
    return factor([cell for cell in cells if cell.shape == shape])


def times_flops(shape: str, of: str) -> float:
    """Training FLOPs of one sample, in units of another shape's."""
    flops = (Workload(CONFIG, VideoShape.parse(x)[0], 1, NUM_TEXT_TOKENS).train_flops() for x in (shape, of))
    return next(flops) / next(flops)


def out_of_order(cells: Sequence[Cell]) -> list[tuple[str, str, str]]:
    """(shape, faster, slower) of every two strategies that the paper orders one way and the prediction the other."""
    timed = [
        (cell, cell.paper, cell.run.hidden_s) for cell in cells if not (cell.run.failure or isinstance(cell.paper, str))
    ]
    return [
        (a.shape, a.strategy, b.strategy)
        for a, paper_a, predicted_a in timed
        for b, paper_b, predicted_b in timed
        if a.shape == b.shape and paper_a < paper_b and predicted_a > predicted_b
    ]


def gains(cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """How much less time combination takes than recomputation, by shape: predicted, paper's."""
    found = {ratio.cell.shape: ratio for ratio in ratios(cells) if ratio.cell.strategy == COMBINATION}
    return {shape: (1 - ratio.predicted, 1 - ratio.paper) for shape, ratio in found.items()}


def variants(cluster: Cluster) -> dict[str, Cluster]:
    """The cluster with the numbers that decide the table changed one at a time."""
    device = cluster.device
    no_source = replace(device, remap_s_per_gib=WHAT_IF_REMAP_S)
    return {
        "as declared": cluster,
        "host link 20 % slower": replace(cluster, links=_host_links(cluster, 0.8)),
        "host link 20 % faster": replace(cluster, links=_host_links(cluster, 1.2)),
        "each way as fast as alone": replace(cluster, links=_host_links(cluster, 1.0, alone=True)),
        "two neighbours share a PCIe switch": replace(cluster, links=_host_links(cluster, 0.5, alone=True)),
        "compute 20 % slower": replace(cluster, device=_compute(device, 0.8)),
        "compute 20 % faster": replace(cluster, device=_compute(device, 1.2)),
        "half of the host memory": replace(cluster, host_memory_bytes=cluster.host_memory_bytes // 2),
        f"pressure {1000 * WHAT_IF_REMAP_S:.0f} ms a GiB (no source)": replace(cluster, device=no_source),
    }


def _host_links(cluster: Cluster, times: float, *, alone: bool = False) -> tuple[Link, ...]:
    """So many times as fast; `alone`: also while other copies run."""

    def changed(link: Link) -> Link:
        both, together = link.both_ways_bytes_per_s, link.together_bytes_per_s
        return replace(
            link,
            bytes_per_s=times * link.bytes_per_s,
            both_ways_bytes_per_s=None if alone or both is None else times * both,
            together_bytes_per_s=None if alone or together is None else times * together,
        )

    return tuple(changed(link) if link.name in HOST_LINKS else link for link in cluster.links)


def _compute(device: Device, times: float) -> Device:
    """Products and attention so many times as fast; what is bound by memory stays."""
    return replace(
        device,
        matmul_flops={dtype: times * flops for dtype, flops in device.matmul_flops.items()},
        matmul_points=tuple(replace(p, flops=times * p.flops) for p in device.matmul_points),
        attention_points=tuple(
            replace(p, forward_flops=times * p.forward_flops, backward_flops=times * p.backward_flops)
            for p in device.attention_points
        ),
    )
