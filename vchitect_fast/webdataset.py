"""WebDataset tars, made anywhere: which members make up a sample, what its texts say of it, and what its video is.

A sample is KEY.mp4, or KEY.jpg where there is no video, with KEY.json and KEY.txt beside it; members are read where they lie
(members.py) and nothing is extracted. What a tar refuses to give, or a text that is none, is a BadSample with its reason.
Whoever reads decides what becomes of those: clips.py leaves them out and names them, `curate index` refuses such a tar.
No torch; PyAV only in `probe`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from vchitect_fast import members

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ts", ".mpg", ".mpeg")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_TEXT_BYTES = 16 << 20  # of a caption or JSON member; more is no caption
MAX_SIDE = 16384  # pixels; a header that claims more would allocate gigabytes for one frame


class BadSample(Exception):
    """A sample that cannot be used; its message is the reason."""


@dataclass(frozen=True)
class Sample:
    """A video or image in a tar and its texts, as paths into the tar."""

    path: Path
    is_image: bool
    json: Path | None
    txt: Path | None


def samples(tar: Path, contents: members.Contents) -> list[Sample]:
    """The samples of a tar, in its order. BadSample when two of its videos, or of its images, have one key."""
    media: dict[str, str] = {}  # key -> member
    for suffixes in (VIDEO_SUFFIXES, IMAGE_SUFFIXES):
        found: dict[str, str] = {}
        for name in contents.members:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes and found.setdefault(stem, name) != name:
                raise BadSample(f"has two {_kind(name)}s of the key {stem!r} ({found[stem]}, {name}); keep one")
        media = found | media  # a picture beside a video is its thumbnail
    texts = contents.members.keys()
    return [
        Sample(
            tar / name,
            _kind(name) == "image",
            *(next((tar / s for s in (stem + end, _key(name) + end) if s in texts), None) for end in (".json", ".txt")),
        )
        for stem, name in sorted(media.items(), key=lambda item: contents.members[item[1]])
    ]


def texts(sample: Sample) -> tuple[str, dict[str, Any]]:
    """The caption, and all that the sample's JSON says. BadSample when a text is too long, no UTF-8 or no JSON object.

    The caption is KEY.txt's, else "caption" or "text" of KEY.json where that is text, else empty.
    """
    said: dict[str, Any] = {}
    if sample.json:
        try:
            said = json.loads(_read(sample.json))
        except (ValueError, RecursionError) as error:
            raise BadSample(f"{sample.json.name} is not JSON ({error})") from None
        if not isinstance(said, dict):
            raise BadSample(f"{sample.json.name} must hold a JSON object, got {type(said).__name__}")
    caption = said.get("caption", said.get("text"))
    if sample.txt:
        caption = _read(sample.txt).strip()
    return caption if isinstance(caption, str) else "", said


def facts(sample: Sample, said: dict[str, Any]) -> dict[str, float | int]:
    """start, end (s), num_frames, width, height, fps: as the JSON states them, else the file's own. Raises BadSample."""
    needed = ("width", "height") if sample.is_image else ("width", "height", "num_frames", "fps")
    numbers: list[Any] = [said.get(name) for name in needed]
    if not all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) and number > 0
        and (name == "fps" or number == int(number)) for name, number in zip(needed, numbers, strict=True)
    ):  # fmt: skip
        found = probe(sample.path)
        return found | {"end": 0.0, "num_frames": 1, "fps": 1.0} if sample.is_image else found
    width, height, num_frames, fps = [*numbers, 1, 1.0][:4]
    end = 0.0 if num_frames == 1 else num_frames / fps
    return {
        "start": 0.0, "end": end, "num_frames": int(num_frames), "width": int(width), "height": int(height), "fps": float(fps),
    }  # fmt: skip


def probe(path: Path) -> dict[str, float | int]:
    """start, end (s), num_frames, width, height, fps of a whole file, from its packets and its first frame. BadSample."""
    import av

    try:
        with _opened(path) as container:
            stream = container.streams.video[0]
            # From its parts: PyAV 19 gives a time base that Fraction arithmetic does not take.
            base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
            rate = stream.average_rate or stream.guessed_rate
            # Before anything is decoded: a hostile header can ask for more memory than there is.
            if max(stream.width, stream.height) > MAX_SIDE:
                raise BadSample(f"its header says {stream.width}x{stream.height} pixels, more than {MAX_SIDE} a side")
            shown = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        with _opened(path) as container:
            frame = next(container.decode(video=0))
    except (av.FFmpegError, MemoryError) as error:
        raise BadSample(f"it does not decode ({getattr(error, 'strerror', None) or error})") from None
    except StopIteration:
        raise BadSample("no frame decodes") from None
    if not shown:
        raise BadSample("it has no frames")
    if None in shown:
        raise BadSample("its frames carry no presentation times; remux it, for example into .mp4")
    length = (max(shown) - min(shown)) * base
    guessed = rate.numerator / rate.denominator if rate else 1.0
    fps = float((len(shown) - 1) / length) if length else guessed
    width, height = (frame.height, frame.width) if round(frame.rotation / 90) % 2 else (frame.width, frame.height)
    return {
        "start": 0.0, "end": round(float(length) + 1 / fps, 9), "num_frames": len(shown), "width": width, "height": height, "fps": fps,
    }  # fmt: skip


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A container with a video stream whose decoder stops at damage; BadSample when there is none."""
    import av

    with ExitStack() as stack:
        try:
            file = stack.enter_context(members.opened(path))
            container = stack.enter_context(av.open(file, "r", metadata_errors="replace"))
        except (av.FFmpegError, OSError) as error:
            raise BadSample(f"cannot open it as a video ({error.strerror or error})") from None
        if not container.streams.video:
            raise BadSample("it has no video stream")
        context = container.streams.video[0].codec_context
        if context is None:
            raise BadSample("there is no decoder for its video stream")
        context.options = {"err_detect": "explode"}
        yield container


def _read(path: Path) -> str:
    try:
        where = members.located(path)
        if where and where[2] > MAX_TEXT_BYTES:
            raise BadSample(f"{path.name} must be text of at most {MAX_TEXT_BYTES} bytes, got {where[2]}")
        with members.opened(path) as file:
            assert not isinstance(file, str)
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise BadSample(f"{path.name} must be UTF-8 text, byte {error.start} is not") from None
    except OSError as error:
        raise BadSample(f"{path.name} cannot be read ({error.strerror or error})") from None


def _kind(name: str) -> str:
    return "image" if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES else "video"


def _key(name: str) -> str:
    """A member's name up to the first dot after its folder, which is WebDataset's key."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}".lstrip("/")
