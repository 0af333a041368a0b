"""A Cluster that a person wrote as YAML: every fact is {value: ..., source: ...}, in bytes, seconds and FLOP/s.

    name: mine
    num_nodes: 4                          # names and counts say which cluster it is and stand as they are
    device:
      name: NVIDIA A100-SXM4-80GB         # as the driver gives it
      kind: cuda
      memory_bytes: {value: 8.5e10, source: torch.cuda.mem_get_info}
      matmul_flops: {bfloat16: {value: 2.5e14, source: measured with torch}}
      attention_points: {bfloat16: {value: [[512, 1.3e14, 1.3e14]], source: ...}}     # [length, forward, backward]
    links:
      intra_node: {bytes_per_s: {value: 2.3e11, source: nccl-tests}, latency_s: {value: 2e-5, source: assumed}}

The other fields are those of Cluster, Device and Link; what is left out is not known. Refused: a number without a source,
an unknown field (the nearest is named), a missing one. clusters/ holds the files that are shipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vchitect_fast.cluster import COLLECTIVES, LINKS, AttentionPoint, Cluster, Device, Link, MatmulPoint
from vchitect_fast.errors import UserError, unknown_name

DEVICE_FACTS = (
    "name", "kind", "num_threads", "memory_bytes", "memory_bytes_per_s", "op_overhead_s", "process_bytes", "matmul_flops",
    "matmul_points", "attention_flops", "attention_points", "pressure_fraction", "remap_s_per_gib",
)  # fmt: skip
LINK_NAMES = (*LINKS, *(f"{place}/{kind}" for place in ("intra_node", "inter_node") for kind in COLLECTIVES))
LINK_EXTRAS = ("both_ways_bytes_per_s", "together_bytes_per_s", "points")
TABLES = {
    "device",
    "links",
    "slowdown",
    "matmul_flops",
    "matmul_points",
    "attention_flops",
    "attention_points",
    *LINK_NAMES,
}
WHOLE = {"num_nodes", "num_devices_per_node", "num_threads", "host_memory_bytes", "memory_bytes", "process_bytes"}


def from_yaml(text: str, origin: str) -> Cluster:
    """The Cluster of a YAML text as this file's head describes it.

    origin  what the text is called in error messages

    UserError for text that is not YAML, an unknown or missing field, a fact without its source, a number out of range.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{origin} is not YAML ({' '.join(str(error).split())}); correct it.") from None
    facts = _Facts(origin)
    top = facts.fields(content, "", ("name", "num_nodes", "num_devices_per_node", "host_memory_bytes", "slowdown",
                                     "codec_flops", "device", "links"), needed=("name", "device"))  # fmt: skip
    device = facts.fields(top.pop("device"), "device", DEVICE_FACTS, needed=("name", "kind", "memory_bytes"))
    lengths = facts.by_name(device.pop("attention_points", {}), "device.attention_points", rows=3)
    products = facts.by_name(device.pop("matmul_points", {}), "device.matmul_points", rows=3)
    device["attention_points"] = tuple(
        AttentionPoint(int(length), ahead, behind, dtype)
        for dtype, rows in lengths.items()
        for length, ahead, behind in rows
    )
    device["matmul_points"] = tuple(
        MatmulPoint(int(fan_in), int(fan_out), flops, dtype)
        for dtype, rows in products.items()
        for fan_in, fan_out, flops in rows
    )
    for name in ("matmul_flops", "attention_flops"):
        if name in device:
            device[name] = facts.by_name(device[name], f"device.{name}")
    if device["kind"] not in ("cuda", "cpu"):
        raise unknown_name("kind of device", str(device["kind"]), ("cuda", "cpu"))
    links = []
    for name, content in facts.fields(top.pop("links", {}), "links", LINK_NAMES).items():
        needed = ("bytes_per_s", "latency_s")
        link = facts.fields(content, f"links.{name}", (*needed, *LINK_EXTRAS), needed=needed)
        source = facts.sources[f"links.{name}.bytes_per_s"]
        link["points"] = tuple((int(size), rate) for size, rate in link.get("points", ()))
        links.append(Link(name=name, source=source, **link))
    if "slowdown" in top:
        top["slowdown"] = facts.by_name(top["slowdown"], "slowdown")
    source = f"declared in {Path(origin).name}, each number with its source"
    return Cluster(device=Device(source=source, **device), links=tuple(links), sources=facts.sources, **top)


class _Facts:
    """Reads {value, source} pairs and remembers every source by the fact's place."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.sources: dict[str, str] = {}

    def fields(self, content: Any, place: str, names: Sequence[str], needed: Sequence[str] = ()) -> dict[str, Any]:
        """Checked for unknown and missing names; facts as their values, tables as they are."""
        what = place or "a cluster"
        if not isinstance(content, dict):
            raise UserError(f"{self.origin}: {what} must hold `name: value` lines, got {content!r}; correct it.")
        for name in content:
            if name not in names:
                raise unknown_name(f"field of {what}", str(name), names)
        missing = [name for name in needed if name not in content]
        if missing:
            raise UserError(f"{self.origin}: {what} lacks {', '.join(missing)}; add it.")
        found = {}
        for name, value in content.items():
            where = f"{place}.{name}".lstrip(".")
            if name in TABLES:
                found[name] = value
            elif name in ("name", "kind"):
                found[name] = str(value)
            elif name.startswith("num_"):
                found[name] = self._number(value, where)
            elif name == "points":
                found[name] = self._rows(self._fact(value, where), where, 2)
            else:
                found[name] = self._number(self._fact(value, where), where)
            if name in WHOLE:
                found[name] = self._whole(found[name], where)
        return found

    def by_name(self, content: Any, place: str, rows: int = 0) -> dict[str, Any]:
        """name -> fact; with `rows`, each fact's value is a list of rows of so many numbers."""
        if not isinstance(content, dict):
            raise UserError(f"{self.origin}: {place} must hold `name: fact` lines, got {content!r}; correct it.")
        found: dict[str, Any] = {}
        for name, fact in content.items():
            where = f"{place}.{name}"
            value = self._fact(fact, where)
            found[str(name)] = self._rows(value, where, rows) if rows else self._number(value, where)
        return found

    def _fact(self, content: Any, place: str) -> Any:
        if not isinstance(content, dict) or set(content) != {"value", "source"} or not content["source"]:
            raise UserError(
                f"{self.origin}: expected {place}: {{value: ..., source: ...}}, got {content!r}; say where the number is from."
            )
        self.sources[place] = str(content["source"])
        return content["value"]

    def _rows(self, value: Any, place: str, number: int) -> list[list[float]]:
        if not isinstance(value, list) or any(not isinstance(row, list) or len(row) != number for row in value):
            raise UserError(
                f"{self.origin}: {place} must be a list of rows of {number} numbers, got {value!r}; correct it."
            )
        return [[self._number(one, place) for one in row] for row in value]

    def _number(self, value: Any, place: str) -> float:
        try:  # YAML reads 2e9 as text, which means a number here
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self.origin}: {place} must be a number, got {value!r}; correct it.")
        return number

    def _whole(self, value: float, place: str) -> int:
        if value != int(value):
            raise UserError(f"{self.origin}: {place} must be a whole number, got {value}; correct it.")
        return int(value)
