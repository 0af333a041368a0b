"""Videos from prompts: noise -> Euler steps with guidance -> latents -> frames -> an mp4 and a filmstrip PNG.

A Pipeline is what sampling needs together: a velocity, a latent codec and a text encoder. `vchitect-fast sample` loads one
from a folder that `train` or `export` wrote (its pipeline.json names codec and text encoder) or from a released folder.
A codec or text encoder is never guessed: where the folder does not name one, the command asks for it.
Under torchrun all ranks make one video: each holds its frames through all steps and decodes them, rank 0 gathers and writes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file
from vchitect_fast.model import VchitectTransformer
from vchitect_fast.model.flow import GUIDANCE_KINDS, Velocity, sample_latents
from vchitect_fast.model.text import TextEncoder, load_text_encoder
from vchitect_fast.model.vae import Codec, load_codec
from vchitect_fast.model.weights import PIPELINE_FILE, read_json
from vchitect_fast.parallel.mesh import ALONE, Mesh, launched, read_launch
from vchitect_fast.parallel.vae import decode_frames, encode_texts, gather_frames, own_frames
from vchitect_fast.plan import ShardSpec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import write_video

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS: dict[str, tuple[type, ...]] = {  # of pipeline.json
    "codec": (str,), "text_encoder": (str,), "shape": (str,), "fps": (int, float), "shift": (int, float),
}  # fmt: skip
FPS_RANGE = (0.1, 1000.0)
BY_FRAMES = ShardSpec("frames", temporal="tokens")  # how `sample` cuts a video over ranks: the fewest bytes exchanged


@dataclass
class Pipeline:
    """Velocity, codec and text encoder on one device; of several ranks, one rank's.

    mesh  whose sp group shares the frames of a video; the velocity is then asked for this rank's frames
    cut   called with a video's whole number of frames before the velocity is; for a model, its `set_shard`
    """

    velocity: Velocity
    config: TransformerConfig
    codec: Codec
    text_encoder: TextEncoder
    device: torch.device
    mesh: Mesh = ALONE
    cut: Callable[[int], None] = lambda num_frames: None

    def generate(
        self,
        prompts: Sequence[str],
        shape: VideoShape,
        *,
        seeds: Sequence[int],
        num_steps: int = 30,
        guidance: float = 4.0,
        guidance_kind: str = "constant",
        shift: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """uint8 [B, T, H, W, 3] on the CPU, one video a prompt; each depends on its own seed only, not on its neighbours.

        Every rank of an sp group must call it; its first rank gets the videos, the others [B, 0, H, W, 3].
        """
        from rich import get_console
        from rich.progress import track

        group, num_frames = self.mesh.sp_group, shape.num_frames
        self.cut(num_frames)
        size = (num_frames, self.config.in_channels, shape.latent_height, shape.latent_width)
        # Drawn whole, so that a video does not depend on how many ranks make it.
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        prompt, empty = self._embed(prompts)
        steps = sample_latents(
            self.velocity, noise[:, own_frames(num_frames, group)].to(self.device), prompt, empty,
            num_steps=num_steps, shift=shift, guidance=guidance, guidance_kind=guidance_kind,
        )  # fmt: skip
        shown = progress and self.mesh.is_first and get_console().is_terminal
        [latents] = deque(track(steps, "sampling", total=num_steps, disable=not shown, transient=True), maxlen=1)
        with torch.no_grad():
            frames = gather_frames(_quantised(decode_frames(self.codec, latents)), num_frames, group)
        return frames.permute(0, 1, 3, 4, 2).contiguous().cpu()

    def write_samples(self, prompts: Sequence[str], shape: VideoShape, stem: Path, config: TrainConfig) -> Path:
        """Samples of a training run as `<stem>-<k>.mp4` and one filmstrip `<stem>.png`; returns the filmstrip's path.

        Every rank must call it; rank 0 writes.
        """
        videos = self.generate(prompts, shape, seeds=range(len(prompts)), guidance=1.0, shift=config.shift)
        if not self.mesh.is_first:
            return stem.with_suffix(".png")
        for index, frames in enumerate(videos):
            write_video(stem.with_name(f"{stem.name}-{index}.mp4"), frames, config.fps)
        return save_filmstrip(dict(zip(prompts, videos, strict=True)), stem.with_suffix(".png"))

    def _embed(self, prompts: Sequence[str]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Text [B, N, W] and pooled [B, P] of the prompts, and of the empty one with B = 1."""

        def encode(prompt: str) -> tuple[Tensor, Tensor]:
            text, pooled = self.text_encoder.encode([prompt])
            return text[0].to(self.device), pooled[0].to(self.device)

        texts, pooled = zip(*encode_texts(encode, [*prompts, ""], self.mesh.sp_group), strict=True)
        return (torch.stack(texts[:-1]), torch.stack(pooled[:-1])), (texts[-1][None], pooled[-1][None])

    @classmethod
    def load(
        cls, folder: Path, codec: str | None, text_encoder: str | None, device: torch.device, mesh: Mesh = ALONE
    ) -> Pipeline:
        """From a model folder; `codec` and `text_encoder` override what its pipeline.json or its subfolders give.

        On the ranks of a mesh each has the whole model, and a video is cut by frames over an sp group.
        """
        model = VchitectTransformer.from_pretrained(folder)
        model.to(device).requires_grad_(False).eval()
        if device.type == "cuda":
            model.to(torch.bfloat16)
        settings = pipeline_settings(folder)
        codec = codec or settings.get("codec")
        text_encoder = text_encoder or settings.get("text_encoder")
        if codec is None or text_encoder is None:
            lacking = " and ".join(n for n, v in (("--codec", codec), ("--text-encoder", text_encoder)) if v is None)
            raise UserError(
                f"{folder} does not name its latent codec and text encoder; give {lacking} (a folder with SD3's, or dct and hash)."
            )
        return cls(
            model,
            model.config,
            load_codec(codec, device=str(device)),
            load_text_encoder(
                text_encoder, width=model.config.joint_attention_dim,
                pooled_width=model.config.pooled_projection_dim, device=str(device),
            ),
            device,
            mesh,
            partial(model.set_shard, BY_FRAMES, mesh.sp_group),
        )  # fmt: skip


def pipeline_settings(folder: Path) -> dict[str, Any]:
    """What a folder says of its pipeline: pipeline.json, or the subfolders of a diffusers pipeline.

    Raises UserError when the folder is absent or that of a run, or where pipeline.json holds something else.
    """
    if not folder.is_dir():
        raise UserError(
            f"expected a model folder, {folder} does not exist; `vchitect-fast train` and `export` write one."
        )
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        raise UserError(f"{folder} is the folder of a training run; give the model in it, {folder / 'model'}.")
    if (folder / PIPELINE_FILE).exists():
        settings = read_json(folder / PIPELINE_FILE)
        for name, kinds in SETTINGS.items():
            if name in settings and (not isinstance(settings[name], kinds) or isinstance(settings[name], bool)):
                raise UserError(
                    f"{folder / PIPELINE_FILE} has {name} {settings[name]!r}, expected a {'text' if str in kinds else 'number'}; "
                    "export the model again."
                )
        return settings
    settings = {}
    if (folder / "vae").is_dir():
        settings["codec"] = str(folder)
    if (folder / "text_encoder").is_dir():
        settings["text_encoder"] = str(folder)
    return settings


def to_frames(video_BTCHW: Tensor) -> Tensor:
    """[-1, 1] RGB of any float dtype -> uint8 [B, T, H, W, 3] on the CPU."""
    return _quantised(video_BTCHW).permute(0, 1, 3, 4, 2).contiguous().cpu()


def _quantised(video: Tensor) -> Tensor:
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def filmstrip(rows: dict[str, Tensor], max_frames: int = 8, caption_height: int = 18) -> Image:
    """Videos [T, H, W, 3] uint8 as one picture: a row a video under its caption, frames spread over its length."""
    from PIL import Image, ImageDraw, ImageFont

    strips = []
    for video in rows.values():
        frames = video.numpy()
        picks = np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).round().astype(int)
        strips.append(
            np.concatenate([np.pad(frames[i], ((0, 0), (0, 2), (0, 0)), constant_values=255) for i in picks], axis=1)
        )
    width = max(strip.shape[1] for strip in strips)
    height = sum(strip.shape[0] + caption_height for strip in strips)
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    top = 0
    for caption, strip in zip(rows, strips, strict=True):
        fits = caption
        while fits and draw.textlength(fits, font=font) > width - 8:
            fits = fits[:-1]
        draw.text((2, top + 2), fits, fill="black", font=font)
        picture.paste(Image.fromarray(strip), (0, top + caption_height))
        top += strip.shape[0] + caption_height
    return picture


def save_filmstrip(rows: dict[str, Tensor], path: Path) -> Path:
    """Write `filmstrip(rows)` as a PNG, whole or not at all."""
    with whole_file(path) as partial:
        filmstrip(rows).save(partial)
    return path


def psnr_db(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 videos of one shape; infinite where they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return float("inf") if error == 0 else 10 * math.log10(255**2 / error)


EXAMPLE = (
    "example: vchitect-fast sample --model runs/train/model --prompt 'a cyclist on a road' --shape 8x128x64 --out x.mp4; "
    "on eight GPUs: torchrun --nproc-per-node=8 -m vchitect_fast.sample --model ..."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast sample`."""
    parser.epilog = EXAMPLE
    parser.add_argument("--model", required=True, type=Path, help="folder of config.json and safetensors")
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--out", required=True, type=Path, help="mp4 to write; the filmstrip goes beside it as .png")
    parser.add_argument("--shape", help="frames x width x height in pixels (default: the shape it was trained on)")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps (default 30)")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance, 1 = none (default 4)")
    parser.add_argument(
        "--guidance-kind",
        choices=GUIDANCE_KINDS,
        default="constant",
        help="constant, or the release's formula (parity only)",
    )
    parser.add_argument(
        "--shift", type=float, help="resolution shift of the noise levels (default: as trained, else 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--fps", type=float, help="frames a second of the mp4 (default: as trained, else 8)")
    parser.add_argument(
        "--codec", help='"dct" or a folder with SD3\'s AutoencoderKL (default: what the model folder names)'
    )
    parser.add_argument(
        "--text-encoder", help='"hash" or a folder with SD3\'s text encoders (default: what the model folder names)'
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """`vchitect-fast sample`."""
    settings = pipeline_settings(args.model)
    shift, fps = _setting(args.shift, settings.get("shift"), 3.0), _setting(args.fps, settings.get("fps"), 8.0)
    check_options(args, shift, fps)
    asked = args.shape or settings.get("shape")
    if asked is None:
        raise UserError(
            f"{args.model} does not say which shape it was trained on; give --shape, for example 16x512x288."
        )
    shape, note = VideoShape.parse(str(asked))
    launch = read_launch(os.environ)
    with launched({"dp_replicate": 1, "dp_shard": 1, "sp": launch.world_size if launch else 1}) as mesh:
        if note and mesh.is_first:
            print(note, file=sys.stderr if args.json else sys.stdout)
        pipeline = Pipeline.load(args.model, args.codec, args.text_encoder, mesh.device, mesh)
        frames = pipeline.generate(
            [args.prompt], shape, seeds=[args.seed], num_steps=args.steps, guidance=args.guidance,
            guidance_kind=args.guidance_kind, shift=shift, progress=not args.json,
        )[0]  # fmt: skip
        if mesh.is_first:
            write(args, shape, frames, fps)
    return 0


def write(args: argparse.Namespace, shape: VideoShape, frames: Tensor, fps: float) -> None:
    """The mp4 of frames [T, H, W, 3] and its filmstrip, and say where they are."""
    write_video(args.out, frames, fps)
    strip = save_filmstrip({args.prompt: frames}, args.out.with_suffix(".png"))
    result = {
        "video": str(args.out),
        "filmstrip": str(strip),
        "shape": str(shape),
        "fps": fps,
        "seed": args.seed,
        "steps": args.steps,
    }
    print(json.dumps(result) if args.json else f"{shape} at {fps:g} frames/s: {args.out}, filmstrip {strip}")


def check_options(args: argparse.Namespace, shift: float, fps: float) -> None:
    """UserError for a number that makes no video, before the model is loaded."""
    if args.out.suffix.lower() != ".mp4":
        raise UserError(f"--out must end in .mp4, got {args.out}; the filmstrip goes beside it under .png.")
    if not 0 < shift < math.inf:
        raise UserError(f"the shift must be a positive number, got {shift:g}; 1 leaves the noise levels as they are.")
    if not FPS_RANGE[0] <= fps <= FPS_RANGE[1]:
        raise UserError(f"frames a second must be from {FPS_RANGE[0]:g} to {FPS_RANGE[1]:g}, got {fps:g}; 8 is usual.")
    if not math.isfinite(args.guidance):
        raise UserError(f"--guidance must be a finite number, got {args.guidance}; 1 is none, 4 is usual.")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, got {args.seed}; choose a smaller one.")


def _setting(asked: float | None, trained: float | None, default: float) -> float:
    return float(next(value for value in (asked, trained, default) if value is not None))


if __name__ == "__main__":  # torchrun -m vchitect_fast.sample --model ...
    from vchitect_fast.cli import main

    raise SystemExit(main(["sample", *sys.argv[1:]]))
