"""Runs a command of ours under Nsight Systems and exports what it recorded; `nsight.py` reads the export.

    record(command, Path("runs/profile/nsys-rank0"), has_gpu=True)     -> runs/profile/nsys-rank0.sqlite

The recorded stretch is the one that the process marks with cudaProfilerStart and -Stop. Needs `nsys` on the PATH; it is
not part of CUDA's pip packages, and nothing else takes its place.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vchitect_fast.errors import UserError


def profile_command(command: Sequence[str], stem: Path, *, has_gpu: bool) -> list[str]:
    """The command line that records `command` into `stem`.nsys-rep.

    Without sampling and context switches: they cost time and say nothing of the GPU. Without a GPU there is nobody who
    would mark the stretch, and no CUDA to trace: the ranges of the whole run are recorded.
    """
    traced = "cuda,nvtx,cudnn,cublas" if has_gpu else "nvtx"
    flags = [f"--trace={traced}", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true", f"--output={stem}"]
    if has_gpu:
        flags += ["--cuda-memory-usage=true", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    return ["nsys", "profile", *flags, *command]


def export_command(stem: Path) -> list[str]:
    """The command line that turns `stem`.nsys-rep into `stem`.sqlite."""
    return ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={stem}.sqlite", f"{stem}.nsys-rep"]


def record(command: Sequence[str], stem: Path, *, has_gpu: bool) -> Path:
    """Run, record, export; the path of the export. UserError without nsys, and when a command fails."""
    if shutil.which("nsys") is None:
        raise UserError(
            "--nsys needs Nsight Systems' command nsys on the PATH, found none; install Nsight Systems "
            "(developer.nvidia.com/nsight-systems), or leave out --nsys."
        )
    stem.parent.mkdir(parents=True, exist_ok=True)
    sqlite = stem.with_name(f"{stem.name}.sqlite")
    sqlite.unlink(missing_ok=True)
    for line in (profile_command(command, stem, has_gpu=has_gpu), export_command(stem)):
        done = subprocess.run(line, check=False)
        if done.returncode != 0:
            raise UserError(
                f"`{shlex.join(line)}` ended with exit code {done.returncode}; mend what it says above and start again."
            )
    return sqlite
