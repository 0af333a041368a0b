"""Cluster, Device, Link: hardware facts with units and the source of each number.

Declared facts come from a data sheet (`source` names it), measured ones from `vchitect-fast autotune probe` (`source` is
"measured" with the date). Nothing here measures; nothing here guesses: a fact nobody measured is None.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.files import write_text

SCHEMA_VERSION = 1
LINKS = ("device_to_host", "host_to_device", "intra_node", "inter_node", "disk")


@dataclass(frozen=True)
class Timing:
    """Seconds of one op on one device, median over repeats: a point that cost models interpolate between.

    linear      [rows, width] x [width, width] with bias; backward gives the gradients of input, weight and bias
    attention   scaled_dot_product_attention: `rows` query rows of `width` = heads x head dim in sequences of `length`
    multiply    a * b into new memory, [rows, width]
    gelu, layer_norm, rotate   [rows, width]; layer_norm over width, rotate the rotary of one tensor
    adamw       one fused AdamW update of rows x width fp32 parameters
    view        one operation that moves no data
    """

    op: str
    dtype: str
    rows: int
    width: int
    forward_s: float
    backward_s: float | None = None  # None: the op has none, or nobody asked
    length: int = 0
    num_repeats: int = 1
    spread: float = 0.0  # (p90 - p10) / median of the repeats: how quiet the machine was


@dataclass(frozen=True)
class AttentionPoint:
    """Declared FLOP/s of attention over `length` keys: 4 rows width length FLOPs forward, 2.5 times as many backward."""

    length: int
    forward_flops: float
    backward_flops: float
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class MatmulPoint:
    """Declared FLOP/s of [many rows, fan_in] x [fan_in, fan_out]."""

    fan_in: int
    fan_out: int
    flops: float
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU of one machine."""

    name: str  # as the driver or /proc/cpuinfo gives it
    kind: str  # "cuda" | "cpu"
    memory_bytes: int  # of the device; for a CPU, main memory that this process may use
    matmul_flops: dict[str, float] = field(
        default_factory=dict
    )  # achieved FLOP/s on large square matmuls, by dtype name
    memory_bytes_per_s: float | None = None  # copy, read + write
    num_threads: int = 1  # CPU threads used while measuring; 1 for a GPU
    attention_flops: dict[str, float] = field(default_factory=dict)  # achieved FLOP/s of scaled_dot_product_attention
    op_overhead_s: float | None = None  # smallest time of one small operation, launch included
    process_bytes: int | None = None  # resident bytes of a process that has loaded torch and this package
    timings: tuple[Timing, ...] = ()  # at several sizes, for efficiency that depends on size
    fit_error: float | None = None  # mean relative error of interpolating the timings, at sizes held out of them
    source: str = ""
    attention_points: tuple[AttentionPoint, ...] = ()  # declared, where there are no timings
    matmul_points: tuple[MatmulPoint, ...] = ()
    pressure_fraction: float | None = None  # of memory; above it the allocator gives memory back and takes it again
    remap_s_per_gib: float | None = None  # what one GiB given back and taken again costs

    @property
    def memory_gib(self) -> int:
        """Memory in whole GiB: as exactly as a Plan is bound to it."""
        return round(self.memory_bytes / 2**30)

    def fingerprint(self) -> str:
        """Twelve hex digits of what makes two devices interchangeable for a Plan: name, kind, threads, memory in GiB."""
        identity = [self.name, self.kind, self.num_threads, self.memory_gib]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Link:
    """A way between two places, as one device sees it.

    `points` are (bytes, bytes/s) of messages, latency taken off; between them the rate is interpolated in log size. Beyond
    the largest it is the largest's, below the smallest the smallest's. Without points it is `bytes_per_s` at every size.
    """

    name: str  # one of LINKS in a Cluster
    bytes_per_s: float  # of one device, one way, alone, large messages
    latency_s: float
    source: str
    both_ways_bytes_per_s: float | None = None  # each way, when both run; None: not known
    together_bytes_per_s: float | None = None  # of each device, when all of a node run; None: not known
    points: tuple[tuple[int, float], ...] = ()

    def seconds(self, num_bytes: float) -> float:
        """Of one message, alone: latency + bytes / rate; nothing to send takes no time."""
        return self.latency_s + num_bytes / self._rate(num_bytes) if num_bytes > 0 else 0.0

    def _rate(self, num_bytes: float) -> float:
        points = sorted(self.points)
        if not points:
            return self.bytes_per_s
        high = bisect.bisect_left(points, (num_bytes,))
        (small, slow), (large, fast) = points[max(0, high - 1)], points[min(high, len(points) - 1)]
        if small == large:
            return slow
        return slow * (fast / slow) ** (math.log(num_bytes / small) / math.log(large / small))


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices and the links between them."""

    name: str
    device: Device
    num_nodes: int = 1
    num_devices_per_node: int = 1
    host_memory_bytes: int = 0  # of one node
    links: tuple[Link, ...] = ()
    slowdown: dict[str, float] = field(
        default_factory=dict
    )  # compute takes so many times as long while a "copy" | "collective" runs
    codec_flops: float | None = None  # achieved FLOP/s of the VAE encoder

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.num_devices_per_node

    def link(self, name: str) -> Link:
        """The link of that name; UserError when the cluster has none, ValueError's kin for a name outside LINKS."""
        if name not in LINKS:
            raise unknown_name("link", name, LINKS)
        for link in self.links:
            if link.name == name:
                return link
        raise UserError(
            f"the cluster {self.name!r} has no link {name!r}, got {', '.join(link.name for link in self.links) or 'none'}; "
            "add it to the cluster's file, or measure it with `vchitect-fast autotune probe`."
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cluster:
        """Read what `to_json` wrote; UserError when it is of another schema or lacks a field."""
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"expected a cluster file of schema {SCHEMA_VERSION}, got {version}; run `vchitect-fast autotune probe` again."
            )
        try:
            rest = {k: v for k, v in values.items() if k not in {"schema_version", "device", "links"}}
            device = dict(values["device"])
            device["timings"] = tuple(Timing(**timing) for timing in device.get("timings", ()))
            device["attention_points"] = tuple(AttentionPoint(**p) for p in device.get("attention_points", ()))
            device["matmul_points"] = tuple(MatmulPoint(**p) for p in device.get("matmul_points", ()))
            links = (
                {**link, "points": tuple(tuple(p) for p in link.get("points", ()))} for link in values.get("links", ())
            )
            return cls(device=Device(**device), links=tuple(Link(**link) for link in links), **rest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not a cluster file ({error}); run `vchitect-fast autotune probe` again."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the cluster as JSON: to a temporary name, synced, then renamed."""
        write_text(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster JSON; UserError when the file is absent or is not JSON."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise UserError(
                f"cannot read the cluster file {path} ({error.strerror}); run `vchitect-fast autotune probe` first."
            ) from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}); run `vchitect-fast autotune probe` again.") from None
