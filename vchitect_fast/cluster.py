"""Cluster, Device, Link: hardware facts with units and the source of each number.

Declared facts come from a data sheet (`source` names it), measured ones from `vchitect-fast autotune probe` (`source` is
"measured" with the date). Nothing here measures; nothing here guesses: a fact nobody measured is None.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vchitect_fast.errors import UserError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU of one machine."""

    name: str  # as the driver or /proc/cpuinfo gives it
    kind: str  # "cuda" | "cpu"
    memory_bytes: int  # of the device; for a CPU, main memory that this process may use
    matmul_flops: dict[str, float]  # achieved FLOP/s on large square matmuls, by dtype name
    memory_bytes_per_s: float  # copy, read + write
    num_threads: int = 1  # CPU threads used while measuring; 1 for a GPU
    attention_flops: dict[str, float] = field(default_factory=dict)  # achieved FLOP/s of scaled_dot_product_attention
    op_overhead_s: float | None = None  # smallest time of one small operation, launch included
    process_bytes: int | None = None  # resident bytes of a process that has loaded torch and this package
    source: str = ""

    def fingerprint(self) -> str:
        """Twelve hex digits of what makes two devices interchangeable for a Plan: name, kind, threads, memory in GiB."""
        identity = [self.name, self.kind, self.num_threads, round(self.memory_bytes / 2**30)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Link:
    """A way between two places: GPU to GPU in a node, node to node, host to device."""

    name: str
    bytes_per_s: float  # one way, alone
    latency_s: float
    source: str


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices and the links between them."""

    name: str
    device: Device
    num_nodes: int = 1
    num_devices_per_node: int = 1
    host_memory_bytes: int = 0  # of one node
    links: tuple[Link, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Cluster:
        """Read what `to_json` wrote; UserError when it is of another schema or lacks a field."""
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(f"expected a cluster file of schema {SCHEMA_VERSION}, got {version}; run `vchitect-fast autotune probe` again.")
        try:
            rest = {k: v for k, v in values.items() if k not in {"schema_version", "device", "links"}}
            return cls(device=Device(**values["device"]), links=tuple(Link(**link) for link in values.get("links", ())), **rest)
        except (KeyError, TypeError) as error:
            raise UserError(f"this is not a cluster file ({error}); run `vchitect-fast autotune probe` again.") from None

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster JSON; UserError when the file is absent or is not JSON."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except OSError as error:
            raise UserError(f"cannot read the cluster file {path} ({error.strerror}); run `vchitect-fast autotune probe` first.") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON ({error}); run `vchitect-fast autotune probe` again.") from None
