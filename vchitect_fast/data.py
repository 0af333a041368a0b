"""Training data: clips -> buckets -> the batch of step k, as latents and text embeddings.

`VideoData.batch(step)` is a function of (clips, seed, step) alone, as long as the same files decode: asked in order, after
a resume, or out of order, with or without the cache, it returns the same bits. Windows are encoded one at a time for that reason. One background thread
decodes the next steps; encoding stays in the caller's thread, so the two times are told apart. A window that does not
decode is replaced by the next one of its bucket's permutation; its file is named once; a bucket without any good window
ends the run. It never invents a frame and never shuffles by itself: the order is `buckets.Schedule`'s.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from vchitect_fast import members
from vchitect_fast.buckets import Assignment, Schedule, Window, assign
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.manifest import Clip
from vchitect_fast.model.text import TextEncoder
from vchitect_fast.model.vae import Codec
from vchitect_fast.shapes import LATENT_CHANNELS, VideoShape
from vchitect_fast.video import DecodeError, decode_window, read_video, write_video

__all__ = ["Batch", "DecodeError", "VideoData", "decode_window", "read_video", "write_video"]

PREFETCH_STEPS = 2
TEXTS_IN_MEMORY = 256  # captions; 333 tokens of 4096 in fp32 are 5.2 MiB each
log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The samples of one step: B samples of one shape."""

    shape: VideoShape
    latents: Tensor  # fp32 [B,T,16,h,w]
    text_embeds: Tensor  # [B,N,W]
    pooled: Tensor  # [B,P]
    windows: list[Window]
    data_s: float  # seconds the caller waited for decoding
    encode_s: float  # seconds of codec, text encoder and cache writes

    @property
    def clips(self) -> list[Clip]:
        """The clip of every sample."""
        return [window.clip for window in self.windows]

    @property
    def captions(self) -> list[str]:
        """The caption of every sample."""
        return [window.clip.caption for window in self.windows]


@dataclass(frozen=True)
class _Sample:
    """A decoded window: its latents when the cache had them, else its frames; `key` None without a cache."""

    window: Window
    key: str | None
    latents: Tensor | None = None  # fp32 [T,16,h,w]
    frames: Tensor | None = None  # uint8 [T,3,H,W]


@dataclass
class _Failures:
    """Which windows cannot be decoded. Only what holds for every window of a file condemns the file, so that what is
    skipped does not depend on which window was tried first."""

    by_file: dict[str, str] = field(default_factory=dict)  # path -> first reason, in the order met
    files: set[Path] = field(default_factory=set)
    windows: set[Window] = field(default_factory=set)

    def __contains__(self, window: Window) -> bool:
        return window in self.windows or window.clip.path in self.files

    def add(self, window: Window, error: DecodeError) -> None:
        path = str(window.clip.path)
        if path not in self.by_file:
            log.warning("skipping windows of %s: %s", path, error)
            self.by_file[path] = str(error)
        self.windows.add(window)
        if error.whole_file:
            self.files.add(window.clip.path)


class VideoData:
    """Batches of a manifest's clips for the shapes of a Plan.

    plan_batches  samples a step for each shape (microbatch x accumulation)
    fps           frames a second at which clips are sampled
    cache         folder for latents and text embeddings, made when absent; None encodes every time
    device        where latents and embeddings are put

    Raises UserError when no clip fits any shape. Close it, or use it as a context, to stop its thread.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        plan_batches: dict[VideoShape, int],
        *,
        seed: int,
        fps: float,
        codec: Codec,
        text_encoder: TextEncoder,
        cache: Path | None,
        device: torch.device | str,
    ) -> None:
        self.assignment: Assignment = assign(clips, list(plan_batches), fps)
        self.schedule = Schedule(self.assignment.windows, plan_batches, seed)
        self._fps, self._codec, self._text_encoder = fps, codec, text_encoder
        self._device = torch.device(device)
        self._cache = _Cache(cache) if cache else None
        self._failures = _Failures()
        self._texts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._ahead: dict[int, Future[tuple[VideoShape, list[_Sample]]]] = {}
        for shape, windows in self.assignment.windows.items():
            if not windows:
                log.warning("no clip fits the shape %s; it is planned but will not be trained on", shape)
        if self.assignment.too_short:
            log.warning("%s", self.assignment.report())

    @property
    def skipped(self) -> dict[str, str]:
        """Path -> first reason, for every file with a window that did not decode."""
        return dict(self._failures.by_file)

    @property
    def num_failed_windows(self) -> int:
        """Windows that were tried and did not decode."""
        return len(self._failures.windows)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0, on the device.

        Raises UserError, with the first reasons, when no window of the step's shape can be decoded.
        """
        began = time.perf_counter()
        for stale in [known for known in self._ahead if not step <= known <= step + PREFETCH_STEPS]:
            self._ahead.pop(stale).cancel()
        for wanted in range(step, step + 1 + PREFETCH_STEPS):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._thread.submit(self._decode_step, wanted)
        shape, samples = self._ahead.pop(step).result()
        return self._encode(shape, samples, time.perf_counter() - began)

    def first_batches(self, num_samples: int) -> list[Batch]:
        """The first good windows in the manifest's order, shape by shape, at most `num_samples`, each once: for validation and samples."""
        batches = []
        for shape, windows in self.assignment.windows.items():
            samples: list[_Sample] = []
            began = time.perf_counter()
            for window in windows:
                if len(samples) == num_samples:
                    break
                sample = self._thread.submit(self._decode, window, shape).result()
                samples += [sample] if sample else []
            num_samples -= len(samples)
            waited_s, size = time.perf_counter() - began, self.schedule.batch_size(shape) if windows else 1
            for k in range(0, len(samples), size):
                batches.append(self._encode(shape, samples[k : k + size], waited_s if k == 0 else 0.0))
        if not batches:
            raise self._nothing_decodes("any shape")
        return batches

    def captions(self, num: int) -> list[str]:
        """The first `num` different captions of clips in use, in the manifest's order."""
        found = dict.fromkeys(w.clip.caption for windows in self.assignment.windows.values() for w in windows)
        return list(found)[:num]

    def close(self) -> None:
        """Drop what is decoded ahead and end the thread."""
        self._ahead.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> VideoData:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decode_step(self, step: int) -> tuple[VideoShape, list[_Sample]]:
        """In the thread: the step's samples, bad windows replaced by the next good ones."""
        shape, candidates = self.schedule.candidates(step)
        samples: list[_Sample] = []
        for tried, window in enumerate(candidates):
            if len(samples) == self.schedule.batch_size(shape):
                break
            if tried >= self.schedule.num_windows(shape) and not samples:
                raise self._nothing_decodes(str(shape))
            # A bucket smaller than the batch comes round to windows that this step already has.
            sample = next((s for s in samples if s.window == window), None) or self._decode(window, shape)
            samples += [sample] if sample else []
        return shape, samples

    def _decode(self, window: Window, shape: VideoShape) -> _Sample | None:
        """Latents from the cache, or frames; None, once recorded, when the window does not decode."""
        if window in self._failures:
            return None
        try:
            key = self._latents_key(window, shape) if self._cache else None
            if self._cache and key:
                size = [shape.num_frames, LATENT_CHANNELS, shape.latent_height, shape.latent_width]
                found = self._cache.get(key)
                if found and list(found["latents"].shape) == size:
                    return _Sample(window, key, latents=found["latents"])
            return _Sample(window, key, frames=decode_window(window, shape, self._fps))
        except DecodeError as error:
            self._failures.add(window, error)
            return None

    def _nothing_decodes(self, what: str) -> UserError:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(self._failures.by_file.items())[:3])
        return UserError(f"no clip for {what} can be decoded ({reasons}); mend or replace these files.")

    @torch.no_grad()
    def _encode(self, shape: VideoShape, samples: list[_Sample], data_s: float) -> Batch:
        began = time.perf_counter()
        latents: dict[Window, Tensor] = {}
        for sample in samples:
            if sample.window not in latents:
                latents[sample.window] = self._latents(sample)
        texts = [self._text(sample.window.clip.caption) for sample in samples]
        batch = Batch(
            shape=shape,
            latents=torch.stack([latents[sample.window] for sample in samples]),
            text_embeds=torch.stack([embeds for embeds, _ in texts]),
            pooled=torch.stack([pooled for _, pooled in texts]),
            windows=[sample.window for sample in samples],
            data_s=data_s,
            encode_s=0.0,
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # encode_s would otherwise be the time to launch
        batch.encode_s = time.perf_counter() - began
        return batch

    def _latents(self, sample: _Sample) -> Tensor:
        if sample.latents is not None:
            return sample.latents.to(self._device)
        assert sample.frames is not None
        video = sample.frames.to(self._device).float() / 127.5 - 1
        latents = self._codec.encode(video[None])[0].float()
        if self._cache and sample.key:
            self._cache.put(sample.key, {"latents": latents})
        return latents.to(self._device)

    def _text(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption in self._texts:
            self._texts.move_to_end(caption)
            return self._texts[caption]
        key = _key("text", caption, self._text_encoder.fingerprint)
        found = self._cache.get(key) if self._cache else None
        if found and found.keys() >= {"embeds", "pooled"}:
            text = found["embeds"].to(self._device), found["pooled"].to(self._device)
        else:
            embeds, pooled = self._text_encoder.encode([caption])
            text = embeds[0].to(self._device), pooled[0].to(self._device)
            if self._cache:
                self._cache.put(key, {"embeds": text[0], "pooled": text[1]})
        self._texts[caption] = text
        if len(self._texts) > TEXTS_IN_MEMORY:
            self._texts.popitem(last=False)
        return text

    def _latents_key(self, window: Window, shape: VideoShape) -> str:
        clip = window.clip
        try:
            num_bytes, mtime_ns = members.stamp(clip.path)
        except OSError as error:
            raise DecodeError(f"cannot open it as a video ({error.strerror})", whole_file=True) from None
        source = [str(clip.path), num_bytes, mtime_ns, clip.start, clip.end, clip.fps, clip.num_frames]
        return _key("latents", *source, window.index, str(shape), self._fps, self._codec.fingerprint)


def _key(kind: str, *parts: object) -> str:
    return f"{kind}/{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"


class _Cache:
    """A folder of safetensors files, one an entry. A damaged entry counts as absent, is named and is written again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path:
        kind, digest = key.split("/")
        return self._folder / kind / digest[:2] / f"{digest}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        path = self._path(key)
        try:
            return load(path.read_bytes())
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            log.warning("the cache file %s is damaged (%s) and is written again", path, error)
            return None
        except OSError as error:
            raise UserError(
                f"cannot read the cache file {path} ({error.strerror}); mend its permissions or choose another cache folder."
            ) from None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        path = self._path(key)
        try:
            with whole_file(path) as partial:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(partial))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the cache file {path} ({error}); free disk space or choose another cache folder."
            ) from None
