"""Times what feeds a step: SD3's encoder over mini-batches, reading clips from their disk, decoding windows of them.

The encoder has SD3's layout with random weights, whose time is that of the real ones; its FLOPs are codec.py's. Files are
read past the page cache: the system is asked to forget them first, which it does for clean pages of local disks and may not
for a network's; a rate that is memory's is then what a run would see too. One process, one thread of decoding, as each
loader worker has. Needs diffusers for the encoder; without it, or without clips, the figure is left out and the reason said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from vchitect_fast import members
from vchitect_fast.autotune.codec import CHANNELS, NUM_RESNETS, encode_flops
from vchitect_fast.autotune.probe.clock import several, summary, synchronize
from vchitect_fast.buckets import Window
from vchitect_fast.cluster import Link
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip
from vchitect_fast.shapes import LATENT_CHANNELS, SIZE_MULTIPLE, VideoShape
from vchitect_fast.video import DecodeError, decode_window

READ_BYTES = 2**23  # at once
FIRST_BYTES = 2**12  # whose time is the latency
WINDOW_FRAMES = 8


def measure_codec(
    device: torch.device, mini_batches: Sequence[int], side: int, advance: Callable[[], None]
) -> dict[int, float]:
    """Achieved FLOP/s of encoding so many frames of side x side pixels at once, by mini-batch. UserError: no diffusers."""
    try:
        from diffusers.models.autoencoders.vae import Encoder
    except ImportError as error:
        raise UserError(
            f"the encoder's time needs diffusers, which does not import ({error}); run pip install 'vchitect-fast[sd3]'."
        ) from error
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        encoder = Encoder(
            3, LATENT_CHANNELS, ("DownEncoderBlock2D",) * len(CHANNELS), CHANNELS, NUM_RESNETS, double_z=True
        ).to(dtype)
    found = {}
    for mini_batch in mini_batches:
        frames = torch.rand(mini_batch, 3, side, side, device=device, dtype=dtype)

        def once() -> float:
            synchronize(device)
            start = time.perf_counter()
            encoder(frames)  # noqa: B023
            synchronize(device)
            return time.perf_counter() - start

        with torch.no_grad():
            found[mini_batch] = encode_flops(VideoShape(mini_batch, side, side)) / several(once, 3).median_s
        advance()
    return found


def measure_disk(clips: Iterable[Clip], most_bytes: int, source: str) -> Link:
    """Reading the clips' files, the first `most_bytes` of them in whole files. UserError: nothing can be read or forgotten."""
    if not hasattr(os, "posix_fadvise"):
        raise UserError(
            "reading past the page cache needs posix_fadvise, which this system has not; state the disk in the cluster's file."
        )
    rates: list[float] = []
    latencies: list[float] = []
    total = 0
    for path in dict.fromkeys(clip.path for clip in clips):
        if total >= most_bytes:
            break
        first_s, rest_s, num_bytes = _read_cold(Path(path))
        if num_bytes > FIRST_BYTES:
            latencies.append(first_s)
            rates.append((num_bytes - FIRST_BYTES) / rest_s)
        total += num_bytes
    if not rates:
        raise UserError(f"no clip of the manifest has more than {FIRST_BYTES} bytes to read; give one with real clips.")
    text = f"{source}; {len(rates)} files of {total / len(rates) / 1e6:.1f} MB in the mean, after the page cache forgot them, spread {summary(rates).spread:.0%}"
    return Link("disk", summary(rates).median_s, summary(latencies).median_s, text)


def measure_decode(clips: Iterable[Clip], num_clips: int) -> tuple[float, str]:
    """(source pixels a second that one thread decodes, of what); windows of WINDOW_FRAMES at the clips' own rate and size."""
    rates: list[float] = []
    for clip in clips:
        if len(rates) == num_clips:
            break
        num_frames = min(WINDOW_FRAMES, clip.num_frames)
        start = time.perf_counter()
        try:
            decode_window(Window(clip, 0, clip.start, num_frames), _shape(clip, num_frames), clip.fps)
        except DecodeError:
            continue
        rates.append(num_frames * clip.width * clip.height / (time.perf_counter() - start))
    if not rates:
        raise UserError("no clip of the manifest decodes; give one whose clips can be read here.")
    found = summary(rates)
    return found.median_s, f"windows of {WINDOW_FRAMES} frames of {found.number} clips, spread {found.spread:.0%}"


def _shape(clip: Clip, num_frames: int) -> VideoShape:
    """The clip's own size, down to what a shape may be."""
    return VideoShape(
        num_frames, *(max(SIZE_MULTIPLE, size // SIZE_MULTIPLE * SIZE_MULTIPLE) for size in (clip.width, clip.height))
    )


def _read_cold(path: Path) -> tuple[float, float, int]:
    """(seconds until the first bytes, seconds of the rest, bytes) of a file, or of a member of a tar."""
    try:
        part = members.located(path)
        file, begin, size = part or (path, 0, path.stat().st_size)
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise UserError(
            f"cannot read the clip {path} ({error.strerror}); give a manifest whose clips are here."
        ) from None
    try:
        os.fdatasync(descriptor)  # a page that is not on the disk cannot be forgotten
        os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        os.pread(descriptor, min(size, FIRST_BYTES), begin)
        first = time.perf_counter()
        for at in range(begin + FIRST_BYTES, begin + size, READ_BYTES):
            os.pread(descriptor, min(READ_BYTES, begin + size - at), at)
        return first - start, time.perf_counter() - first, size
    finally:
        os.close(descriptor)
