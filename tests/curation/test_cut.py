"""Cutting: exactly the frames of the clip come out of every kind of video, and a copy holds no frame of another shot.

Frames are told apart on real video (bikes.mp4): frame k of a clip must be nearer to its own frame of the source than to the
frames beside it, where these differ. Variants (rates, containers, rotation, depth, odd sides) are made of it with ffmpeg.
pytest tests/curation/test_cut.py
"""

from __future__ import annotations

import random
import subprocess
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
import pytest
from real_video import BIKES_CUTS, bikes, bikes_clips, truncate

from vchitect_fast.curation.cut import Cut, Packets, Span, _whole_groups, cut, read_back, scan
from vchitect_fast.curation.encoders import ORDER, Encoder, choose, find_ffmpeg, trial
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.video import _frames, _to_rgb, read_video

WORKING = [name for name in ORDER if not trial(Encoder(find_ffmpeg(), name))]


@lru_cache(maxsize=8)
def shown(path: Path) -> tuple[list[float], np.ndarray]:
    """Times (s) and green planes int16 [T,H,W] of a video, as training decodes it."""
    found = [(time, _to_rgb(frame)[..., 1].astype(np.int16)) for time, frame in _frames(path, None)]
    return [time for time, _ in found], np.stack([frame for _, frame in found])


def made(target: Path, *arguments: str, source: Path | None = None, before: tuple[str, ...] = ()) -> Path:
    """A variant of bikes.mp4, or of `source`, that ffmpeg makes."""
    begin = [find_ffmpeg(), "-nostdin", "-v", "error", "-y", "-threads", "1", *before]
    command = [*begin, "-i", str(source or bikes()), *arguments, "-threads", "1", str(target)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def span_of(path: Path, first: int, last: int) -> Span:
    """Frames first..last of a file by its own times."""
    times, _ = shown(path)
    fps = (len(times) - 1) / (times[-1] - times[0])
    end = times[last + 1] if last + 1 < len(times) else times[-1] + 1 / fps
    return Span(str(path), times[first], end, last - first + 1, fps)


def assert_frames(clip: Path, source: Path, first: int, num: int) -> None:
    """The clip is frames first..first+num of the source: each nearest to its own of all within three."""
    (_, got), (_, want) = shown(clip), shown(source)
    assert len(got) == num
    rows, columns = min(got.shape[1], want.shape[1]), min(got.shape[2], want.shape[2])
    errors = np.full((num, 7), np.inf)
    for k, frame in enumerate(got[:, :rows, :columns]):
        for shift in range(-3, 4):
            if 0 <= first + k + shift < len(want):
                errors[k, shift + 3] = np.abs(frame - want[first + k + shift, :rows, :columns]).mean()
    # bikes.mp4 shows some frames twice: its own is nearest, or as near as its twin.
    own, other = errors[:, 3], np.delete(errors, 3, 1)
    assert (own <= other.min(1) + 0.05).all(), np.argmax(own - other.min(1))
    inner = np.isfinite(errors).all(1)
    assert (1.5 * own[inner].mean() < other[inner].mean(0)).all(), "a shift by a frame would show"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return choose()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames 137 to 236 of bikes.mp4, two shots with motion in every frame, at 160x68: quick to encode again."""
    target = tmp_path_factory.mktemp("small") / "small.mp4"
    filters = "trim=start_frame=137:end_frame=237,setpts=PTS-STARTPTS,scale=160:68"
    return made(target, "-vf", filters, "-c:v", "libx264", "-crf", "8", "-an")


@pytest.mark.parametrize("name", WORKING)
def test_the_six_shots_hold_their_frames_and_no_other(tmp_path: Path, name: str) -> None:
    found = choose(name)
    for clip in bikes_clips() if name == choose().name else bikes_clips()[::5]:
        out = tmp_path / f"{clip.caption}.mp4"
        span = Span(str(clip.path), clip.start, clip.end, clip.num_frames, clip.fps)
        result = cut(span, out, "exact", found, "stamp")
        first = round(clip.start * 25)
        assert result == Cut(
            "exact", name, "", 0, clip.start, clip.num_frames, pytest.approx(clip.seconds), 25.0, 640, 272
        )
        assert_frames(out, bikes(), first, clip.num_frames)
        frames, source = read_video(out)[0].numpy().astype(np.float32), read_video(bikes())[0].numpy()
        mse = np.square(frames - source[first : first + clip.num_frames]).mean()
        assert 10 * np.log10(255**2 / mse) > 36  # the worst of the three encoders here reached 37.9 dB
        assert read_back(str(out), "stamp") == result
        with av.open(str(out)) as container:
            assert [stream.type for stream in container.streams] == ["video"]


VARIANTS = {
    "mkv": ("v.mkv", ["-c", "copy"]),
    "offset.ts": ("v.ts", ["-c", "copy", "-muxdelay", "0", "-output_ts_offset", "7.3"]),
    "sound first": ("v.mkv", ["-f", "lavfi", "-i", "sine=d=10", "-c:v", "libx264", "-vf", "setpts=PTS+0.4/TB", "-map", "0:v", "-map", "1:a"]),
    "variable rate": ("v.mkv", ["-vf", "setpts='(N*0.04+0.013*mod(N,3)+gt(N,60)*0.5)/TB'", "-fps_mode", "passthrough", "-enc_time_base", "1:1000", "-c:v", "libx264"]),
    "ntsc": ("v.mp4", ["-r", "30000/1001", "-vf", "setpts=N*1001/30000/TB", "-c:v", "libx264"]),
    "ten bits": ("v.mp4", ["-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-x265-params", "log-level=none"]),
    "open groups": ("v.mp4", ["-c:v", "libx264", "-g", "20", "-x264-params", "open-gop=1:bframes=3:b-pyramid=normal:scenecut=0"]),
    "odd sides": ("v.mkv", ["-vf", "format=yuv444p,crop=121:63:20:2", "-c:v", "libx264"]),
    "full range": ("v.mp4", ["-vf", "scale=out_range=pc", "-pix_fmt", "yuvj420p", "-c:v", "libx264"]),
    "one key frame": ("v.mp4", ["-c:v", "libx264", "-g", "999", "-x264-params", "scenecut=0"]),
    "vp9": ("v.webm", ["-c:v", "libvpx-vp9", "-cpu-used", "8", "-deadline", "realtime", "-b:v", "3M"]),
    "mpeg2": ("v.mpg", ["-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_video_is_cut_to_the_frame(tmp_path: Path, encoder: Encoder, small: Path, variant: str) -> None:
    name, arguments = VARIANTS[variant]
    source = made(tmp_path / name, *arguments, source=small)
    times, _ = shown(source)
    for number, (first, last) in enumerate([(0, 9), (12, 48), (52, len(times) - 1)]):
        out = tmp_path / f"{number}.mp4"
        result = cut(span_of(source, first, last), out, "exact", encoder, "s")
        assert_frames(out, source, first, last - first + 1)
        got, _ = shown(out)
        assert got == pytest.approx([time - times[first] for time in times[first : last + 1]], abs=1e-9)
        assert result.end > got[-1]
        with av.open(str(out)) as container:
            assert container.streams.video[0].codec_context.pix_fmt == (
                "yuvj420p" if variant == "full range" else "yuv420p"
            )
        if variant == "odd sides":
            assert (result.width, result.height) == (120, 62)


@pytest.mark.parametrize("mode", ["exact", "copy"])
def test_rotation_marked_in_the_file_is_kept(tmp_path: Path, encoder: Encoder, mode: str) -> None:
    source = made(tmp_path / "turned.mp4", "-c", "copy", before=("-display_rotation", "90"))
    assert shown(source)[1].shape[1] > shown(source)[1].shape[2]
    result = cut(span_of(source, 0, 28), tmp_path / "out.mp4", mode, encoder, "s")
    assert (result.mode, result.width, result.height) == (mode, 272, 640)
    assert_frames(tmp_path / "out.mp4", source, 0, 29)


def test_one_frame_and_an_image(tmp_path: Path, encoder: Encoder) -> None:
    cut(span_of(bikes(), 50, 50), tmp_path / "one.mp4", "exact", encoder, "s")
    assert np.abs(shown(tmp_path / "one.mp4")[1][0] - shown(bikes())[1][50]).mean() < 2
    image = made(tmp_path / "a%03d:b.png", "-frames:v", "1", "-update", "1")
    result = cut(Span(str(image), 0.0, 0.0, 1, 1.0), tmp_path / "image.mp4", "exact", encoder, "s")
    assert (result.num_frames, result.end) == (1, 1.0)


def test_times_rounded_in_a_table_name_the_same_frames(tmp_path: Path, encoder: Encoder, small: Path) -> None:
    source = made(
        tmp_path / "v.mp4", "-r", "30000/1001", "-vf", "setpts=N*1001/30000/TB", "-c:v", "libx264", source=small
    )
    span = span_of(source, 31, 60)
    rounded = replace(span, start=round(span.start, 2), end=round(span.end, 2))
    cut(rounded, tmp_path / "out.mp4", "exact", encoder, "s")
    assert_frames(tmp_path / "out.mp4", source, 31, 30)


def test_a_frame_close_before_the_clip_is_not_of_it(tmp_path: Path, encoder: Encoder, small: Path) -> None:
    times = "setpts='(N*0.04-eq(N,12)*0.035)/TB'"  # frame 12 comes 5 ms after frame 11
    source = made(
        tmp_path / "v.mkv", "-vf", times, "-fps_mode", "passthrough", "-enc_time_base", "1:1000", "-c:v", "libx264", source=small
    )  # fmt: skip
    cut(span_of(source, 12, 48), tmp_path / "out.mp4", "exact", encoder, "s")
    assert_frames(tmp_path / "out.mp4", source, 12, 37)


@pytest.mark.parametrize("name", ["v.mp4", "v.ts", "v.mkv"])
@pytest.mark.parametrize("gop", ["open-gop=1:b-pyramid=none", "open-gop=0:b-pyramid=normal"])
def test_a_copy_holds_whole_groups_within_the_clip_bit_by_bit(
    tmp_path: Path, encoder: Encoder, small: Path, name: str, gop: str
) -> None:
    parameters = f"{gop}:bframes=3:scenecut=0:b-adapt=0"
    source = made(tmp_path / name, "-c:v", "libx264", "-g", "12", "-x264-params", parameters, source=small)
    truth, ends = read_video(source)[0], set()
    for first, last in [(3, 46), (52, 92), (52, 93), (52, 94), (52, 95)]:
        out = tmp_path / "out.mp4"
        result = cut(span_of(source, first, last), out, "copy", encoder, "s")
        assert (result.mode, result.encoder, result.why) == ("copy", "", "")
        begin = first + result.skipped
        assert 0 < result.skipped < 12
        assert begin + result.num_frames - 1 <= last
        assert result.num_frames >= last - begin + 1 - 4, (
            "at most a run of B-frames and their anchor is lost at the end"
        )
        frames = read_video(out)[0]
        assert np.array_equal(frames, truth[begin : begin + result.num_frames])
        assert result.end == pytest.approx(result.num_frames / 25)
        ends.add(last - (begin + result.num_frames - 1))
        assert read_back(str(out), "s") == result
    assert len(ends) > 1, "clips that end at and within a run of B-frames were tried"


def test_a_clip_that_cannot_be_copied_is_cut_exactly_and_says_why(tmp_path: Path, encoder: Encoder) -> None:
    result = cut(span_of(bikes(), 31, 74), tmp_path / "a.mp4", "copy", encoder, "s")
    assert (result.mode, result.encoder, result.why) == ("exact", encoder.name, "no key frame within the clip")
    assert_frames(tmp_path / "a.mp4", bikes(), 31, 44)
    keys = [k for k, (_, key) in enumerate(scan(span_of(bikes(), 0, 249)).order) if key]
    assert len(keys) > 1, "bikes.mp4 has a key frame inside"
    late = keys[1] - 20
    result = cut(span_of(bikes(), late, keys[1] + 3), tmp_path / "b.mp4", "copy", encoder, "s")
    assert result.why.startswith("its whole groups of pictures hold ")
    assert result.num_frames == 24
    mpeg2 = made(tmp_path / "v.mpg", "-frames:v", "25", "-c:v", "mpeg2video", "-q:v", "3")
    assert (
        cut(span_of(mpeg2, 0, 20), tmp_path / "c.mp4", "copy", encoder, "s").why == "mpeg2video is not copied into .mp4"
    )


def test_open_groups_whose_frames_refer_across_are_cut_exactly(tmp_path: Path, encoder: Encoder, small: Path) -> None:
    parameters = "open-gop=1:bframes=3:b-pyramid=normal:b-adapt=0:scenecut=0"
    source = made(tmp_path / "v.mp4", "-c:v", "libx264", "-g", "12", "-x264-params", parameters, source=small)
    result = cut(span_of(source, 31, 74), tmp_path / "a.mp4", "copy", encoder, "s")
    assert result.mode == "exact"
    assert result.why.startswith("its copy is not good: ")
    assert_frames(tmp_path / "a.mp4", source, 31, 44)


def test_what_cannot_be_cut_is_refused_with_the_reason_and_leaves_nothing(tmp_path: Path, encoder: Encoder) -> None:
    whole = made(tmp_path / "whole.mp4", "-c", "copy", "-movflags", "faststart")
    truncate(whole, tmp_path / "truncated.mp4", 0.4)
    content = bytearray(whole.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\x55" * 4000
    (tmp_path / "flipped.mp4").write_bytes(content)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {bikes()}\n")
    out = tmp_path / "out"
    for name, expected in {
        "absent.mp4": "cannot open it as a video (No such file",
        "empty.mp4": "cannot open it as a video (Invalid data",
        "truncated.mp4": "frames from",
        "list.mp4": "cannot open it",
        "flipped.mp4": "",
    }.items():
        for mode in ("exact", "copy"):
            with pytest.raises(BadVideo) as caught:
                cut(Span(str(tmp_path / name), 0.0, 10.0, 250, 25.0), out / "clip.mp4", mode, encoder, "s")
            assert expected in str(caught.value)
    with pytest.raises(BadVideo, match="it has 44 frames from 1.240 s to 3.000 s where its row says 45"):
        cut(replace(span_of(bikes(), 31, 74), num_frames=45), out / "clip.mp4", "exact", encoder, "s")
    assert not out.exists() or not list(out.iterdir())


def test_damage_within_the_clip_is_not_painted_over(tmp_path: Path, encoder: Encoder, small: Path) -> None:
    """One byte flipped, at twelve places in turn: a clip comes out as from the whole file, or not at all."""
    whole, draw, outcomes = small.read_bytes(), random.Random(0), []
    span = span_of(small, 70, 99)
    cut(span, tmp_path / "true.mp4", "exact", encoder, "s")
    for _ in range(12):
        content = bytearray(whole)
        content[draw.randrange(2_000, len(content) - 6_000)] ^= 0x55
        (tmp_path / "flipped.mp4").write_bytes(content)
        try:
            cut(replace(span, path=str(tmp_path / "flipped.mp4")), tmp_path / "a.mp4", "exact", encoder, "s")
            same = (tmp_path / "a.mp4").read_bytes() == (tmp_path / "true.mp4").read_bytes()
            outcomes.append("same" if same else "other")
        except BadVideo:
            outcomes.append("refused")
    assert set(outcomes) == {"refused", "same"}, outcomes


def test_a_group_whose_frames_come_after_the_clip_ends_is_not_copied_with_a_hole() -> None:
    pts = [0, 4, 8, 1, 2, 3, 12, 5, 6, 7, 9, 10, 11]  # 12 must be decoded before 5, and the clip ends at 10
    order = [(time, time == 0) for time in pts]
    packets = Packets(Fraction(1, 25), 0, order, list(range(11)), None, "h264")
    assert _whole_groups(packets) == ([], "its whole groups of pictures hold 1 of 11 frames")
    whole = replace(packets, order=order[:1] + order[1:2] + order[3:6], frames=list(range(5)))
    assert _whole_groups(whole) == ([0, 1, 2, 3, 4], "")


def test_what_is_read_back_is_the_same_clip_whole(tmp_path: Path, encoder: Encoder) -> None:
    out = tmp_path / "a.mp4"
    cut(span_of(bikes(), 31, 74), out, "exact", encoder, "stamp")
    assert read_back(str(out), "another stamp") is None
    assert read_back(str(bikes()), "stamp") is None
    assert read_back(str(tmp_path / "absent.mp4"), "stamp") is None
    size = out.stat().st_size
    with av.open(str(out)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size)
    for lost in (1, 500, size - last, size // 2, size - 10):
        (tmp_path / "b.mp4").write_bytes(out.read_bytes()[: size - lost])
        assert read_back(str(tmp_path / "b.mp4"), "stamp") is None, lost


def test_an_encoder_that_drops_frames_is_found_out(tmp_path: Path) -> None:
    """A program in ffmpeg's place that passes its work on but leaves out every second frame, then shifts times."""
    for filters, reason in (
        ("select=mod(n\\,2)", "of 44 frames 22 came out"),
        ("setpts=N*N+PTS", "not at their times"),
    ):
        fake = tmp_path / "ffmpeg"
        fake.write_text(
            f"#!{'/usr/bin/env python3'}\nimport os, sys\n"
            f"a = [x + ',' + {filters!r} if x.startswith('settb') else x for x in sys.argv[1:]]\n"
            f"os.execv({find_ffmpeg()!r}, ['ffmpeg', *a])\n"
        )
        fake.chmod(0o755)
        with pytest.raises(BadVideo, match=reason):
            cut(span_of(bikes(), 31, 74), tmp_path / "a.mp4", "exact", Encoder(str(fake), "libx264"), "s")
        assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


def test_an_encoder_asked_for_by_name_is_used_or_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose("libopenh264").name == "libopenh264"
    with pytest.raises(UserError, match="unknown encoder 'x264'; did you mean 'libx264'"):
        choose("x264")
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\necho '[enc @ 0x1] no such luck' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(UserError, match=r"the encoder libx264 does not work here \(ffmpeg: no such luck\)"):
        choose("libx264")
    with pytest.raises(
        UserError, match=r"must have a video encoder that works, none does \(h264_nvenc: .*libvpx-vp9: "
    ):
        choose()
    # An encoder that fails is passed over: here every one but the third.
    fake.write_text(f'#!/bin/sh\ncase "$*" in *libopenh264*) exec {find_real()} "$@";; esac\nexit 1\n')
    assert choose().name == "libopenh264"


def find_real() -> str:
    import imageio_ffmpeg

    return str(next(Path(imageio_ffmpeg.__file__).parent.glob("binaries/ffmpeg-*")))


def test_clips_of_training_and_cuts_agree_on_bikes() -> None:
    """The table of shots that the other tests use."""
    spans = [(round(c.start * 25), c.num_frames) for c in bikes_clips()]
    assert [first for first, _ in spans[1:]] == [edge + 1 for edge in BIKES_CUTS]
    assert isinstance(bikes_clips()[0], Clip)
