"""The one decode: each signal against its definition on real frames, chunks against the whole, odd videos against plain ones.

pytest tests/curation/test_signals.py
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import synthetic
from real_video import bikes, remux

from vchitect_fast.curation import probe as probing
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.curation.motion_rule import pair_score
from vchitect_fast.curation.probe import probe
from vchitect_fast.curation.signals import THUMB, Signals, _top_mean, scan, whole

GROUPS = {"preset": "ultrafast", "x264-params": "keyint=20:min-keyint=20:scenecut=0:bframes=3:open-gop=1"}


def signals_of(path: Path) -> Signals:
    source = probe(str(path))
    return whole(source, [scan(source)])


def assert_same(found: Signals, expected: Signals, names: Sequence[str] = ()) -> None:
    for field in fields(Signals):
        if not names or field.name in names:
            a, b = getattr(found, field.name), getattr(expected, field.name)
            assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype != np.uint8), field.name


def planes(path: Path) -> list[np.ndarray]:
    """The luma of every frame as it lies in the file, uint8 or uint16."""
    found = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            depth = np.uint16 if "10le" in frame.format.name else np.uint8
            rows = np.frombuffer(bytes(plane), depth).reshape(plane.height, -1)
            found.append(rows[:, : plane.width].copy())
    return found


def mean_change(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [n-1]: mean absolute difference of neighbours."""
    return np.array([np.abs(b.astype(np.float64) - a).mean() for a, b in itertools.pairwise(pictures)])


@pytest.mark.parametrize("path", [synthetic.carphone("distorted"), bikes()], ids=lambda p: p.stem)
def test_luma_change_is_the_mean_difference_of_the_luma_in_full_range(path: Path) -> None:
    found = signals_of(path).luma_change
    assert found[0] == 0 and np.array_equal(found[1:], (mean_change(planes(path)) * 255 / 219).astype(np.float32))


def test_luma_change_against_opencvs_grey_frames() -> None:
    """OpenCV's grey comes from 8-bit RGB: it differs from the luma by a rounding r a pixel, two frames by r' - r.

    The mean of |r' - r| bounds how far the mean absolute difference can move, and so which frames can change sides at the
    paper's 0.9. In carphone_distorted, nearly still, some do: 43.7 % of its frames are static here, 46 % there.
    """
    found = signals_of(synthetic.carphone("distorted")).luma_change[1:]
    rgb = synthetic.decoded(synthetic.carphone("distorted"))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64) for frame in rgb]
    exact = [(luma - 16.0) * 255 / 219 for luma in planes(synthetic.carphone("distorted"))]
    bound = mean_change([g - e for g, e in zip(grey, exact, strict=True)])
    theirs = mean_change(grey)
    assert (np.abs(found - theirs) <= bound + np.spacing(found)).all()
    moved = (found < 0.9) != (theirs < 0.9)
    assert moved.sum() == 3 and (np.abs(found - 0.9) <= bound)[moved].all()


def test_thumb_signals_are_what_they_are_called() -> None:
    found = signals_of(synthetic.carphone())
    with av.open(str(synthetic.carphone())) as container:
        pictures = [f.reformat(156, THUMB, "gbrp", interpolation="AREA") for f in container.decode(video=0)]
    thumbs = np.stack([picture.to_ndarray() for picture in pictures])
    hsv = [cv2.cvtColor(f, cv2.COLOR_RGB2HSV).astype(np.int64) for f in thumbs]
    content = [0.0] + [np.abs(b - a).mean((0, 1)).sum() / 3 for a, b in itertools.pairwise(hsv)]
    assert found.content == pytest.approx(np.array(content), rel=1e-6)
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in thumbs])
    assert found.brightness == pytest.approx(grey.mean((1, 2)), rel=1e-6)
    assert found.contrast == pytest.approx(grey.std((1, 2)), rel=1e-6)
    assert found.saturation == pytest.approx(np.array([f[..., 1].mean() for f in hsv]), rel=1e-6)
    cells = thumbs[:, :, 78 : 78 + 78].reshape(120, 8, 16, 78, 3).mean((2, 3))  # right half, by rows
    ours = found.layout.reshape(120, 8, 8, 3)[:, :, 4:].mean(2)
    assert np.abs(ours - cells).max() <= 1.0  # rounded to a level twice, rows and columns
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setVariationalRefinementIterations(0)
    flow = dis.calc(grey[0], grey[4], None)
    at = np.flatnonzero(~np.isnan(found.flow))
    assert at.tolist() == list(range(4, 120, 4))  # 29.97 frames a second: every fourth
    assert found.flow[4] == pytest.approx(pair_score(np.asarray(flow).transpose(2, 0, 1)), rel=1e-5)
    assert np.isnan(found.cut).all()


@pytest.mark.parametrize("kind", ["random", "constant", "comb", "few"])
def test_the_mean_of_the_fastest_is_exact_wherever_they_are(kind: str) -> None:
    values = np.random.default_rng(0).random(3000 if kind != "few" else 7).astype(np.float32)
    if kind == "constant":
        values[:] = 2.5
    elif kind == "comb":  # all that is large lies where the sixteenth is taken from: too few are over its bound
        values[np.arange(3000) % 16 != 0] = 0
    top = np.sort(values)[-max(1, int(0.05 * len(values))) :]
    assert _top_mean(values) == pytest.approx(top.mean(), rel=1e-6)


def test_a_picture_that_changes_its_size_starts_anew(tmp_path: Path) -> None:
    for number, turned in enumerate((False, True)):
        frames = [np.rot90(f, turned) for f in synthetic.shots()["bikes1"][:30]]
        plain = synthetic.write(tmp_path / f"{number}.mp4", [np.ascontiguousarray(f) for f in frames])
        synthetic.ffmpeg("-i", plain, "-c", "copy", "-output_ts_offset", str(1.2 * number), tmp_path / f"{number}.ts")
    path = tmp_path / "both.ts"
    path.write_bytes((tmp_path / "0.ts").read_bytes() + (tmp_path / "1.ts").read_bytes())
    found = signals_of(path)
    assert len(found) == 60 and found.content[30] == found.luma_change[30] == 0
    assert np.flatnonzero(~np.isnan(found.flow)).tolist() == [*range(3, 30, 3), *range(33, 60, 3)]


def parts_of(
    path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, transnet: Any = None
) -> tuple[Signals, Signals]:
    """The signals of a video whole, and joined from chunks of `seconds`."""
    monkeypatch.setattr(probing, "CHUNK_S", 1e9)
    source = probe(str(path))
    expected = whole(source, [scan(source, transnet=transnet)])
    monkeypatch.setattr(probing, "CHUNK_S", seconds)
    source = probe(str(path))
    assert len(source.chunks) > 2
    parts = [scan(source, k, transnet=transnet) for k in range(len(source.chunks))]
    assert all(len(part) for part in parts)
    return expected, whole(source, parts)


@pytest.mark.parametrize("suffix", [".mp4", ".ts", ".mkv"])
def test_chunks_give_what_the_whole_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    frames = list(synthetic.moving(synthetic.shots()["bunny"], 130))
    path = synthetic.write(tmp_path / "v.mp4", frames, options=GROUPS)
    path = path if suffix == ".mp4" else remux(path, tmp_path / f"v{suffix}")
    expected, found = parts_of(path, monkeypatch, 1.5)
    assert_same(found, expected)


@pytest.mark.parametrize("fps", [60, 12])
def test_chunks_keep_the_flow_grid_at_other_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fps: int) -> None:
    frames = list(synthetic.moving(synthetic.shots()["bikes2"], 130))
    path = synthetic.write(tmp_path / "v.mp4", frames, fps=fps, options=GROUPS)
    expected, found = parts_of(path, monkeypatch, 30 / fps)
    assert_same(found, expected)
    assert (~np.isnan(found.flow)).sum() == (130 - 1) // max(1, round(fps / 8))


def test_chunks_of_a_variable_rate_compare_with_the_frame_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames, times = list(synthetic.moving(synthetic.shots()["bikes1"], 80)), [0.0]
    for k in range(1, 80):  # before a key frame (every 20th) a picture stays for a second
        times.append(times[-1] + (1.0 if k % 20 == 0 else 0.02 if k % 3 else 0.05))
    path = synthetic.write(tmp_path / "v.mp4", frames, times=times, options=GROUPS)
    expected, found = parts_of(path, monkeypatch, 1.2)
    assert_same(found, expected)
    assert found.time == pytest.approx(np.array(times), abs=0.0006)


def test_chunks_for_transnet_lie_in_its_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Windows:
        """Says of each frame which window it counts in, where, and which frames that window sees; as TransNet cuts them."""

        def __init__(self) -> None:
            self.seen: list[bytes] = []

        def push(self, frame: np.ndarray) -> None:
            assert frame.shape == (27, 48, 3)
            self.seen.append(frame.tobytes())

        def finish(self) -> np.ndarray:
            num, found = len(self.seen), []
            for k in range(num):
                middle = k - k % 50
                window = [self.seen[min(max(j, 0), num - 1)] for j in range(middle - 25, middle + 75)]
                found.append(hash((k % 50, *window)) % 2**20)
            self.seen = []
            return np.array(found, np.float32)

    frames = [f for name in ("bikes1", "bikes2", "bikes3", "bikes4", "carphone") for f in synthetic.shots()[name]]
    path = synthetic.write(tmp_path / "v.mp4", frames, options=GROUPS)
    expected, found = parts_of(path, monkeypatch, 2.3, Windows())
    assert_same(found, expected)
    assert len(set(found.cut)) > 250


def test_ten_bits_give_the_luma_of_eight_and_the_same_shots(tmp_path: Path) -> None:
    """Ten bits made by ffmpeg of eight: the same luma exactly; thumbs within the level that conversion rounds to."""
    frames = [*synthetic.shots()["bikes1"], *synthetic.shots()["bunny"][:40]]
    eight = synthetic.write(tmp_path / "8.mkv", frames, **synthetic.LOSSLESS)
    synthetic.ffmpeg("-i", eight, "-c:v", "ffv1", "-pix_fmt", "yuv420p10le", tmp_path / "10.mkv")
    assert all(np.array_equal(a.astype(int) * 4, b) for a, b in zip(planes(eight), planes(tmp_path / "10.mkv"), strict=True))  # fmt: skip
    a, b = signals_of(eight), signals_of(tmp_path / "10.mkv")
    assert_same(b, a, ["luma_change", "time"])
    for name in ("brightness", "contrast"):
        assert np.abs(getattr(a, name) - getattr(b, name)).max() <= 1.0
    assert np.abs(a.layout.astype(int) - b.layout).max() <= 1
    assert a.content.argmax() == b.content.argmax() == len(synthetic.shots()["bikes1"])


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuvj420p", "yuv422p10le", "nv12", "gray"])
def test_other_pixel_formats_are_taken_to_full_range(tmp_path: Path, pix_fmt: str) -> None:
    """Flat pictures, so that the truth is exact: black to white is 255 in every format and range."""
    frames = [np.full((144, 176, 3), level, np.uint8) for level in (0, 255, 255, 0)]
    codec, options = ("libx264", {"qp": "0"}) if pix_fmt == "nv12" else ("ffv1", {})
    if pix_fmt == "yuvj420p":
        codec, options = "libx264", {"qp": "0"}
    path = synthetic.write(tmp_path / "v.mkv", frames, codec=codec, pix_fmt=pix_fmt, options=options)
    found = signals_of(path)
    assert found.luma_change == pytest.approx([0, 255, 0, 255], abs=255 / 219)
    assert found.brightness == pytest.approx([0, 255, 255, 0], abs=2 * 255 / 219)  # a level there, a level back


def test_odd_sizes_and_tiny_ones(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(175, 143), (33, 17), (9, 200)]):
        frames = [f[:height, :width] if height <= 144 else np.tile(f, (2, 1, 1))[:height, :width]
                  for f in synthetic.shots()["bikes1"][:8]]  # fmt: skip
        path = synthetic.write(tmp_path / f"{number}.mkv", frames, **synthetic.LOSSLESS)
        found = signals_of(path)
        assert len(found) == 8
        assert np.array_equal(found.luma_change[1:], (mean_change(planes(path)) * 255 / 219).astype(np.float32))


def test_sound_offsets_and_containers_change_no_signal(tmp_path: Path) -> None:
    frames = list(synthetic.shots()["bikes3"][:30])
    expected = signals_of(synthetic.write(tmp_path / "plain.mp4", frames))
    assert_same(signals_of(synthetic.write(tmp_path / "sound.mp4", frames, audio=True)), expected)
    for name in ("late.ts", "late.mkv"):
        synthetic.ffmpeg("-i", tmp_path / "plain.mp4", "-c", "copy", "-output_ts_offset", "7", tmp_path / name)
        found = signals_of(tmp_path / name)
        assert found.time == pytest.approx(expected.time, abs=0.0006)
        assert_same(replace(found, time=expected.time), expected)


def test_a_turned_video_has_a_turned_layout(tmp_path: Path) -> None:
    plain = synthetic.write(tmp_path / "v.mp4", list(synthetic.shots()["bikes3"][:10]))
    synthetic.ffmpeg("-display_rotation", "90", "-i", plain, "-c", "copy", tmp_path / "turned.mp4")
    a, b = signals_of(plain), signals_of(tmp_path / "turned.mp4")
    assert np.array_equal(b.layout.reshape(-1, 8, 8, 3), np.rot90(a.layout.reshape(-1, 8, 8, 3), 1, (1, 2)))
    assert_same(replace(b, layout=a.layout), a)


@pytest.mark.parametrize("num", [1, 2])
def test_one_and_two_frames(tmp_path: Path, num: int) -> None:
    found = signals_of(synthetic.write(tmp_path / "v.mp4", list(synthetic.shots()["bikes3"][:num])))
    assert len(found) == num and found.content[0] == found.luma_change[0] == 0 and np.isnan(found.flow).all()


def test_bytes_hold_every_bit(tmp_path: Path) -> None:
    found = signals_of(synthetic.carphone())
    back = Signals.from_bytes(found.to_bytes())
    assert_same(back, found)
    assert_same(Signals.joined([back[:7], back[7:]]), found)
    assert len(found[5:9]) == 4 and found[5:9].time[0] == found.time[5]


def test_a_damaged_frame_and_missing_frames_are_a_bad_video(tmp_path: Path) -> None:
    content = bytearray(bikes().read_bytes())
    content[200_000:200_400] = bytes(400)
    (tmp_path / "holes.mp4").write_bytes(content)
    with pytest.raises(BadVideo, match=r"decoding stopped at [234]\.\d\d s|is corrupt"):
        scan(probe(str(tmp_path / "holes.mp4")))
    source, found = probe(str(synthetic.carphone())), signals_of(synthetic.carphone())
    assert len(whole(source, [found[:119]])) == 119
    with pytest.raises(BadVideo, match="damaged: 118 frames decode of about 120"):
        whole(source, [found[:118]])
    with pytest.raises(BadVideo, match="no frame decodes after 100.00"):
        scan(replace(source, chunks=(100.0,)))


def test_times_that_go_back_are_a_bad_video(tmp_path: Path) -> None:
    found = signals_of(synthetic.carphone())
    time = found.time.copy()
    time[60] = time[59]
    with pytest.raises(BadVideo, match="presentation times do not increase"):
        whole(probe(str(synthetic.carphone())), [replace(found, time=time)])
    # A real one: B-frames copied into .avi, which has no place for their times.
    source = synthetic.write(tmp_path / "b.mp4", list(synthetic.shots()["bikes3"][:40]), options=GROUPS)
    synthetic.ffmpeg("-i", source, "-c", "copy", tmp_path / "b.avi")
    with pytest.raises(BadVideo, match="presentation times|truncated"):
        signals_of(tmp_path / "b.avi")
