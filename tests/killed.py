"""Kills for tests of curation: SIGKILL at random points of a real `vchitect-fast curate`, and who is left after it."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from curated import clips

CURATE = [sys.executable, "-P", "-m", "vchitect_fast.cli", "curate"]
END_S = 20.0  # within which workers must have ended by themselves after their driver was killed


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    """A curation in a process of its own, whose text stage, the slow one, is off; its stderr goes to OUT.txt."""
    with out.with_suffix(".txt").open("ab") as stderr:
        command = [*CURATE, str(videos), "--out", str(out), "--jobs", "2", "--set", "text=off"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)


def ended_well(driver: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the end of a curation that nobody killed."""
    assert driver.wait() == 0, out.with_suffix(".txt").read_text()


def finish(videos: Path, out: Path) -> list[dict[str, Any]]:
    """Run to the end; the clips."""
    ended_well(start(videos, out), out)
    return clips(out)


def kill_driver(driver: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to the driver alone; False where it had ended. Its family must end by itself."""
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if driver.poll() is not None:
        return False
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(family, timeout=END_S)
    for process in left:
        process.kill()
    assert not left, f"{len(left)} processes outlive their driver"
    return True


def kill_worker(driver: subprocess.Popen[bytes], draw: random.Random) -> bool:
    """SIGKILL to one of the workers, or to the server that starts them; False where the driver ended without one."""
    while driver.poll() is None:
        try:
            family = psutil.Process(driver.pid).children(recursive=True)
            if workers := [process for process in family if process.ppid() != driver.pid]:
                servers = [process for process in family if process.pid in {worker.ppid() for worker in workers}]
                draw.choice([*workers, *workers, *servers]).kill()
                return True
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.01)
    return False


def kill_many(videos: Path, folder: Path, num_driver: int, num_worker: int, seed: int, most: int) -> int:
    """Kill so many drivers and workers, at most `most` processes a curation, then let it end as the undisturbed one did.

    Returns how many curations the kills were spread over.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    whole = finish(videos, folder / "undisturbed")
    seconds = time.monotonic() - began
    assert len({row["clip"] for row in whole}) == len(whole) > 0
    num_folders = 0
    while num_driver or num_worker:
        out = folder / f"killed-{num_folders}"
        num_folders += 1
        for _ in range(most):
            driver = start(videos, out)
            time.sleep(draw.uniform(0, seconds / 2))
            if num_worker:
                num_worker -= kill_worker(driver, draw)
            time.sleep(draw.uniform(0, seconds / 2))
            if not num_driver or not kill_driver(driver):
                ended_well(driver, out)  # a worker that died costs its driver nothing
                break
            num_driver -= 1
        assert finish(videos, out) == whole
        assert not list(out.rglob(".*.partial*"))
        shutil.rmtree(out)
    return num_folders
