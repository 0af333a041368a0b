"""The encoder, the disk and decoding: real ones, small, and what is said where they are not there.

pytest tests/autotune/test_probe_data.py; no time is compared with an expectation of a machine.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from probe_cases import SMALL

from vchitect_fast.autotune import probe
from vchitect_fast.autotune.codec import encode_flops
from vchitect_fast.autotune.probe import data
from vchitect_fast.autotune.probe.clock import Repeats
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.parallel.mesh import CPU
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import write_video


def clip(path: Path, num_frames: int = 8) -> Clip:
    return Clip(path, 0.0, num_frames / 10, num_frames, 64, 48, 10.0, "noise")


@pytest.fixture
def video(tmp_path: Path) -> Path:
    frames = torch.randint(0, 256, (8, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "noise.mp4", frames, 10.0)
    return tmp_path / "noise.mp4"


def test_the_encoder_s_rate_is_its_flops_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers", reason="pip install -e '.[sd3]'")
    ran: list[float] = []

    def once(work: Callable[[], float], number: int) -> Repeats:
        ran.append(work())
        return Repeats(0.5, 0.0, number)

    monkeypatch.setattr(data, "several", once)
    found = data.measure_codec(CPU, (1, 2), 16, lambda: None)
    assert len(ran) == 2 and all(seconds > 0 for seconds in ran)
    assert found == {number: encode_flops(VideoShape(number, 16, 16)) / 0.5 for number in (1, 2)}


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.vae", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"vchitect-fast\[sd3\]"):
        data.measure_codec(CPU, (1,), 16, lambda: None)


def test_files_and_members_are_read_whole(tmp_path: Path) -> None:
    path, tar = tmp_path / "big.mp4", tmp_path / "clips.tar"
    path.write_bytes(bytes(3 * data.READ_BYTES // 2))
    with tarfile.open(tar, "w") as archive:
        archive.add(path, "big.mp4")
    for place in (path, tar / "big.mp4"):
        first_s, rest_s, num_bytes = data._read_cold(place)
        assert num_bytes == 3 * data.READ_BYTES // 2
        assert first_s > 0 and rest_s > 0


def test_every_byte_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(data.os, "pread", lambda _, size, at: asked.append((at, size)))
    path = tmp_path / "big.mp4"
    path.write_bytes(bytes(2 * data.READ_BYTES + 5))
    data._read_cold(path)
    ends = [at + size for at, size in asked]
    assert [at for at, _ in asked] == [0, *ends[:-1]] and ends[-1] == 2 * data.READ_BYTES + 5


def test_a_disk_s_figures(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = data.measure_disk([clip(video)] * 3, 2**20, "made up")
    assert link.name == "disk" and link.bytes_per_s > 0 and "1 files" in link.source
    monkeypatch.setattr(data, "_read_cold", lambda path: (2e-3, 0.5, 10**6 + data.FIRST_BYTES))
    link = data.measure_disk([clip(Path(f"{k}.mp4")) for k in range(9)], 3 * 10**6, "made up")
    assert (link.bytes_per_s, link.latency_s) == (2e6, 2e-3) and "3 files" in link.source


def test_decoding_counts_source_pixels(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate, what = data.measure_decode([clip(Path("missing.mp4")), clip(video)], 5)  # what does not decode is passed over
    assert rate > 0 and "of 1 clips" in what
    times = iter([0.0, 2.0])
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(times))
    assert data.measure_decode([clip(video)], 1)[0] == 8 * 64 * 48 / 2.0


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the clip .*missing\.mp4"):
        data.measure_disk([clip(tmp_path / "missing.mp4")], 2**20, "made up")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="more than 4096 bytes"):
        data.measure_disk([clip(tmp_path / "empty.mp4")], 2**20, "made up")
    with pytest.raises(UserError, match="no clip of the manifest decodes"):
        data.measure_decode([clip(tmp_path / "empty.mp4")], 1)


def test_clips_are_measured_and_a_missing_manifest_costs_nothing(video: Path, tmp_path: Path) -> None:
    write_manifest([clip(video)], tmp_path / "clips.jsonl")
    said: list[str] = []
    [link] = probe._data([clip(video)], SMALL, "made up", said.append)
    assert link.name == "disk" and "one thread decodes" in link.source and len(said) == 1
    with pytest.raises(UserError, match="absent"):
        probe.probe(progress=False, sizes=SMALL, manifest=str(tmp_path / "absent.jsonl"))
