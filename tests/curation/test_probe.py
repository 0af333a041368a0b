"""The probe: what a file is, from header and packets; whole files of odd make pass, files that are not whole do not.

pytest tests/curation/test_probe.py
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
import synthetic
from real_video import bikes, remux, truncate

from vchitect_fast.curation import probe as module
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.curation.probe import Source, file_stamp, probe

_NO_B = ("-c:v", "libx264", "-preset", "ultrafast")  # no B-frames: AVI has no place for their times


def short(folder: Path, name: str = "v.mp4", num: int = 40, **options: object) -> Path:
    return synthetic.write(folder / name, list(synthetic.shots()["bikes1"][:num]), **options)  # type: ignore[arg-type]


def test_real_files_are_known_to_the_digit() -> None:
    source = probe(str(bikes()))
    digest = hashlib.blake2b(bikes().read_bytes(), digest_size=8).hexdigest()
    assert source == Source(
        str(bikes()), digest, bikes().stat().st_size, 640, 272, 25.0, 250, pytest.approx(10.0), "h264", "yuv420p", (0.0,)
    )  # fmt: skip
    phone = probe(str(synthetic.carphone()))
    assert (phone.width, phone.height, phone.num_packets) == (176, 144, 120)
    assert phone.fps == 30000 / 1001 and phone.seconds == pytest.approx(120 * 1001 / 30000)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi", ".mov"])
def test_any_container_is_the_same_video(tmp_path: Path, suffix: str) -> None:
    path = synthetic.write(
        tmp_path / f"v{suffix}", list(synthetic.shots()["bunny"][:50]), codec="mpeg4", options={"b:v": "2M"}
    )
    source = probe(str(path))
    assert (source.width, source.height, source.num_packets, source.codec) == (256, 144, 50, "mpeg4")
    assert source.fps == pytest.approx(25) and source.seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "size"),
    [("yuv420p", "ffv1", (175, 143)), ("yuv444p", "libx264", (175, 143)), ("yuv420p10le", "libx265", (176, 144)),
     ("yuv420p10le", "libx264", (176, 144)), ("yuvj420p", "libx264", (176, 144)), ("gray", "ffv1", (33, 17))],
)  # fmt: skip
def test_pixel_formats_and_odd_sizes(tmp_path: Path, pix_fmt: str, codec: str, size: tuple[int, int]) -> None:
    width, height = size
    frames = [f[:height, :width] for f in synthetic.shots()["bunny"][:8]]
    options = {} if codec == "ffv1" else {"preset": "ultrafast", "x265-params": "log-level=none"}
    source = probe(str(synthetic.write(tmp_path / "v.mkv", frames, codec=codec, pix_fmt=pix_fmt, options=options)))
    assert (source.width, source.height, source.pixel_format, source.num_packets) == (width, height, pix_fmt, 8)


@pytest.mark.parametrize(("num", "seconds"), [(1, 0.04), (2, 0.08)])
def test_one_and_two_frames_are_a_video(tmp_path: Path, num: int, seconds: float) -> None:
    source = probe(str(short(tmp_path, num=num)))
    assert (source.num_packets, source.fps) == (num, 25) and source.seconds == pytest.approx(seconds)


def test_sound_changes_nothing_but_the_bytes(tmp_path: Path) -> None:
    silent, loud = (probe(str(short(tmp_path, f"{a}.mp4", audio=a))) for a in (False, True))
    for name in ("width", "height", "fps", "num_packets", "seconds", "chunks"):
        assert getattr(silent, name) == getattr(loud, name)
    assert silent.video != loud.video and silent.num_bytes < loud.num_bytes


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_has_the_mean_of_all_its_frames(tmp_path: Path, suffix: str) -> None:
    # A header of .mkv only guesses from the first frames: 40 ms apart here, and 100 ms later.
    times = [0.04 * k for k in range(20)] + [0.8 + 0.1 * k for k in range(20)]
    source = probe(str(short(tmp_path, f"v{suffix}", times=times)))
    assert source.fps == pytest.approx(39 / 2.7, rel=0.02)
    assert source.seconds == pytest.approx(2.7 + 2.7 / 39, abs=0.01)


def test_a_header_that_names_a_time_base_for_a_rate_is_not_believed(tmp_path: Path) -> None:
    # What `ffmpeg -c copy` makes of a .mp4: 600 "frames" a second, one packet every 24 of them.
    synthetic.ffmpeg("-i", bikes(), "-frames:v", "50", "-vf", "scale=64:28", *_NO_B, "-video_track_timescale", "600",
                     tmp_path / "v.mp4")  # fmt: skip
    synthetic.ffmpeg("-i", tmp_path / "v.mp4", "-c", "copy", tmp_path / "v.avi")
    source = probe(str(tmp_path / "v.avi"))
    assert source.num_packets == 50 and source.fps == pytest.approx(25, rel=0.02)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path: Path) -> None:
    whole = short(tmp_path, options={"preset": "ultrafast", "x264-params": "keyint=20:min-keyint=20:scenecut=0"})
    synthetic.ffmpeg("-ss", "0.4", "-i", whole, "-c", "copy", tmp_path / "begin.mp4")
    source = probe(str(tmp_path / "begin.mp4"))
    assert source.num_packets == 30 and source.seconds == pytest.approx(1.2)
    content = bytearray(whole.read_bytes())  # and one that ends before the samples do
    at = content.index(b"elst") + 12
    (length,) = struct.unpack(">I", content[at : at + 4])
    content[at : at + 4] = struct.pack(">I", length // 2)
    (tmp_path / "end.mp4").write_bytes(content)
    source = probe(str(tmp_path / "end.mp4"))
    assert source.num_packets == 20 and source.seconds == pytest.approx(0.8)


@pytest.mark.parametrize("name", ["late.mkv", "late.ts", "late.mp4"])
def test_a_video_that_does_not_start_at_0_is_whole(tmp_path: Path, name: str) -> None:
    # A .ts starts at 1.4 s by itself; in Matroska the header's length counts from 0 and not from the start.
    synthetic.ffmpeg("-i", short(tmp_path), "-c", "copy", "-output_ts_offset", "5", tmp_path / name)
    source = probe(str(tmp_path / name))
    assert source.num_packets == 40 and source.seconds == pytest.approx(1.6) and source.chunks == (0.0,)


def test_chunks_begin_at_key_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short(tmp_path, options={"preset": "ultrafast", "x264-params": "keyint=8:min-keyint=8:scenecut=0"})
    assert probe(str(path)).chunks == (0.0,)
    monkeypatch.setattr(module, "CHUNK_S", 0.5)
    for name in ("v.mp4", "v.ts", "v.mkv"):
        moved = path if name == "v.mp4" else remux(path, tmp_path / name)
        assert probe(str(moved)).chunks == pytest.approx((0.0, 0.64, 1.28))


def bad(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    content = bikes().read_bytes()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video")
    elif kind == "truncated":
        truncate(bikes(), path, 0.4)
    elif kind == "indexed":
        truncate(remux(bikes(), folder / "whole.mp4", movflags="faststart"), path, 0.4)
    elif kind == "last_frames":
        truncate(remux(bikes(), folder / "whole.mp4", movflags="faststart"), path, 0.99)
    elif kind == "matroska":
        path = truncate(remux(bikes(), folder / "whole.mkv"), folder / "cut.mkv", 0.4)
    elif kind == "sound":
        synthetic.ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.mp4")
    elif kind == "no_picture":
        at = content.index(b"mdat")
        path.write_bytes(content[: at + 4] + bytes(len(content) - at - 4) if content.index(b"moov") < at else
                         content[: at + 4] + bytes(content.index(b"moov") - at - 8) + content[content.index(b"moov") - 4 :])  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "cannot read the file .*No such file"),
        ("empty", "the file is empty"),
        ("text", "cannot open it as a video"),
        ("truncated", "cannot open it as a video"),
        ("indexed", r"truncated: the header says 250 frames and 10.0 s, it holds \d\d frames and [345]\.\d s"),
        ("last_frames", r"truncated: the header says 250 frames and 10.0 s, it holds 24\d frames"),
        ("matroska", r"truncated: the header says \? frames and 10.0 s, it holds \d\d frames"),
        ("sound", "no video stream"),
        ("no_picture", "no frame decodes|cannot read it as a video"),
    ],
)
def test_what_is_no_whole_video_is_refused_with_the_reason(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(BadVideo, match=message):
        probe(str(bad(tmp_path, kind)))


def test_a_header_that_asks_for_too_much_memory_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SIDE", 300)
    with pytest.raises(BadVideo, match="its header says 640x272 pixels, more than 300 a side"):
        probe(str(bikes()))


def test_the_same_bytes_have_the_same_identity_and_a_change_a_new_stamp(tmp_path: Path) -> None:
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(bikes().read_bytes())
    assert probe(str(copy)).video == probe(str(bikes())).video == probe(f"file://{copy}").video
    before = file_stamp(str(copy))
    assert file_stamp(str(copy)) == before
    os.utime(copy, ns=(1, before_ns := copy.stat().st_mtime_ns + 1))
    assert file_stamp(str(copy)) != before and str(before_ns) in file_stamp(str(copy))
    assert file_stamp(f"file://{copy}")[0] == before[0]
