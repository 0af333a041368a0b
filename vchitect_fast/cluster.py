"""Cluster, Device, Link: hardware facts with units and the source of each number.

Measured facts come from `vchitect-fast autotune probe` (JSON; `source` is "measured" with the date), declared ones from a
YAML file that a person wrote (cluster_yaml.py); some of those are shipped and known by name (clusters/, `known()`).
Nothing here measures; nothing here guesses: a fact that nobody measured is None. Refused: a number below zero, an unknown
field (the nearest is named), a file of another schema.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.files import write_text

SCHEMA_VERSION = 1  # a field that came later has a default, so that older files are read
SHIPPED = Path(__file__).parent / "clusters"
LINKS = ("device_to_host", "host_to_device", "intra_node", "inter_node", "disk")
COLLECTIVES = (
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "all_reduce",
)  # "intra_node/all_gather" is a link of its own
SLOWDOWNS = ("copy", "collective")


@dataclass(frozen=True)
class Timing:
    """Seconds of one op on one device, median over repeats: a point that cost models interpolate between.

    linear      [rows, width] x [width, width] with bias; backward gives the gradients of input, weight and bias
    attention   scaled_dot_product_attention: `rows` query rows of `width` = heads x head dim in sequences of `length`
    multiply    a * b into new memory, [rows, width]
    gelu, layer_norm, rotate   [rows, width]; layer_norm over width, rotate the rotary of one tensor
    adamw       one fused AdamW update of rows x width fp32 parameters
    view        one operation that moves no data
    checkpoint  what torch's checkpoint adds to one block beside computing it again: the host's time, at any size
    frame       the same where some groups are kept or moved (offload/groups.py), the checkpoint's included
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
    matmul_flops: dict[str, float] = field(default_factory=dict)  # achieved FLOP/s of large square matmuls, by dtype
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

    def __post_init__(self) -> None:
        where = f"device {self.name!r}"
        positive = ("memory_bytes", "memory_bytes_per_s", "num_threads", "op_overhead_s", "pressure_fraction")
        _check(where, self, positive=positive, rest=("process_bytes", "remap_s_per_gib", "fit_error"))
        for rates in (self.matmul_flops, self.attention_flops):
            for dtype, rate in rates.items():
                _check_number(f"the FLOP/s of {where} in {dtype}", rate, above_zero=True)
        for point in (*self.attention_points, *self.matmul_points):
            _check(f"{type(point).__name__} of {where}", point, positive=[n for n in vars(point) if n != "dtype"])
        if self.pressure_fraction is not None and self.pressure_fraction > 1:
            raise UserError(
                f"pressure_fraction of {where} must be in (0, 1], got {self.pressure_fraction}; correct it."
            )

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

    name: str  # one of LINKS, or a place and a collective, as "intra_node/all_gather"
    bytes_per_s: float  # of one device, one way, alone, large messages
    latency_s: float
    source: str
    both_ways_bytes_per_s: float | None = None  # each way, when both run; None: not known
    together_bytes_per_s: float | None = None  # of each device, when all of a node run; None: not known
    points: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        where = f"link {self.name!r}"
        _check(
            where, self, positive=("bytes_per_s", "both_ways_bytes_per_s", "together_bytes_per_s"), rest=("latency_s",)
        )
        for size, rate in self.points:
            _check_number(f"a point of {where}", size, above_zero=True)
            _check_number(f"a point of {where}", rate, above_zero=True)

    @property
    def place(self) -> str:
        """The name without a collective: "intra_node" of "intra_node/all_gather"."""
        return self.name.partition("/")[0]

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
    slowdown: dict[str, float] = field(default_factory=dict)  # of compute while a "copy" | "collective" runs; 1.0: none
    codec_flops: float | None = None  # achieved FLOP/s of the VAE encoder
    sources: dict[str, str] = field(default_factory=dict)  # of the facts of a YAML file, by their place in it

    def __post_init__(self) -> None:
        where = f"cluster {self.name!r}"
        _check(where, self, positive=("num_nodes", "num_devices_per_node", "codec_flops"), rest=("host_memory_bytes",))
        for what, factor in self.slowdown.items():
            if what not in SLOWDOWNS:
                raise unknown_name("slowdown", what, SLOWDOWNS)
            _check_number(f"slowdown {what!r} of {where}", factor, above_zero=True)

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.num_devices_per_node

    def link(self, name: str) -> Link:
        """The link of that name, one of LINKS; UserError when the cluster has none."""
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
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not a cluster file ({error}); run `vchitect-fast autotune probe` again."
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the cluster as JSON: to a temporary name, synced, then renamed."""
        write_text(path, json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read the probe's JSON, a YAML file, or the shipped cluster of that name.

        path  ends in .json, .yaml or .yml; anything else is a name, one of `known()`

        UserError when the file is absent, damaged, of another schema, or the name is unknown.
        """
        path = Path(path)
        if path.suffix not in (".json", ".yaml", ".yml"):
            if str(path) not in known():
                if path.is_file():
                    raise UserError(
                        f"expected a cluster file that ends in .json, .yaml or .yml, got {path}; rename it."
                    )
                raise unknown_name("cluster", str(path), known())
            path = SHIPPED / f"{path}.yaml"
        remedy = "run `vchitect-fast autotune probe`" if path.suffix == ".json" else "give a file that is there"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot read the cluster file {path} ({error.strerror}); {remedy}, or name one of {', '.join(known())}."
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not text; {remedy}.") from None
        if path.suffix != ".json":
            from vchitect_fast.cluster_yaml import from_yaml

            return from_yaml(text, str(path))
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}); {remedy} again.") from None


def known() -> tuple[str, ...]:
    """Names of the shipped clusters."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def _check(where: str, facts: object, *, positive: Sequence[str], rest: Sequence[str] = ()) -> None:
    for name in (*positive, *rest):
        value = getattr(facts, name)
        if value is not None:
            _check_number(f"{name} of {where}", value, above_zero=name in positive)


def _check_number(what: str, value: Any, *, above_zero: bool) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (above_zero and value == 0):
        bound = "above 0" if above_zero else "0 or more"
        raise UserError(f"{what} must be a number {bound}, got {value!r}; correct the cluster's file.")
