"""Frames of a clip for the stages that look at pictures: one decode from the key frame before the clip to its end.

A frame is the one shown at the wanted time: the last whose presentation time is not later. Times count from the first
frame of the file, as in training (video.py), and rotation marked in the file is applied. A file that stops decoding before
the clip ends is a BadVideo with the reason; nothing is repeated or invented.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from vchitect_fast.curation.stage import ClipSpan, Want
from vchitect_fast.profiling.span import span as stretch  # a span is a ClipSpan here

LISTS = {"concat", "dash", "hls", "imf"}  # of other files: their bytes say nothing about the frames
OPEN_BYTES = 5 << 28  # 1.25 GiB: what one open video may take; a worker's own 0.1 GiB keeps it under 1.5 GiB
BACK_S = (0.0, 2.0, 16.0)  # how much before the wanted time (s) a seek is tried, one after the other


class BadVideo(Exception):
    """A video that cannot be used; its message is the reason that quarantine shows."""


@contextmanager
def open_video(path: str) -> Iterator[Any]:
    """A PyAV container of a local path or an fsspec URL, its video decoder set to stop at damage; BadVideo if none."""
    import av

    with ExitStack() as opened:
        try:
            file = opened.enter_context(open_url(path)) if "://" in path else path
            container = opened.enter_context(av.open(file, metadata_errors="replace"))
        except (av.FFmpegError, OSError, ValueError, ImportError) as error:
            raise BadVideo(f"cannot open it as a video ({reason(error)})") from None
        if container.format.name in LISTS:
            raise BadVideo("it is a list of other files; name those")
        if not container.streams.video:
            raise BadVideo("it has no video stream")
        context = container.streams.video[0].codec_context
        if context is None:
            raise BadVideo("there is no decoder for its video stream")
        # FFmpeg paints over damage by default; a clip that training would refuse must not be kept.
        context.options = {"err_detect": "explode"}
        # With slice threads FFmpeg reports no damage at all, with frame threads not every time.
        context.thread_count = 1
        context.thread_type = "NONE"
        yield container


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets this process take OPEN_BYTES more and no more, so that a hostile file ends as "Cannot allocate memory".

    A header of a few bytes can claim pictures of gigabytes or an index of a hundred million packets. Linux only. The limit is
    the process's, so this is for workers, which do one thing at a time, and not for threads side by side.
    """
    try:
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    except (OSError, StopIteration):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + OPEN_BYTES
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def open_url(url: str) -> Iterator[Any]:
    """The bytes of an fsspec URL as a file."""
    import fsspec

    with fsspec.open(url, "rb") as file:  # which holds the archive that the file may lie in
        yield file


@stretch("data/decode")
def clip_frames(span: ClipSpan, wants: Sequence[Want]) -> list[np.ndarray]:
    """The frame of each want, uint8 RGB [H,W,3]; one array serves equal wants. Raises BadVideo."""
    import av

    order = sorted(range(len(wants)), key=lambda k: wants[k].time)
    found: dict[int, np.ndarray] = {}
    sized: dict[tuple[int, int | None], np.ndarray] = {}
    before: Any = None
    number = 0

    def take(frame: Any) -> None:
        k = order[len(found)]
        known = (number, wants[k].short_side)
        if known not in sized:
            sized[known] = to_rgb(frame, wants[k].short_side)
        found[k] = sized[known]

    with open_video(span.path) as container:
        try:
            for time, frame in frames_from(container, span.start):
                while len(found) < len(order) and wants[order[len(found)]].time < time - 1e-6:
                    if before is None:
                        raise BadVideo(
                            f"no frame is shown at {wants[order[len(found)]].time:.3f} s, the first at {time:.3f} s"
                        )
                    take(before)
                if len(found) == len(order):
                    break
                before, number = frame, number + 1
                if time >= span.end:
                    break
        except av.FFmpegError as error:
            raise BadVideo(f"decoding stopped ({reason(error)})") from None
    while before is not None and len(found) < len(order) and wants[order[len(found)]].time <= span.end + 1e-6:
        take(before)
    if len(found) < len(order):
        raise BadVideo(f"no frame decodes for {wants[order[len(found)]].time:.3f} s")
    return [found[k] for k in range(len(wants))]


def frames_from(container: Any, start: float) -> Iterator[tuple[float, Any]]:
    """(seconds from the first frame of the file, frame), in order of presentation, from at or before `start` (s).

    A seek can come out behind the frame (containers sort by decoding time, .ts has no table) or at an open group whose first
    pictures lean on the group before. Then it is tried from further back, and at last only the beginning decides.
    """
    import av

    stream = container.streams.video[0]
    ticks, over = stream.time_base.numerator, stream.time_base.denominator  # a time is pts * ticks / over
    origin = stream.start_time or 0
    given = None  # pts of the last frame handed out; a second try goes on after it
    for target in [*(start - back_s for back_s in BACK_S if start > back_s), None]:
        if target is not None:
            packets = _from_key(
                container, origin + math.floor(target * over / ticks), origin + start * over / ticks + 1e-3
            )
        else:
            if start > 0:
                container.seek(min(0, container.start_time or 0))  # of .ts, its own start would land on the second key
            packets = container.demux(stream)
        whole, known = True, given  # nothing went wrong in this try; handed out before it
        try:
            for frame in (frame for packet in packets for frame in packet.decode()):
                if frame.pts is None:
                    raise BadVideo("its frames carry no presentation times; remux it, for example into .mp4")
                time = (frame.pts - origin) * ticks / over
                if frame.is_corrupt and target is not None:
                    whole = False
                    break
                if frame.is_corrupt:
                    raise BadVideo(f"the frame at {time:.3f} s is corrupt")
                if known is None or frame.pts > known:
                    given = frame.pts
                    yield time, frame
        except av.FFmpegError:
            if target is None:
                raise
            whole = False
        if whole and given is not None:
            return


@contextmanager
def ahead(items: Iterator[Any], num: int = 2) -> Iterator[Iterator[Any]]:
    """The same items, drawn in a thread up to `num` ahead of their use: decoding goes on while what came is looked at.

    An exception comes after the items before it. Leaving the block ends the thread, also in the middle.
    """
    waiting: Queue[tuple[str, Any]] = Queue(num)
    left = Event()

    def draw() -> None:
        try:
            while True:
                with stretch("data/decode"):
                    item = next(items, None)
                if item is None:
                    waiting.put(("end", None))
                    return
                waiting.put(("item", item))
                if left.is_set():
                    return
        except BaseException as error:
            waiting.put(("error", error))

    def handed() -> Iterator[Any]:
        while True:
            kind, value = waiting.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value

    thread = Thread(target=draw, name="decode", daemon=True)
    thread.start()
    try:
        yield handed()
    finally:
        left.set()
        while thread.is_alive():  # it may wait for room
            with suppress(Empty):
                waiting.get_nowait()
            thread.join(0.001)


def _from_key(container: Any, seek_pts: int, start_pts: float) -> Iterator[Any]:
    """Packets from the key frame that a seek finds, without those shown before it; none where it is after `start_pts`."""
    stream = container.streams.video[0]
    container.seek(seek_pts, stream=stream)
    key = None
    for packet in container.demux(stream):
        if key is None:
            if not packet.is_keyframe or packet.pts is None:
                continue
            if packet.pts > start_pts:
                return
            key = packet.pts
        if not packet.size or packet.pts is None or packet.pts >= key:
            yield packet


def to_rgb(frame: Any, short_side: int | None = None) -> np.ndarray:
    """uint8 RGB [H,W,3], turned as shown; shrunk (never enlarged) by area averaging to `short_side` pixels."""
    width, height = frame.width, frame.height
    if short_side is not None and short_side < min(width, height):
        scale = short_side / min(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
    image = frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90) % 4))


def reason(error: Exception) -> str:
    """What the system or FFmpeg says of an error, in a few words."""
    return str(getattr(error, "strerror", None) or error)
