"""What this process runs on: the device's name, its memory and its threads, read from the system, nothing measured.

`train` compares `this_device().fingerprint()` with the Plan's; the probe adds measured facts to it. Memory respects the
control group's limit (v1 and v2), since that is what the kernel enforces in a container. torch is imported on call only.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from vchitect_fast.cluster import Device

_UNLIMITED_BYTES = 2**60  # control groups write "no limit" as a number near 2^63


def this_device(index: int = 0) -> Device:
    """The CUDA device of that index, or the CPU where there is none: name, kind, memory, threads; no rates."""
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(index)
        return Device(name=found.name, kind="cuda", memory_bytes=found.total_memory, source="CUDA driver")
    return Device(
        name=cpu_name(),
        kind="cpu",
        memory_bytes=host_memory_bytes(),
        num_threads=torch.get_num_threads(),
        source="/proc and control group",
    )


def host_memory_bytes() -> int:
    """Main memory that this process may use at most: the machine's, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _control_groups())])


def available_memory_bytes() -> int:
    """Main memory that can be taken now without swapping, within the control group's limit."""
    import psutil

    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _control_groups())]))


def resident_bytes() -> int:
    """Resident bytes of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def cpu_name() -> str:
    """The processor as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _control_groups() -> list[tuple[int, int]]:
    """(limit, used without reclaimable cache) in bytes of every control group above this process that has a limit."""
    membership = Path("/proc/self/cgroup")
    if not membership.exists():
        return []
    found = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, used_name, cache_name = (
                Path("/sys/fs/cgroup"),
                "memory.max",
                "memory.current",
                "inactive_file",
            )
        elif "memory" in controllers.split(","):
            root, limit_name, used_name = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
            cache_name = "total_inactive_file"
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            limit_file = folder / limit_name
            if root in (folder, *folder.parents) and limit_file.exists():
                limit = limit_file.read_text().strip()
                if limit != "max" and int(limit) < _UNLIMITED_BYTES:
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    used = int((folder / used_name).read_text()) - int(stat.get(cache_name, 0))
                    found.append((int(limit), used))
    return found
