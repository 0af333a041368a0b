"""Signals: what one decode of a video leaves behind for every stage that needs no picture. A few numbers a frame.

    time         s from the first frame of the file
    content      PySceneDetect's content_val against the frame before: mean of the hue, saturation and value differences
    luma_change  mean absolute difference of the luma to the frame before, full resolution, 0..255
    brightness, contrast, saturation   mean and deviation of the grey thumb, mean saturation; 0..255
    layout       the thumb averaged down to 8x8, RGB: where which colour is
    flow         at every sampled frame: mean of the top 5 % optical-flow magnitudes from the sampled frame before (px), else NaN
    shift_x, shift_y   median flow of that pair (px): how the camera moves
    cut          TransNetV2's probability of a cut after this frame, where that backend was asked for, else NaN

The thumb is the frame shrunk to a short side of 128 pixels, as in the paper's motion stage. Frames are sampled for flow
every max(1, round(fps / 8)) (VBench). Luma is the video's own, taken to full range: no colour conversion of whole frames.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vchitect_fast.curation.frames import BadVideo, ahead, frames_from, open_video, reason
from vchitect_fast.curation.motion_rule import TOP_SHARE
from vchitect_fast.curation.probe import Source
from vchitect_fast.profiling.span import span

THUMB = 128  # short side in pixels
LAYOUT = 8  # cells a side
TRANSNET_STEP = 50  # its windows of 100 frames begin every 50, and the middle 50 count
TRANSNET_AFTER = 75  # frames after one that counts, to which its window may reach
VERSION = 2  # raised whenever the same file gives other signals


@dataclass
class Signals:
    """One row a frame, in order of presentation; float32 [n] each, time float64, layout uint8 [n, 8*8*3]."""

    time: np.ndarray
    content: np.ndarray
    luma_change: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    layout: np.ndarray
    flow: np.ndarray
    shift_x: np.ndarray
    shift_y: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, frames: slice) -> Signals:
        return Signals(*(getattr(self, f.name)[frames] for f in fields(self)))

    @classmethod
    def joined(cls, parts: list[Signals]) -> Signals:
        """Chunks, in order, as one."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def to_bytes(self) -> bytes:
        """A Parquet file; compressed, as it is kept."""
        import pyarrow
        import pyarrow.parquet

        arrays = {}
        for f in fields(self):
            # By buffers, here and below: pyarrow's own ways from and to numpy import pandas, which takes a fifth of a second.
            values = np.ascontiguousarray(getattr(self, f.name))
            kind = pyarrow.binary(values.shape[1]) if values.ndim == 2 else pyarrow.from_numpy_dtype(values.dtype)
            arrays[f.name] = pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(arrays), sink, compression="zstd")
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Signals:
        """What `to_bytes` wrote."""
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(io.BytesIO(content)).read()
        found = {}
        for f in fields(cls):
            dtype: type = {"time": np.float64, "layout": np.uint8}.get(f.name, np.float32)
            parts: list[np.ndarray] = [np.frombuffer(chunk.buffers()[1], dtype) for chunk in table[f.name].chunks]
            found[f.name] = np.concatenate(parts)
        return cls(**{**found, "layout": found["layout"].reshape(table.num_rows, LAYOUT * LAYOUT * 3)})


def scan(
    source: Source, chunk: int = 0, *, transnet: Any = None, on_frame: Callable[[], None] = lambda: None
) -> Signals:  # fmt: skip
    """Decode chunk `chunk` of a video once. `transnet` takes frames as curation/transnet.py's TransNet does.

    Frames before the chunk, and for TransNet after it, are decoded as well, so that chunks give what the whole would.
    Raises BadVideo.
    """
    import av
    import cv2

    cv2.setNumThreads(1)  # one process a core; OpenCV's own threads would fight over them
    quarter = 0.25 / source.fps  # chunk times come from packets, frame times from frames
    begin, stop = source.chunks[chunk] - quarter, (*source.chunks, np.inf)[chunk + 1] - quarter
    helper = ThreadPoolExecutor(1, thread_name_prefix="flow")
    view = _View(source, helper)
    start, end = view.before(begin), stop
    if transnet:
        start, end = min(start, _window_start(begin, source.fps)), stop + TRANSNET_AFTER / source.fps
    rows: list[tuple[Any, ...]] = []
    inside: list[bool] = []  # of the frames that TransNet has seen, which belong to the chunk
    last: Any = None
    try:
        with (
            open_video(source.path) as container,
            ahead(frames_from(container, max(0.0, start) if chunk else 0.0)) as frames,
        ):
            for time, frame in frames:
                if time >= end:
                    break
                if time < start:
                    last = frame
                    continue
                if last is not None:  # a frame shown long enough to lie before `start` is still the one to compare with
                    view.compare_with(last)
                    last = None
                with span("curate/signals"):
                    thumb = view.thumb(frame)
                    row = view.row(time, frame, thumb) if time < stop else ()
                if transnet:
                    transnet.push(cv2.resize(thumb, (48, 27), interpolation=cv2.INTER_AREA))
                    inside.append(begin <= time < stop)
                if row:
                    if time >= begin:
                        rows.append(row)
                        on_frame()
    except av.FFmpegError as error:
        raise BadVideo(
            f"decoding stopped at {rows[-1][0] if rows else source.chunks[chunk]:.2f} s ({reason(error)})"
        ) from None
    finally:
        helper.shutdown()
    if not rows:
        raise BadVideo(f"no frame decodes after {source.chunks[chunk]:.2f} s")
    columns = [np.asarray(column, np.float32) for column in zip(*(row[1:-2] for row in rows), strict=True)]
    flows = np.asarray([row[-2].result() if row[-2] else (np.nan,) * 3 for row in rows], np.float32).T
    cut = transnet.finish()[np.asarray(inside)] if transnet else np.full(len(rows), np.nan)
    times, layouts = np.asarray([row[0] for row in rows]), np.stack([row[-1] for row in rows])
    content, luma_change, brightness, contrast, saturation = columns
    flow, shift_x, shift_y = np.ascontiguousarray(flows)
    return Signals(
        times, content, luma_change, brightness, contrast, saturation, layouts, flow, shift_x, shift_y, cut.astype(np.float32)
    )  # fmt: skip


def _window_start(begin: float, fps: float) -> float:
    """A time (s), half a frame early, from which TransNet's windows lie as from the start of the video.

    Exact at a constant frame rate. The first window of a stream sees frames that are not there, so it is one before `begin`'s.
    """
    return (TRANSNET_STEP * (math.ceil(begin * fps) // TRANSNET_STEP - 1) - 0.5) / fps


def whole(source: Source, parts: list[Signals]) -> Signals:
    """The chunks of a video as one; BadVideo when over 1 % of its frames did not decode or time runs backwards."""
    signals = Signals.joined(parts)
    if len(signals) < 0.99 * source.num_packets:
        raise BadVideo(f"it is damaged: {len(signals)} frames decode of about {source.num_packets}")
    if (np.diff(signals.time) <= 0).any():
        raise BadVideo("its presentation times do not increase; remux it, for example into .mp4")
    return signals


class _View:
    """Turns frames into rows; remembers the frame before and the last sampled one."""

    def __init__(self, source: Source, helper: Executor) -> None:
        """`helper` has one thread, in which the optical flow is computed beside the decoding of what follows."""
        import cv2
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()  # kept: setting one up costs more than using it
        self._dis: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        # Smoothing takes half of the time and leads away from preset MEDIUM, which costs five times as much: at its top 5 %,
        # 5.3 instead of 6.4 px apart on bikes.mp4, 0.5 instead of 0.9 on bigbuckbunny, 0.8 instead of 1.1 on carphone.
        self._dis.setVariationalRefinementIterations(0)
        self._helper = helper
        self._latest: Future[tuple[float, float, float]] | None = None
        self._every_s = max(1, round(source.fps / 8)) / source.fps
        self._quarter_s = 0.25 / source.fps
        self._hsv: np.ndarray | None = None
        self._luma: np.ndarray | None = None
        self._sampled: tuple[int, np.ndarray] | None = None
        self._flowing: Future[tuple[float, float, float]] | None = None

    def thumb(self, frame: Any) -> np.ndarray:
        """uint8 RGB, short side 128 (enlarged if the video is smaller), not turned."""
        import cv2

        scale = THUMB / min(frame.width, frame.height)
        width, height = max(THUMB, round(frame.width * scale)), max(THUMB, round(frame.height * scale))
        # As planes: of packed RGB, swscale writes only unscaled pictures quickly.
        small = self._reformatter.reformat(frame, width, height, format="gbrp", interpolation="AREA")
        green, blue, red = (_plane(plane) for plane in small.planes)
        return cv2.merge((red, green, blue))

    def before(self, time: float) -> float:
        """From when on (s) frames are needed for the flow at `time`: the sampled frame before it and all in its slot."""
        return (self._slot(time) - 1) * self._every_s - self._quarter_s

    def compare_with(self, frame: Any) -> None:
        """Let the next row be compared with this frame; nothing is sampled."""
        import cv2

        self._hsv, self._luma = cv2.cvtColor(self.thumb(frame), cv2.COLOR_RGB2HSV), self._luma_of(frame)

    def row(self, time: float, frame: Any, thumb: np.ndarray) -> tuple[Any, ...]:
        """The signals of a frame."""
        import cv2

        hsv, luma = cv2.cvtColor(thumb, cv2.COLOR_RGB2HSV), self._luma_of(frame)
        content = luma_change = 0.0
        if self._hsv is not None and self._luma is not None and self._luma.shape == luma.shape:
            content = sum(cv2.mean(cv2.absdiff(hsv, self._hsv))[:3]) / 3
            luma_change = cv2.norm(luma, self._luma, cv2.NORM_L1) / luma.size * self._luma_scale
        self._hsv, self._luma = hsv, luma
        grey = cv2.cvtColor(thumb, cv2.COLOR_RGB2GRAY)
        mean, deviation = cv2.meanStdDev(grey)
        height, width = grey.shape  # the short side first: it divides evenly, which OpenCV does fast
        strip = cv2.resize(thumb, (LAYOUT, height) if width < height else (width, LAYOUT), interpolation=cv2.INTER_AREA)
        layout = cv2.resize(strip, (LAYOUT, LAYOUT), interpolation=cv2.INTER_AREA)
        if frame.rotation:
            layout = np.rot90(layout, round(frame.rotation / 90) % 4)
        self._start_flow(time, grey)
        return (
            time,
            content,
            luma_change,
            mean[0, 0],
            deviation[0, 0],
            cv2.mean(hsv)[1],
            self._flowing,
            layout.reshape(-1),
        )

    def _slot(self, time: float) -> int:
        """By time, not by count: chunks and variable rates keep one grid. Its lines lie between frames, not on them."""
        return math.floor((time + self._quarter_s) / self._every_s)

    def _start_flow(self, time: float, grey: np.ndarray) -> None:
        """Set `_flowing` to the flow from the sampled frame before, in the making, or None where nothing is sampled."""
        slot, before = self._slot(time), self._sampled
        if before is not None and slot == before[0]:
            self._flowing = None
            return
        self._sampled = (slot, grey)
        if self._latest is not None:
            with span("curate/wait"):
                self._latest.result()  # one at a time: what waits holds pictures
        follows = before is not None and slot == before[0] + 1 and before[1].shape == grey.shape
        self._flowing = self._helper.submit(self._flow_between, before[1], grey) if follows and before else None
        self._latest = self._flowing

    @span("curate/flow")
    def _flow_between(self, before: np.ndarray, grey: np.ndarray) -> tuple[float, float, float]:
        """(top-5 % magnitude, median x, median y)."""
        import cv2

        flow = self._dis.calc(before, grey, None)
        top = _top_mean(cv2.magnitude(flow[..., 0], flow[..., 1]).ravel())
        x, y = (float(np.median(flow[::4, ::4, axis])) for axis in (0, 1))
        return top, x, y

    def _luma_of(self, frame: Any) -> np.ndarray:
        """The luma plane as it lies in the frame where it is planar, else converted grey; sets the scale to 0..255."""
        name = frame.format.name
        if name not in _LUMA_STEPS:
            self._luma_scale = 1.0
            return frame.reformat(format="gray").to_ndarray()
        plane, steps = frame.planes[0], _LUMA_STEPS[name]
        # AVCOL_RANGE_JPEG is 2; limited range spans 219 steps of 8 bits.
        full = name.startswith("yuvj") or frame.color_range == 2
        self._luma_scale = (1.0 if full else 255 / 219) / steps
        return _plane(plane, np.uint8 if steps == 1 else np.uint16)


def _top_mean(magnitude: np.ndarray) -> float:
    """Mean of the largest 5 %; selected among those over a lower bound that a sixteenth of them gives, where that is enough."""
    num_top = max(1, int(magnitude.size * TOP_SHARE))
    few = magnitude[::16]
    bound = np.partition(few, len(few) - 1 - len(few) // 10)[len(few) - 1 - len(few) // 10]
    over = magnitude[magnitude >= bound]
    over = over if len(over) >= num_top else magnitude
    return float(np.partition(over, -num_top)[-num_top:].mean())


def _plane(plane: Any, dtype: type = np.uint8) -> np.ndarray:
    """A plane's pixels [H,W] where they lie."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size).view(dtype)[:, : plane.width]


# Pixel formats with a luma plane of their own -> steps of it in one of 8 bits.
_LUMA_STEPS = (
    dict.fromkeys(("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12", "nv21"), 1)
    | dict.fromkeys(("yuv420p10le", "yuv422p10le", "yuv444p10le"), 4)
    | dict.fromkeys(("yuv420p12le", "yuv422p12le", "yuv444p12le"), 16)
    | dict.fromkeys(("p010le",), 256)
)
