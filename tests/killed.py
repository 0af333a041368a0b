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


def start(videos: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    """A curation in a process of its own; its text stage, the slow one, is off."""
    return subprocess.Popen(
        [*CURATE, str(videos), "--out", str(out), "--jobs", "2", "--set", "text=off", *more],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def finish(videos: Path, out: Path) -> list[dict[str, Any]]:
    """Run to the end; the clips."""
    assert start(videos, out).wait() == 0
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


def kill_many(videos: Path, folder: Path, num_driver: int, num_worker: int, seed: int, most: int) -> dict[str, int]:
    """Kill so many drivers and workers, at most `most` a curation, then let it end; each result must be the undisturbed one.

    Returns how many kills struck, and how many curations they were spread over.
    """
    draw = random.Random(seed)
    began = time.monotonic()
    whole = finish(videos, folder / "undisturbed")
    seconds = time.monotonic() - began
    assert len({row["clip"] for row in whole}) == len(whole) > 0
    wanted = ["driver"] * num_driver + ["worker"] * num_worker
    draw.shuffle(wanted)
    struck, folders = {"driver": 0, "worker": 0}, 0
    while wanted:
        out = folder / f"killed {folders}"
        folders += 1
        workers = 0
        for _ in range(min(most, len(wanted))):
            driver = start(videos, out)
            time.sleep(draw.uniform(0, seconds))
            # A task may lose two workers; a third would rightly put it into quarantine.
            if wanted[-1] == "worker":
                hit = workers < 2 and kill_worker(driver, draw)
                workers += hit
                assert driver.wait() == 0, "a worker that dies costs the driver nothing"
            else:
                hit = kill_driver(driver)
            if not hit:
                assert driver.wait() == 0
                break  # done: the next kill takes a new folder
            struck[wanted.pop()] += 1
        assert finish(videos, out) == whole
        assert not list(out.rglob(".*.partial*"))
        shutil.rmtree(out)
    return {**struck, "folders": folders}
