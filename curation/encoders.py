"""Encoders: which ffmpeg is here and which of its video encoders really works, tried by encoding a few frames.

ffmpeg is a program of its own (from the package imageio-ffmpeg, or the system's), run as a subprocess and never linked, so
that its licence stays with it. That ffmpeg lists an encoder says little: h264_nvenc is listed where no GPU is. Without a
wish the first of ORDER that works is taken; an encoder that was asked for by name is used or refused with ffmpeg's reason.
Nothing is encoded here but the trial.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vchitect_fast.errors import UserError, unknown_name

ORDER = ("h264_nvenc", "libx264", "libopenh264", "libvpx-vp9")  # by speed, then by quality for its size
TRIAL_FRAMES = 5
TRIAL_SIZE = (256, 144)  # pixels; NVENC refuses less than 145x49
TIMEOUT_S = 60.0  # for the trial

# Near lossless to the eye, since another lossy copy must not be what a model learns; a constant quality where one exists.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "h264_nvenc": ("-preset", "p5", "-rc", "vbr", "-cq", "19", "-b:v", "0"),
    "libx264": ("-preset", "veryfast", "-crf", "17"),
    "libopenh264": ("-rc_mode", "bitrate", "-allow_skip_frames", "0"),
    "libvpx-vp9": ("-deadline", "good", "-cpu-used", "4", "-crf", "24", "-b:v", "0", "-row-mt", "1"),
}
_BITS_PER_PIXEL = 0.25  # for libopenh264, which knows no constant quality: 1920x1080 at 25 fps comes to 13 Mbit/s


@dataclass(frozen=True)
class Encoder:
    """A working encoder: the ffmpeg program and the encoder's name in it."""

    ffmpeg: str
    name: str

    def options(self, width: int, height: int, fps: float) -> list[str]:
        """ffmpeg's output options for a video of this size (pixels) and rate; a key frame at least every second."""
        rate: tuple[str, ...] = ()
        if self.name == "libopenh264":
            rate = ("-b:v", str(max(100_000, round(_BITS_PER_PIXEL * width * height * fps))))
        return ["-c:v", self.name, *_OPTIONS[self.name], *rate, "-g", str(max(1, round(fps))), "-pix_fmt", "yuv420p"]


def find_ffmpeg() -> str:
    """Path of the ffmpeg program: imageio-ffmpeg's, else the system's; UserError when there is none."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        if found := shutil.which("ffmpeg"):
            return found
        raise UserError(
            f"cutting clips needs the program ffmpeg ({error}); pip install 'vchitect-fast[curation]'."
        ) from None


def choose(name: str | None = None, order: Sequence[str] = ORDER) -> Encoder:
    """The encoder of that name, or the first of `order` that works here. UserError with the reasons when none does."""
    if name is not None and name not in _OPTIONS:
        raise unknown_name("encoder", name, _OPTIONS)
    ffmpeg = find_ffmpeg()
    reasons = {}
    for candidate in [name] if name else order:
        reasons[candidate] = trial(Encoder(ffmpeg, candidate))
        if not reasons[candidate]:
            return Encoder(ffmpeg, candidate)
    listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    if name:
        raise UserError(
            f"the encoder {name} does not work here ({reasons[name]}); leave --encoder out to take another."
        )
    raise UserError(f"{ffmpeg} must have a video encoder that works, none does ({listed}); pip install imageio-ffmpeg.")


def trial(encoder: Encoder) -> str:
    """Why an encoder does not work, "" when what it wrote decodes to the frames that went in."""
    import av

    width, height = TRIAL_SIZE
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trial.mp4"
        # The options that cutting uses (cut.py), so that an ffmpeg too old for them is found out here.
        arguments = [
            "-f", "lavfi", "-i", f"testsrc2=size={width}x{height}:rate=25", "-frames:v", str(TRIAL_FRAMES),
            "-fps_mode", "passthrough", "-enc_time_base", "1:12800", *encoder.options(width, height, 25.0), str(out),
        ]  # fmt: skip
        if reason := run_ffmpeg(encoder.ffmpeg, arguments, TIMEOUT_S):
            return reason
        try:
            with av.open(str(out)) as container:
                found = sum(1 for _ in container.decode(video=0))
        except (av.FFmpegError, OSError) as error:
            return f"what it wrote does not decode ({getattr(error, 'strerror', None) or error})"
    return "" if found == TRIAL_FRAMES else f"of {TRIAL_FRAMES} frames it wrote {found}"


def run_ffmpeg(ffmpeg: str, arguments: Sequence[str], timeout_s: float | None = None) -> str:
    """Run ffmpeg to its end; the reason when it fails, its first line of complaint, else ""."""
    command = [ffmpeg, "-nostdin", "-hide_banner", "-v", "error", "-xerror", "-y", *arguments]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"ffmpeg did not end within {timeout_s:g} s"
    except OSError as error:
        return f"cannot run {ffmpeg} ({error.strerror})"
    if result.returncode == 0:
        return ""
    lines = result.stderr.decode("utf-8", "replace").strip().splitlines()
    # The first line is the cause, the rest what followed from it; its "[encoder @ 0x55...]" differs from run to run.
    first = lines[0].split("] ", 1)[-1] if lines else ""
    return f"ffmpeg: {first}" if first else f"ffmpeg ended with exit code {result.returncode}"
