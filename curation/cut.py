"""Cut: one clip out of its video into an MP4 file of its own, without sound, and proof that the right frames are in it.

exact   ffmpeg decodes and encodes again: the frames first..last of the clip and no other, each at its time. Turned as the
        file says; 4:2:0 with 8 bits, so an odd last column or row is cut off (never scaled, never padded) and 10 bits become 8.
copy    whole groups of pictures that lie within the clip, bit by bit: from its first key frame on, up to where decoding
        needs no frame beyond its end. Frames before and after are left out, so no frame of a neighbouring shot comes along
        and the result says how many are missing. A clip of which less than half could be kept so is cut exactly, with why.

Times are integers of the file, read from its packets; what was written is decoded and must hold as many frames at the same
times. Damage within the clip is a BadVideo: nothing is repeated, repaired or invented.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from vchitect_fast import members
from vchitect_fast.curation.encoders import Encoder, run_ffmpeg
from vchitect_fast.curation.frames import BadVideo
from vchitect_fast.files import whole_file

MODES = ("exact", "copy")
COPIED = ("h264", "hevc", "av1", "vp9", "mpeg4")  # codecs that MP4 holds and everybody reads there
MIN_COPIED_SHARE = 0.5  # of a clip's frames: with less, key frames fall so that copying would lose most of it
MARGINS = (0.25, 0.01)  # of a mean frame's length: a table's times may be rounded; frames may come closer than the mean


@dataclass(frozen=True)
class Span:
    """What to cut: `num_frames` frames with start <= t < end, in seconds from the first frame of the file."""

    path: str  # local file, or a member of a tar (members.py)
    start: float
    end: float
    num_frames: int
    fps: float


@dataclass(frozen=True)
class Cut:
    """What was written. Its first frame is at 0 s."""

    mode: str  # "exact" or "copy", as it was done
    encoder: str  # "" for a copy
    why: str  # why a clip to copy was cut exactly, else ""
    skipped: int  # frames of the clip before the first one written
    begin: float  # seconds in the source of the first one written
    num_frames: int
    end: float  # seconds: 0 <= t < end
    fps: float
    width: int  # pixels, as shown
    height: int


@dataclass(frozen=True)
class Packets:
    """The packets around a clip in decoding order and the clip's frames, times in ticks of `base` seconds."""

    base: Fraction
    origin: int  # presentation time of the file's first frame
    order: list[tuple[int, bool]]  # (presentation time, key frame)
    frames: list[int]  # of the clip, ascending
    seek: int | None  # where the demuxer was sent, None for the beginning
    codec: str

    @property
    def key(self) -> int | None:
        """Presentation time of the last key frame at or before the clip's first frame."""
        return max((pts for pts, key in self.order if key and pts <= self.frames[0]), default=None)

    def seconds(self, pts: int) -> float:
        """Seconds from the first frame of the file."""
        return float((pts - self.origin) * self.base)


def cut(span: Span, out: Path, mode: str, encoder: Encoder, stamp: str, threads: int = 1) -> Cut:
    """Write a clip, whole or not at all, marked with `stamp` for `read_back`.

    Raises BadVideo with the reason when the video does not hold the frames or they do not decode, OSError when `out` cannot
    be written.
    """
    packets = scan(span)
    why = ""
    if mode == "copy":
        kept, why = _whole_groups(packets)
        if kept:
            frames = sorted(packets.order[k][0] for k in kept)
            planned = _planned(span, packets, frames, "copy", "", "")
            try:
                with whole_file(out) as partial:
                    _copy(span, packets, kept, partial, _comment(planned, stamp))
                    return _checked(partial, planned, packets, frames)
            except BadVideo as error:  # decoders miss the frames left out of an open group where others refer to these
                why = f"its copy is not good: {error}"
    planned = _planned(span, packets, packets.frames, "exact", encoder.name, why)
    with whole_file(out) as partial:
        reasons = []
        # A seek can land behind the key frame; only a decode from the beginning decides.
        for seek in [True, False] if packets.seek is not None and packets.key is not None else [False]:
            try:
                _encode(span, packets, seek, partial, encoder, _comment(planned, stamp), threads)
                return _checked(partial, planned, packets, packets.frames)
            except BadVideo as error:
                reasons.append(str(error))
        raise BadVideo(reasons[-1])


def read_back(file: str | BinaryIO, stamp: str) -> Cut | None:
    """What `cut` wrote there with this stamp, None when it is another file or not whole. Decodes one frame."""
    import av

    try:
        with av.open(file, "r") as container:
            found = json.loads(container.metadata.get("comment", ""))
            stream = container.streams.video[0]
            if found.pop("stamp") != stamp or stream.frames != found["num_frames"]:
                return None
            size = _size(next(container.decode(stream)))
            # MP4's table in front may promise more than follows: every packet must be there.
            container.seek(0, stream=stream)
            packets = [packet for packet in container.demux(stream) if packet.size]
            if len(packets) != stream.frames or any(packet.is_corrupt for packet in packets):
                return None
            return Cut(**{**found, "width": size[0], "height": size[1]})
    except (av.FFmpegError, OSError, ValueError, KeyError, TypeError, AttributeError, LookupError, StopIteration):
        return None


def scan(span: Span) -> Packets:
    """Find the clip's packets, without decoding; BadVideo when the file does not hold as many frames there."""
    import av

    try:
        # Where a file has no table of key frames (.ts), a seek comes out anywhere: try from further back, at last from 0.
        for back_s in (0.0, 5.0, 20.0, math.inf):
            packets = _scan(span, max(0.0, span.start - back_s))
            if packets.seek is None or (packets.frames and packets.key is not None):
                break
    except av.FFmpegError as error:
        raise BadVideo(f"reading stopped ({error.strerror or error})") from None
    if len(packets.frames) != span.num_frames:
        raise BadVideo(
            f"it has {len(packets.frames)} frames from {span.start:.3f} s to {span.end:.3f} s where its row says {span.num_frames}"
        )
    return packets


def _scan(span: Span, begin_s: float) -> Packets:
    """From the last key frame before `begin_s`, or wherever a seek to it comes out."""
    order: list[tuple[int, bool]] = []
    with _opened(span.path) as container:
        stream = container.streams.video[0]
        base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        origin = stream.start_time or 0
        target = origin + math.floor(begin_s / base) if begin_s > 0 else None
        if target is not None:
            container.seek(target, stream=stream)
        beyond = origin + math.ceil((max(span.end, span.start) + 1 / span.fps) / base)
        for packet in _shown(container, stream):
            order.append((packet.pts, packet.is_keyframe))
            # No frame is shown before it is decoded: what follows is later than the clip.
            if packet.dts is not None and packet.dts > beyond:
                break
        codec = stream.codec_context.name
    shown = sorted(pts for pts, _ in order)
    frames: list[int] = []
    for margin in (share / span.fps for share in MARGINS):
        end = span.end - margin if span.num_frames > 1 else math.inf
        frames = [pts for pts in shown if span.start - margin <= float((pts - origin) * base) < end]
        frames = frames[:1] if span.num_frames == 1 else frames
        if len(frames) == span.num_frames:
            break
    return Packets(base, origin, order, frames, target, codec)


def _shown(container: Any, stream: Any) -> Iterator[Any]:
    """The packets that an edit list does not hide, in decoding order."""
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:
            continue
        if packet.pts is None:
            raise BadVideo("its frames carry no presentation times; remux it, for example into .mp4")
        yield packet


def _whole_groups(packets: Packets) -> tuple[list[int], str]:
    """Positions in `order` of the packets to copy, or none and why not."""
    if packets.codec not in COPIED:
        return [], f"{packets.codec} is not copied into .mp4"
    first, last = packets.frames[0], packets.frames[-1]
    order = packets.order
    begin = next((k for k, (pts, key) in enumerate(order) if key and first <= pts <= last), None)
    if begin is None:
        return [], "no key frame within the clip"
    start = order[begin][0]
    # Up to the first packet that is shown after the clip: nothing before it can need it.
    stop = next((k for k in range(begin, len(order)) if order[k][0] > last), len(order))
    shown = sorted(pts for pts, _ in order if pts >= start)
    for end in range(stop, begin, -1):
        # Packets shown before the key frame need the group before it.
        kept = [k for k in range(begin, end) if order[k][0] >= start]
        # Nothing may be missing in between: a group broken off early has shown later frames already.
        if sorted(order[k][0] for k in kept) == shown[: len(kept)]:
            if len(kept) < MIN_COPIED_SHARE * len(packets.frames):
                return [], f"its whole groups of pictures hold {len(kept)} of {len(packets.frames)} frames"
            return kept, ""
    raise AssertionError("a key frame alone is a whole group")


def _planned(span: Span, packets: Packets, frames: list[int], mode: str, encoder: str, why: str) -> Cut:
    """What the file will be; its size is not known yet."""
    first, last = frames[0], frames[-1]
    length = (last - first) * packets.base
    fps = float((len(frames) - 1) / length) if len(frames) > 1 else span.fps
    after = [pts for pts in packets.frames if pts > last]
    end = packets.seconds(after[0]) if after else span.end
    # A row of one frame may say end = start.
    seconds = end - packets.seconds(first) if end > packets.seconds(last) else float(length) + 1 / fps
    # Differences of decimal seconds: 0.28, not 0.27999999999999936.
    skipped, begin = packets.frames.index(first), packets.seconds(first)
    return Cut(mode, encoder, why, skipped, begin, len(frames), round(seconds, 9), fps, 0, 0)


def _comment(planned: Cut, stamp: str) -> str:
    return json.dumps({**asdict(planned), "stamp": stamp})


def _encode(span: Span, packets: Packets, seek: bool, out: Path, encoder: Encoder, comment: str, threads: int) -> None:
    with _opened(span.path) as container:
        width, height = container.streams.video[0].width, container.streams.video[0].height
    if min(width, height) < 2:
        raise BadVideo(f"4:2:0 video needs two pixels a side, it has {width}x{height}")
    begin: list[str] = []
    if seek and packets.key is not None:
        begin = ["-seek_timestamp", "1", "-noaccurate_seek", "-ss", f"{float(packets.key * packets.base):.6f}"]
    filters = [
        f"settb=expr={packets.base.numerator}/{packets.base.denominator}",
        f"trim=start_pts={packets.frames[0]}:end_pts={packets.frames[-1] + 1}",
        "setpts=PTS-STARTPTS",
        "crop=trunc(iw/2)*2:trunc(ih/2)*2:0:0",
    ]
    reason = run_ffmpeg(
        encoder.ffmpeg,
        [
            # As in training, damage stops the decoder; what it paints over all the same, -xerror refuses (run_ffmpeg).
            "-err_detect", "explode", "-threads", str(threads), "-copyts", *begin, "-i", _url(span.path),
            "-map", "0:v:0", "-an", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1", "-vf", ",".join(filters),
            "-fps_mode", "passthrough", "-enc_time_base", f"{packets.base.numerator}:{packets.base.denominator}",
            # One thread: x264's bits depend on their number, and a clip must not depend on the machine that cuts it.
            *encoder.options(width, height, span.fps), "-threads", "1", "-metadata", f"comment={comment}",
            "-movflags", "+faststart", "-f", "mp4", str(out.absolute()),
        ],
        timeout_s=300 + 60 * (span.end - span.start),
    )  # fmt: skip
    if reason:
        raise BadVideo(reason)


def _url(path: str) -> str:
    """What ffmpeg opens: the file, or the part of a tar that a member is."""
    try:
        found = members.located(path)
    except OSError as error:
        raise BadVideo(f"cannot open it as a video ({error.strerror or error})") from None
    if not found:
        return path
    return f"subfile,,start,{found[1]},end,{found[1] + found[2]},,:{found[0].absolute()}"


def _copy(span: Span, packets: Packets, kept: list[int], out: Path, comment: str) -> None:
    import av

    wanted, first = set(kept), packets.order[kept[0]][0]
    try:
        with _opened(span.path) as old, av.open(str(out), "w", format="mp4", options={"movflags": "faststart"}) as new:
            stream = old.streams.video[0]
            target = new.add_stream_from_template(stream)
            target.time_base = stream.time_base
            new.metadata["comment"] = comment
            if packets.seek is not None:
                old.seek(packets.seek, stream=stream)
            for k, packet in enumerate(_shown(old, stream)):
                if k > kept[-1]:
                    break
                if k in wanted:
                    if packet.dts is None:
                        raise BadVideo("its packets carry no decoding times; cut it exactly, or remux it")
                    packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, target
                    new.mux(packet)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, OSError) and error.filename == str(out):
            raise
        raise BadVideo(f"copying stopped ({getattr(error, 'strerror', None) or error})") from None


def _checked(path: Path, planned: Cut, packets: Packets, frames: list[int]) -> Cut:
    """The plan with the size as decoded; BadVideo unless what was written holds its frames at their times."""
    import av

    expected = [(pts - frames[0]) * packets.base for pts in frames]
    times: list[Fraction] = []
    sizes: set[tuple[int, int]] = set()
    try:
        with _opened(str(path)) as container:
            stream = container.streams.video[0]
            base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
            for frame in container.decode(stream):
                if frame.is_corrupt or frame.pts is None:
                    raise BadVideo(f"frame {len(times)} of the clip is corrupt")
                times.append(frame.pts * base)
                sizes.add(_size(frame))
    except av.FFmpegError as error:
        raise BadVideo(f"what was written does not decode ({error.strerror or error})") from None
    if len(times) != len(expected):
        raise BadVideo(f"of {len(expected)} frames {len(times)} came out")
    if [time - times[0] for time in times] != expected:
        raise BadVideo("the frames that came out are not at their times")
    if len(sizes) != 1:
        raise BadVideo("the size of its frames changes within the clip")
    width, height = sizes.pop()
    return Cut(**{**asdict(planned), "width": width, "height": height})


def _size(frame: Any) -> tuple[int, int]:
    """Width and height as shown."""
    return (frame.height, frame.width) if round(frame.rotation / 90) % 2 else (frame.width, frame.height)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A container with a video stream whose decoder stops at damage; BadVideo when there is none."""
    import av

    with ExitStack() as stack:
        try:
            file = stack.enter_context(members.opened(path))
            container = stack.enter_context(av.open(file, "r", metadata_errors="replace"))
        except (av.FFmpegError, OSError) as error:
            raise BadVideo(f"cannot open it as a video ({error.strerror or error})") from None
        if not container.streams.video:
            raise BadVideo("it has no video stream")
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        yield container
