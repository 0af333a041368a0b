"""Training data: clips -> buckets -> the batch of step k, as latents and text embeddings.

`VideoData.batch(step)` is a function of (clips, seed, step) alone, as long as the same files decode: asked in order, after
a resume, or out of order, with or without the cache, it returns the same bits; and n data-parallel ranks return the parts of
what one process with n times the batch returns. Windows are encoded one at a time for that reason. The ranks of an sp group
have the same windows and each its own frames of them (parallel/vae.py).
One background thread decodes the next steps; encoding stays in the caller's thread, so the two times are told apart. A window
that does not decode is replaced by the first good one of its stand-ins (schedule.py); its file is named once; a bucket without
any good window ends the run. It never invents a frame and never shuffles by itself: the order is `schedule.Schedule`'s.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from vchitect_fast import members
from vchitect_fast.buckets import Assignment, Window, assign, why_empty
from vchitect_fast.cache import Cache, cache_key
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.model.text import TextEncoder
from vchitect_fast.model.vae import Codec
from vchitect_fast.parallel.mesh import ALONE, Mesh, agreed
from vchitect_fast.parallel.vae import encode_frames, encode_texts, own_frames
from vchitect_fast.profiling.span import span
from vchitect_fast.schedule import Schedule
from vchitect_fast.shapes import LATENT_CHANNELS, VideoShape
from vchitect_fast.video import DecodeError, decode_window, read_video, write_video

__all__ = ["Batch", "DecodeError", "VideoData", "decode_window", "read_video", "write_video"]

PREFETCH_STEPS = 2
TEXTS_IN_MEMORY = 256  # captions; 333 tokens of 4096 in fp32 are 5.2 MiB each
log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The samples of one step that this rank has: B of one shape, and of their frames its own."""

    shape: VideoShape
    latents: Tensor  # fp32 [B,T_loc,16,h,w]
    text_embeds: Tensor  # [B,N,W]
    pooled: Tensor  # [B,P]
    windows: list[Window]
    data_s: float  # seconds the caller waited for decoding
    encode_s: float  # seconds of codec, text encoder and cache writes
    frames: slice = field(
        default_factory=lambda: slice(None)
    )  # which of the shape's frames are here: all but in an sp group

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
    latents: Tensor | None = None  # fp32 [T_loc,16,h,w]
    frames: Tensor | None = None  # uint8 [T_loc,3,H,W]


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

    plan_batches  samples a step and data-parallel rank for each shape (microbatch x accumulation)
    fps           frames a second at which clips are sampled
    cache         folder for latents and text embeddings, made when absent; None encodes every time
    device        where latents and embeddings are put; one that the mesh's groups carry
    mixture       each planned shape's share of the steps, relative to the others', 0 leaves it out; None gives each as many
                  steps as it has windows for
    mesh          whose part of a step this is; the default is one process

    Raises UserError when no clip fits any shape, or for a mixture that is not of these shapes. Close it, or use it as a
    context, to stop its thread.
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
        mixture: Mapping[VideoShape, float] | None = None,
        mesh: Mesh = ALONE,
    ) -> None:
        shapes = _mixed(plan_batches, mixture)
        self.assignment: Assignment = assign(clips, shapes, fps)
        self._empty = {
            str(shape): why_empty(shape, clips, shapes, fps) for shape in shapes if not self.assignment.windows[shape]
        }
        filled = None if mixture is None else {s: mixture[s] for s in shapes if str(s) not in self._empty}
        self.schedule = Schedule(self.assignment.windows, plan_batches, seed, num_dp=mesh.num_dp, weights=filled)
        self._mesh = mesh
        self._fps, self._codec, self._text_encoder = fps, codec, text_encoder
        self._device = torch.device(device)
        self._cache = Cache(cache) if cache else None
        self._failures = _Failures()
        self._texts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._ahead: dict[int, Future[tuple[VideoShape, list[_Sample]]]] = {}
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

    def require_windows(self) -> None:
        """UserError when a planned shape has no window, with what would fill it; `batch` asks it too, validation does not."""
        if self._empty:
            reasons = "; ".join(f"{shape}: {why}" for shape, why in self._empty.items())
            raise UserError(
                f"no clip fits {len(self._empty)} of the shapes to train on ({reasons}); "
                "add such clips, or plan without the shape, or give it the weight 0 in a mixture."
            )

    def batch(self, step: int) -> Batch:
        """This rank's part of a step, counted from 0, on the device; every rank of an sp group must ask for it.

        Raises UserError, with the first reasons, when no window of the step's shape can be decoded, or as `require_windows`.
        """
        self.require_windows()
        began = time.perf_counter()
        for stale in [known for known in self._ahead if not step <= known <= step + PREFETCH_STEPS]:
            self._ahead.pop(stale).cancel()
        for wanted in range(step, step + 1 + PREFETCH_STEPS):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._thread.submit(self._decode_step, wanted)

        def decoded() -> tuple[VideoShape, list[_Sample], float]:
            with span("data/wait"):
                return *self._ahead.pop(step).result(), time.perf_counter() - began

        return self._encode(*agreed(self._mesh, decoded))  # what is exchanged next needs every rank's samples

    def first_batches(self, num_samples: int) -> list[Batch]:
        """The first good windows in the manifest's order, shape by shape, at most `num_samples`, each once: for validation and samples.

        The same windows on every data-parallel rank, and as many a batch as a rank has in a step.
        """
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
        """In the thread: this rank's samples of a step, bad windows replaced."""
        shape, candidates = self.schedule.candidates(step, self._mesh.dp_rank)
        samples: list[_Sample] = []
        for windows in candidates:
            samples.append(self._first_good(windows, shape, samples))
        return shape, samples

    def _first_good(self, windows: Iterable[Window], shape: VideoShape, have: list[_Sample]) -> _Sample:
        for window in windows:
            # A bucket smaller than the batch comes round to windows that this step already has.
            sample = next((s for s in have if s.window == window), None) or self._decode(window, shape)
            if sample:
                return sample
        raise self._nothing_decodes(str(shape))

    @span("data/decode")
    def _decode(self, window: Window, shape: VideoShape) -> _Sample | None:
        """Latents from the cache, or frames; None, once recorded, when the window does not decode."""
        if window in self._failures:
            return None
        try:
            key = self._latents_key(window, shape) if self._cache else None
            if self._cache and key:
                size = [shape.num_frames, LATENT_CHANNELS, shape.latent_height, shape.latent_width]
                found = self._cache.get_frames(key, size, self._mesh.sp_rank, self._mesh.sizes["sp"])
                if found is not None:
                    return _Sample(window, key, latents=found)
            return _Sample(window, key, frames=decode_window(window, shape, self._fps, self._frames(shape)))
        except DecodeError as error:
            self._failures.add(window, error)
            return None

    def _frames(self, shape: VideoShape) -> slice:
        return own_frames(shape.num_frames, self._mesh.sp_group)

    def _nothing_decodes(self, what: str) -> UserError:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(self._failures.by_file.items())[:3])
        return UserError(f"no clip for {what} can be decoded ({reasons}); mend or replace these files.")

    @span("encode/batch")
    @torch.no_grad()
    def _encode(self, shape: VideoShape, samples: list[_Sample], data_s: float) -> Batch:
        began = time.perf_counter()
        self._check_agreement(samples)
        latents: dict[Window, Tensor] = {}
        for sample in samples:
            if sample.window not in latents:
                latents[sample.window] = self._latents(sample, shape)
        texts = self._encode_texts([sample.window.clip.caption for sample in samples])
        batch = Batch(
            shape=shape,
            frames=self._frames(shape),
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

    def _check_agreement(self, samples: list[_Sample]) -> None:
        """The ranks of an sp group must have the same windows: a step on frames of different videos would go unnoticed."""
        if self._mesh.sp_group is None:
            return
        names = "|".join(f"{s.window.clip.path}/{s.window.clip.start}/{s.window.index}" for s in samples)
        number = int.from_bytes(hashlib.sha256(names.encode()).digest()[:7], "little")
        own = torch.tensor([number], device=self._device)
        everyones = own.new_empty(self._mesh.sizes["sp"])
        dist.all_gather(list(everyones.chunk(self._mesh.sizes["sp"])), own, group=self._mesh.sp_group)
        if len(set(everyones.tolist())) > 1:
            bad = "; ".join(f"{path}: {reason}" for path, reason in list(self._failures.by_file.items())[-3:]) or "none"
            raise UserError(
                f"the ranks of an sp group read different windows, so some file reads on one rank and not on another (rank "
                f"{self._mesh.rank} has {names[:300]}, and could not read: {bad}); mend the disk or the mount, then resume."
            )

    def _latents(self, sample: _Sample, shape: VideoShape) -> Tensor:
        if sample.latents is not None:
            return sample.latents.to(self._device)
        assert sample.frames is not None
        video = sample.frames.to(self._device).float() / 127.5 - 1
        latents = encode_frames(self._codec, video[None])[0].float()
        if self._cache and sample.key:
            self._cache.put_frames(sample.key, latents, shape.num_frames, self._mesh.sp_rank, self._mesh.sizes["sp"])
        return latents.to(self._device)

    def _encode_texts(self, captions: list[str]) -> list[tuple[Tensor, Tensor]]:
        """Embeddings of each caption. Which are in memory is the same on every rank of an sp group, what the cache has may not be."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        known = {caption: self._texts[caption] for caption in captions if caption in self._texts}
        known |= dict(zip(missing, encode_texts(self._text, missing, self._mesh.sp_group), strict=True))
        for caption in captions:
            self._texts[caption] = known[caption]
            self._texts.move_to_end(caption)
        while len(self._texts) > TEXTS_IN_MEMORY:
            self._texts.popitem(last=False)
        return [known[caption] for caption in captions]

    def _text(self, caption: str) -> tuple[Tensor, Tensor]:
        """From the cache, or computed and put there."""
        key = cache_key("text", caption, self._text_encoder.fingerprint)
        found = self._cache.get(key) if self._cache else None
        if found and found.keys() >= {"embeds", "pooled"}:
            return found["embeds"].to(self._device), found["pooled"].to(self._device)
        embeds, pooled = self._text_encoder.encode([caption])
        text = embeds[0].to(self._device), pooled[0].to(self._device)
        if self._cache:
            self._cache.put(key, {"embeds": text[0], "pooled": text[1]})
        return text

    def _latents_key(self, window: Window, shape: VideoShape) -> str:
        clip = window.clip
        try:
            num_bytes, mtime_ns = members.stamp(clip.path)
        except OSError as error:
            raise DecodeError(f"cannot open it as a video ({error.strerror})", whole_file=True) from None
        source = [str(clip.path), num_bytes, mtime_ns, clip.start, clip.end, clip.fps, clip.num_frames]
        return cache_key("latents", *source, window.index, str(shape), self._fps, self._codec.fingerprint)


def _mixed(planned: Iterable[VideoShape], mixture: Mapping[VideoShape, float] | None) -> list[VideoShape]:
    """The shapes to train on; UserError unless a mixture is of the planned ones."""
    shapes = list(planned)
    if mixture is None:
        return shapes
    names = ", ".join(map(str, shapes))
    for shape in mixture:
        if shape not in shapes:
            raise UserError(
                f"the mixture has a weight for {shape}, which is not planned ({names}); plan it, or take it out."
            )
    for shape in shapes:
        if shape not in mixture:
            raise UserError(
                f"the mixture must have a weight for each planned shape ({names}), {shape} lacks one; 0 leaves it out."
            )
    used = [shape for shape in shapes if mixture[shape] != 0]
    if not used:
        raise UserError(f"a mixture needs a weight above 0, got none for {names}; give one, or leave the mixture out.")
    return used
