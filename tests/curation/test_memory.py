"""Memory of a worker: bounded, and hardly more for a long video than for a short one. Linux only (/proc).

Two and ten minutes of carphone_distorted.mp4 (176x144, 30 frames a second), the longer one in chunks of 4 minutes, each
through a worker of its own. pytest tests/curation/test_memory.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic

from vchitect_fast.curation.engines import Outcome
from vchitect_fast.curation.engines.local import WORKER_BYTES, LocalEngine
from vchitect_fast.curation.probe import Source
from vchitect_fast.curation.settings import from_dict
from vchitect_fast.curation.tasks import ClipTask, ProbeTask, ScanTask

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
SIGNAL_BYTES = 8 + 9 * 4 + 192  # of one frame: time, nine numbers, the layout
LAYOUT_BYTES = 4 * 192  # the layout as float32, which the search for transitions works on
# A clip task holds its signals three times (Parquet, chunks, joined) and six layouts of every frame at most (the block, both
# ends, the middle, and two differences of these); a scan has twice the signals in Python's objects for one chunk.
FRAME_BYTES = 3 * SIGNAL_BYTES + 6 * LAYOUT_BYTES


def peak_bytes(pid: int) -> int:
    (line,) = (text for text in Path(f"/proc/{pid}/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def curated_by_one_worker(path: Path) -> tuple[int, int]:
    """(peak bytes of the worker, clips) of everything that needs no picture."""
    settings = from_dict({"text": False, "aesthetic_proxy": False})
    engine = LocalEngine(1)
    try:

        def value(outcomes: Iterator[Outcome]) -> object:
            (outcome,) = outcomes
            assert outcome.reason is None, outcome.reason
            return outcome.value

        _, source = value(engine.run([ProbeTask(str(path))]))  # type: ignore[misc]
        assert isinstance(source, Source)
        parts = tuple(bytes(value(engine.run([ScanTask(source, k, False)])))  # type: ignore[call-overload]
                      for k in range(len(source.chunks)))  # fmt: skip
        stages = settings.signal_stages
        clips = value(engine.run([ClipTask(source, parts, settings.shots, settings.stitch, stages)]))
        (worker,) = engine._workers
        return peak_bytes(worker.process.pid), len(clips.spans)  # type: ignore[attr-defined]
    finally:
        engine.close()


@pytest.mark.soak
def test_peak_memory_of_a_worker_does_not_follow_the_length(tmp_path: Path) -> None:
    peaks = []
    for minutes in (2, 10):
        path = synthetic.looped(
            synthetic.carphone("distorted"), tmp_path / f"{minutes}.mp4", round(minutes * 60 / 4.004)
        )
        peak, num_clips = curated_by_one_worker(path)
        assert num_clips >= minutes  # none longer than a minute
        peaks.append(peak)
    print(f"peak of a worker: {peaks[0] / 2**20:.0f} MiB for 2 minutes, {peaks[1] / 2**20:.0f} MiB for 10")
    assert max(peaks) < WORKER_BYTES
    assert peaks[1] - peaks[0] <= 8 * 60 * 30 * FRAME_BYTES
