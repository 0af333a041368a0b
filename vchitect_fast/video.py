"""Video files and members of tars: the frames of a window, whole short videos in and out. All that touches PyAV in training.

A frame is chosen by its presentation time, never by counting, and times count from the first frame of the file, so that
seeking, variable frame rates and streams that do not start at 0 all give the same frames as a decode from the beginning.
What cannot be decoded is a DecodeError with the reason; a truncated file never repeats its last frame in silence. A pixel
is taken as square whatever the file says. Rotation marked in the file (phones) is applied.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast import members
from vchitect_fast.buckets import Window
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.shapes import VideoShape

if TYPE_CHECKING:
    import av  # where it is used, so that what only trains on latents needs no FFmpeg


class DecodeError(Exception):
    """Frames that were promised cannot be decoded; `whole_file` when no window of this file can."""

    def __init__(self, reason: str, *, whole_file: bool = False) -> None:
        super().__init__(reason)
        self.whole_file = whole_file


def decode_window(window: Window, shape: VideoShape, fps: float, frames: slice | None = None) -> Tensor:
    """The frames of a window, cut to a shape; `frames` says which of them, all by default.

    For each wanted time (`Window.times`) the clip's frame nearest in presentation time, the earlier one at a tie; enlarged
    or shrunk (bicubic, antialiased) to cover the shape and cropped at the centre.

    All of them are decoded in any case, so that ranks which share a window's frames agree on whether it is a good one.

    Returns uint8 RGB [T,3,H,W].
    Raises DecodeError when the file is missing, is not a video, is corrupt at a wanted frame, or ends more than one source
    frame and half a sample period before a wanted time.
    """
    wanted, patience_s = window.times(fps), 1 / window.clip.fps + 0.5 / fps
    kept = frames or slice(0, len(wanted))
    try:
        found = _nearest_frames(window, wanted, kept, patience_s, seek=True)
    except DecodeError as error:
        if error.whole_file or not wanted[0]:
            raise
        # A seek can land too late or on a damaged reference; only a decode from the beginning decides.
        found = _nearest_frames(window, wanted, kept, patience_s, seek=False)
    if not found:
        return torch.empty(0, 3, shape.height, shape.width, dtype=torch.uint8)
    sized = {id(frame): fit(frame, shape.width, shape.height) for frame in {id(f): f for f in found}.values()}
    return torch.stack([sized[id(frame)] for frame in found])


def fit(frame_HWC: np.ndarray, width: int, height: int) -> Tensor:
    """Cover width x height with a uint8 RGB frame, keep its centre; returns uint8 [3,height,width]."""
    rows, columns = frame_HWC.shape[:2]
    crop_h, crop_w = min(rows, round(columns * height / width)), min(columns, round(rows * width / height))
    top, left = (rows - crop_h) // 2, (columns - crop_w) // 2
    crop = torch.from_numpy(frame_HWC[top : top + crop_h, left : left + crop_w].copy()).permute(2, 0, 1)
    if (crop_h, crop_w) == (height, width):
        return crop.contiguous()
    sized = F.interpolate(crop[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    return sized.round_().clamp_(0, 255).to(torch.uint8)


def _nearest_frames(
    window: Window, wanted: list[float], kept: slice, patience_s: float, *, seek: bool
) -> list[np.ndarray]:
    """RGB frames [H,W,3], one a wanted time (ascending) among those `kept`; the same object where one frame serves twice."""
    clip = window.clip
    margin = 0.25 / clip.fps  # a manifest's times may be rounded; a quarter of a frame tells neighbours apart
    begin, end = clip.start - margin, clip.end - margin if clip.num_frames > 1 else math.inf
    chosen: list[np.ndarray | None] = []  # None where it is another rank's
    before: tuple[float, av.VideoFrame] | None = None
    converted: tuple[av.VideoFrame, np.ndarray] | None = None

    def take(frame: av.VideoFrame) -> None:
        nonlocal converted
        if frame.is_corrupt:
            raise DecodeError(f"the frame for {wanted[len(chosen)]:.3f} s is corrupt")
        if not kept.start <= len(chosen) < kept.stop:
            chosen.append(None)
            return
        if converted is None or converted[0] is not frame:
            converted = (frame, _to_rgb(frame))
        chosen.append(converted[1])

    with closing(_frames(clip.path, wanted[0] if seek else None)) as frames:
        for number, (time, frame) in enumerate(frames):
            if seek and number == 0 and time > max(wanted[0], clip.start + margin):
                raise DecodeError(f"a seek to {wanted[0]:.3f} s came out at {time:.3f} s")
            if time < begin:
                continue
            if time >= end:
                break
            while len(chosen) < len(wanted) and time >= wanted[len(chosen)]:
                target = wanted[len(chosen)]
                # A millionth of a second settles ties that rounding would decide.
                take(before[1] if before and target - before[0] <= time - target + 1e-6 else frame)
            if len(chosen) == len(wanted):
                break
            before = (time, frame)
    for target in wanted[len(chosen) :]:
        if before is None or target - before[0] > patience_s:
            last = "none" if before is None else f"{before[0]:.3f} s"
            raise DecodeError(f"no frame for {target:.3f} s, the last that decodes within the clip is at {last}")
        take(before[1])
    return [frame for frame in chosen if frame is not None]


def _frames(path: Path, seek_s: float | None) -> Generator[tuple[float, av.VideoFrame], None, None]:
    """(seconds from the first frame of the file, frame), in order of presentation, from at or before `seek_s`."""
    import av

    with _opened(path) as container:
        if not container.streams.video:
            raise DecodeError("it has no video stream", whole_file=True)
        stream = container.streams.video[0]
        # By default FFmpeg paints over damage and hands out the result as a good frame: of ten windows of a real video with
        # 20 bytes flipped, six came out wrong in silence, with this none. Damage that parses as video stays unseen.
        stream.codec_context.options = {"err_detect": "explode"}
        assert stream.time_base is not None  # every opened stream has one
        time_base = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        origin = stream.start_time or 0
        try:
            if seek_s:
                container.seek(origin + math.floor(seek_s / time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.pts is None:
                    raise DecodeError(
                        "its frames carry no presentation times; remux it, for example into .mp4", whole_file=True
                    )
                yield float((frame.pts - origin) * time_base), frame
        except av.FFmpegError as error:
            raise DecodeError(f"decoding stopped ({error.strerror or error})") from None


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The container of a file, or of a tar's member (members.py); closed at the end, the container before its file."""
    import av

    with ExitStack() as stack:
        try:
            container = stack.enter_context(av.open(stack.enter_context(members.opened(path)), "r"))
        except (av.FFmpegError, OSError) as error:
            raise DecodeError(f"cannot open it as a video ({error.strerror or error})", whole_file=True) from None
        yield container


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [H,W,3], turned the way the file says it is to be shown."""
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def read_video(path: str | Path) -> tuple[Tensor, float]:
    """Every frame of a short video, uint8 RGB [T,H,W,3], and its mean frames a second; DecodeError if it cannot be read."""
    found = [(time, _to_rgb(frame)) for time, frame in _frames(Path(path), None)]
    if not found:
        raise DecodeError("it has no frame that decodes", whole_file=True)
    fps = (len(found) - 1) / (found[-1][0] - found[0][0]) if len(found) > 1 else 1.0
    return torch.from_numpy(np.stack([frame for _, frame in found])), fps


def write_video(path: str | Path, frames: Tensor, fps: float) -> None:
    """Write uint8 RGB frames [T,H,W,3] as MP4: H.264 where this PyAV has libx264, else MPEG-4; whole or not at all.

    Raises UserError when the frames are of another shape or type, have an odd side (4:2:0 halves both), or the file
    cannot be written.
    """
    import av

    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(f"a video needs uint8 frames [T,H,W,3], got {frames.dtype} {list(frames.shape)}; convert them.")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise UserError(
            f"a video needs an even width and height, got {frames.shape[2]}x{frames.shape[1]}; crop one pixel."
        )
    codec, options = ("libx264", {"crf": "14"}) if "libx264" in av.codecs_available else ("mpeg4", {"q": "2"})
    try:
        with whole_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
            stream = cast(
                av.VideoStream, container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
            )
            stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
            for frame in frames.cpu().numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode(None))
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"cannot write the video {path} ({error.strerror or error}); choose another place or free disk space."
        ) from None
