"""Probe: what a video file is, from its header and its packets, without decoding more than one frame.

Every packet is read once, so that a file that ends before its header says so is found here and not hours later, and the
key frames at which a long video is cut into chunks are known. It computes the video's identity, a hash of all its bytes,
in the same go. A file that is no whole video is a BadVideo with the reason.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vchitect_fast.curation.frames import BadVideo, open_url, open_video, reason

CHUNK_S = 240.0  # of video in one scan: what a killed worker has to do again, and what a worker holds in memory
HASH_BLOCK = 1 << 20
RATE_ERROR = 0.01  # of the mean frame rate by which the header may be off
MAX_SIDE = 16384  # pixels; a header that claims more would allocate gigabytes for one frame


@dataclass(frozen=True)
class Source:
    """A video file; sizes as shown (after rotation), times in seconds from its first frame."""

    path: str  # local path or fsspec URL
    video: str  # 16 hex digits over all bytes of the file
    num_bytes: int
    width: int
    height: int
    fps: float  # mean frames a second
    num_packets: int  # of the video stream that are shown, about one a frame
    seconds: float
    codec: str
    pixel_format: str
    chunks: tuple[float, ...]  # start times (s), each at a key frame; the first is 0


def file_stamp(path: str) -> tuple[int, str]:
    """(bytes, when it was changed) of a local path or URL: equal stamps mean that the file need not be read again."""
    if "://" not in path:
        stat = Path(path).stat()
        return stat.st_size, str(stat.st_mtime_ns)
    import fsspec

    system, name = fsspec.core.url_to_fs(path)
    info = system.info(name)
    when = next(
        (info[k] for k in ("ETag", "etag", "mtime", "LastModified", "last_modified", "CRC", "created") if k in info), ""
    )
    return int(info["size"]), str(when)


def probe(path: str) -> Source:
    """Read a whole file without decoding it. Raises BadVideo when it is missing, empty, no video or truncated."""
    import av

    video, num_bytes = _digest(path)
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            # Before anything is decoded: a hostile header can ask for more memory than there is.
            if max(stream.width, stream.height) > MAX_SIDE:
                raise BadVideo(f"its header says {stream.width}x{stream.height} pixels, more than {MAX_SIDE} a side")
            packets = _packets(container, stream)
            rate = stream.average_rate or stream.guessed_rate
            _check_whole(container, stream, packets)
        with open_video(path) as container:
            frame = next(container.decode(video=0))
    except StopIteration:
        raise BadVideo("no frame decodes") from None
    except (av.FFmpegError, OSError, MemoryError) as error:
        raise BadVideo(f"cannot read it as a video ({reason(error)})") from None
    width, height = (frame.height, frame.width) if round(frame.rotation / 90) % 2 else (frame.width, frame.height)
    known = sorted(packets.times)
    fps = rate.numerator / rate.denominator if rate else 0.0
    if len(known) > 1 and known[-1] > known[0]:
        mean = (len(known) - 1) / (known[-1] - known[0])
        # A header knows the first seconds of a variable rate, or a time base (AVI) instead of a rate.
        fps = fps if abs(fps - mean) <= RATE_ERROR * mean else mean
    if not fps:
        raise BadVideo("it does not say its frame rate; remux it, for example into .mp4")
    seconds = known[-1] - known[0] + 1 / fps if known else packets.num_shown / fps
    return Source(
        path, video, num_bytes, width, height, fps, packets.num_shown, seconds,
        stream.codec_context.name if stream.codec_context else "?", frame.format.name,
        _chunks(packets.keys, whole=len(known) < packets.num_shown),
    )  # fmt: skip


@dataclass
class _Packets:
    """What was read. Times (s) from the start of the video stream; an edit list can hide packets that must be decoded."""

    times: list[float]  # of the shown video packets that carry one
    keys: list[float]  # of those that are key frames
    num_shown: int  # video packets
    num_read: int  # with those that an edit list hides
    video_end_s: float  # of the last shown video packet, on the container's clock
    end_s: float  # of the last packet of any stream, on the container's clock


def _packets(container: Any, stream: Any) -> _Packets:
    """Every packet."""
    found = _Packets([], [], 0, 0, 0.0, 0.0)
    for packet in container.demux():
        if not packet.size:
            continue
        time = base = None
        if packet.time_base:
            # Multiplied out: PyAV 19 gives a time base that Fraction arithmetic does not take.
            base = packet.time_base.numerator / packet.time_base.denominator
        if packet.pts is not None and base:
            time = packet.pts * base
            end_s = time + (packet.duration or 0) * base
            found.end_s = max(found.end_s, end_s)
        if packet.stream is not stream:
            continue
        found.num_read += 1
        if packet.is_discard:
            continue
        found.num_shown += 1
        if time is not None and base:
            found.video_end_s = max(found.video_end_s, end_s)
            found.times.append(time - (stream.start_time or 0) * base)
            if packet.is_keyframe:
                found.keys.append(found.times[-1])
    return found


def _check_whole(container: Any, stream: Any, packets: _Packets) -> None:
    """BadVideo where the header promises more than the file holds."""
    start_s, length_s = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
    if "matroska" in container.format.name:  # there the header holds the end, not the length
        length_s -= min(start_s, length_s)
    short = packets.end_s < start_s + length_s - 1.0
    # A table of samples is exact, but an edit list may leave out its end: only both together tell.
    if packets.num_read < stream.frames and stream.duration and stream.time_base:
        base = stream.time_base.numerator / stream.time_base.denominator
        frame_s = (max(packets.times) - min(packets.times)) / max(1, len(packets.times) - 1) if packets.times else 0.0
        slack_s = frame_s * (1.5 if "avi" in container.format.name else 0.5)  # AVI holds no times, the last is a guess
        short |= packets.video_end_s < ((stream.start_time or 0) + stream.duration) * base - slack_s
    if short:
        raise BadVideo(
            f"it is truncated: the header says {stream.frames or '?'} frames and {length_s:.1f} s, "
            f"it holds {packets.num_read} frames and {packets.end_s - start_s:.1f} s"
        )


def _chunks(keys: list[float], *, whole: bool) -> tuple[float, ...]:
    """Start times at least CHUNK_S apart, each of a key frame; one chunk for a file whose packets carry no times."""
    starts = [0.0]
    for key in [] if whole else sorted(keys):
        if key >= starts[-1] + CHUNK_S:
            starts.append(key)
    return tuple(starts)


def _digest(path: str) -> tuple[str, int]:
    digest, num_bytes = hashlib.blake2b(digest_size=8), 0
    try:
        if "://" not in path and not os.stat(path).st_size:
            raise BadVideo("the file is empty")  # not opened: what /proc shows can wait or go on for ever
        with open_url(path) if "://" in path else open(path, "rb") as file:
            while block := file.read(HASH_BLOCK):
                digest.update(block)
                num_bytes += len(block)
    except (OSError, ValueError, ImportError) as error:
        raise BadVideo(f"cannot read the file ({reason(error)})") from None
    if not num_bytes:
        raise BadVideo("the file is empty")
    return digest.hexdigest(), num_bytes
