"""Picture and video towers from local files: CLIP (Hugging Face layout) and ViCLIP (InternVid's checkpoint), in fp32.

Weights are read as tensors (no pickle runs, nothing is downloaded), and each must be one that the layout names: a missing,
unknown or misshapen tensor is a UserError naming it. The text half of a checkpoint is skipped; there is no text tower here.
Frames are uint8 RGB [H,W,3] as the video shows them: whoever shrinks them first changes what the originals' resize gives.
read_tensors, match_tensors, weight_file, pick_device and in_chunks serve every stage whose weights come from a file.

CLIP: github.com/openai/CLIP, clip.py (_transform). ViCLIP: github.com/OpenGVLab/InternVideo, Data/InternVid/viclip.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vchitect_fast.curation.engines import WORKER
from vchitect_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VICLIP_FRAMES = 8
VICLIP_HEAD_DIM = 64  # as in every CLIP: width 1024 has 16 heads, width 768 has 12
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CUDA_CHUNK = 24  # pictures a pass: 8 clips of 3 frames


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP's image tower. size: pixels a side; dim: length of an embedding (768 for ViT-L/14)."""

    module: Any
    size: int
    dim: int
    device: str

    def image_embeddings(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """fp32 [n,dim], each of length 1, for n frames."""
        pixels = clip_pixels(frames, self.size)
        return _unit(in_chunks(lambda part: self.module(pixel_values=part).image_embeds, pixels, self.device))


@dataclass(frozen=True, eq=False)
class Viclip:
    """ViCLIP's video tower. size: pixels a side; dim: length of an embedding (768 for L-14)."""

    tensors: Mapping[str, Tensor]
    size: int
    dim: int
    device: str

    def video_embedding(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """fp32 [dim] of length 1, for exactly 8 frames in order."""
        assert len(frames) == VICLIP_FRAMES, f"ViCLIP sees {VICLIP_FRAMES} frames, got {len(frames)}"
        pixels = viclip_pixels(frames, self.size)
        return _unit(in_chunks(partial(_viclip_forward, self.tensors), pixels[None], self.device, size=1))[0]


@lru_cache(maxsize=2)
def load_clip(folder: str, device: str = "cpu") -> Clip:
    """The image tower of a Hugging Face CLIP folder, once a process; UserError naming what is missing or unknown."""
    files = clip_files(folder)
    try:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    except ImportError:
        raise UserError(
            "CLIP needs transformers (it builds the image tower); pip install 'vchitect-fast[models]'."
        ) from None
    try:
        kind = json.loads(files[0].read_text()).get("model_type")
    except (ValueError, AttributeError):
        raise UserError(f"{files[0]} must be a JSON object, got something else; copy it again.") from None
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(f"{files[0]} must describe a CLIP model (model_type clip), got {kind!r}; give a CLIP folder.")
    config = CLIPVisionConfig.from_pretrained(folder, local_files_only=True)
    text = ("text_model.", "text_projection.", "logit_scale")
    tensors = {
        name: tensor
        for name, tensor in read_tensors(files[1]).items()
        # Checkpoints of 2021 and 2022 also hold position_ids, which count 0, 1, 2, ...
        if not name.startswith(text) and not name.endswith(".position_ids")
    }
    if "visual_projection.weight" in tensors:  # old configs say it only of the whole model
        config.projection_dim = tensors["visual_projection.weight"].shape[0]
    module = CLIPVisionModelWithProjection(config)
    match_tensors(files[1], tensors, {name: tuple(t.shape) for name, t in module.state_dict().items()})
    module.load_state_dict(tensors, strict=True)
    size: Any = config.image_size  # transformers would allow a pair; CLIP's is a number
    return Clip(module.float().eval().to(device), size, config.projection_dim, device)


def clip_files(folder: str) -> tuple[Path, Path]:
    """config.json and the weights of a CLIP folder; UserError naming the one that is not there."""
    config = Path(folder) / "config.json"
    weights = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = [file for file in weights if file.is_file()]
    if not config.is_file() or not found:
        lacking = "config.json" if not config.is_file() else "model.safetensors or pytorch_model.bin"
        raise UserError(
            f"the CLIP folder {folder} must hold config.json and model.safetensors (or pytorch_model.bin), "
            f"got none named {lacking}; copy it there, for example from openai/clip-vit-large-patch14."
        )
    return config, found[0]


@lru_cache(maxsize=2)
def load_viclip(place: str, device: str = "cpu") -> Viclip:
    """The video tower of a ViCLIP checkpoint (a file, or a folder with one), once a process; UserError as load_clip."""
    import torch

    file = weight_file(place)
    tensors = read_tensors(file, inside="model")
    # The text tower and the temperature belong to training and to captions; the rest must be the video tower.
    tensors = {n: t for n, t in tensors.items() if n != "temp" and not n.startswith("text_encoder.")}
    match_tensors(file, tensors, _viclip_shapes(tensors))
    tensors = {name.removeprefix("vision_encoder."): t.to(device, torch.float32) for name, t in tensors.items()}
    grid = round((len(tensors["positional_embedding"]) - 1) ** 0.5)
    return Viclip(tensors, grid * tensors["conv1.weight"].shape[-1], tensors["proj"].shape[1], device)


def _viclip_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a video tower whose width, depth, patch and output are those that the tensors show.

    Where one of the three that show them is absent or of another rank, the sizes of L-14 stand in, so that the names
    can still be compared.
    """

    def shape(name: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        found = tuple(tensors[f"vision_encoder.{name}"].shape) if f"vision_encoder.{name}" in tensors else ()
        return found if len(found) == len(otherwise) else otherwise

    width, _, _, patch, _ = shape("conv1.weight", (1024, 3, 1, 14, 14))
    dim = shape("proj", (width, 768))[1]
    places = round((shape("positional_embedding", (257, width))[0] - 1) ** 0.5) ** 2 + 1  # a square and the class token
    prefix = "vision_encoder.transformer.resblocks."
    blocks = {int(n.removeprefix(prefix).split(".")[0]) for n in tensors if n.startswith(prefix)}
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
    }
    rest = {
        "class_embedding": (width,),
        "positional_embedding": (places, width),
        "temporal_positional_embedding": (1, VICLIP_FRAMES, width),
        "proj": (width, dim),
        "conv1.weight": (width, 3, 1, patch, patch),
        **{f"ln_{place}.{name}": (width,) for place in ("pre", "post") for name in ("weight", "bias")},
    }
    expected = {f"vision_encoder.{name}": size for name, size in rest.items()}
    for number in range(max(blocks, default=0) + 1):
        expected |= {f"{prefix}{number}.{name}": size for name, size in block.items()}
    return expected


def _viclip_forward(t: Mapping[str, Tensor], x_BTCHW: Tensor) -> Tensor:
    """[B,dim]: patches of all frames and one class token attend to each other; a place and a time are added to each."""
    import torch
    import torch.nn.functional as F

    width = len(t["class_embedding"])
    patch = t["conv1.weight"].shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), t[f"{name}.weight"], t[f"{name}.bias"])

    patches = F.conv2d(x_BTCHW.flatten(0, 1), t["conv1.weight"][:, :, 0], stride=patch)
    x = patches.flatten(2).transpose(1, 2).unflatten(0, x_BTCHW.shape[:2])  # [B,T,S,D]
    x = x + t["positional_embedding"][1:] + t["temporal_positional_embedding"][0, :, None]
    first = (t["class_embedding"] + t["positional_embedding"][0]).expand(len(x), 1, width)
    x = norm(torch.cat([first, x.flatten(1, 2)], 1), "ln_pre")
    depth = 1 + max(int(name.split(".")[2]) for name in t if name.startswith("transformer."))
    for block in (f"transformer.resblocks.{number}" for number in range(depth)):
        qkv = F.linear(norm(x, f"{block}.ln_1"), t[f"{block}.attn.in_proj_weight"], t[f"{block}.attn.in_proj_bias"])
        q, k, v = qkv.unflatten(-1, (3, -1, VICLIP_HEAD_DIM)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(seen, t[f"{block}.attn.out_proj.weight"], t[f"{block}.attn.out_proj.bias"])
        y = F.linear(norm(x, f"{block}.ln_2"), t[f"{block}.mlp.c_fc.weight"], t[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), t[f"{block}.mlp.c_proj.weight"], t[f"{block}.mlp.c_proj.bias"])
    return norm(x[:, 0], "ln_post") @ t["proj"]


def clip_pixels(frames: Sequence[np.ndarray], size: int) -> Tensor:
    """fp32 [n,3,size,size] as OpenAI's transform gives it: short side to `size` (PIL, bicubic), middle square, mean, std.

    transformers' CLIPImageProcessor cuts the middle one pixel further left or up where the rest is odd.
    """
    from PIL import Image

    pictures = []
    for frame in frames:
        height, width = frame.shape[:2]
        short = min(height, width)
        width, height = int(size * width / short), int(size * height / short)
        left, top = round((width - size) / 2), round((height - size) / 2)  # ties to even, as torchvision rounds
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return normalised(pictures, CLIP_MEAN, CLIP_STD)


def viclip_pixels(frames: Sequence[np.ndarray], size: int) -> Tensor:
    """fp32 [T,3,size,size] as InternVid's frames2tensor gives it: both sides to `size` (OpenCV, bilinear), mean, std."""
    import torch

    try:
        import cv2
    except ImportError:
        raise UserError("ViCLIP needs OpenCV (its resize); pip install 'vchitect-fast[curation]'.") from None
    resized = np.stack([cv2.resize(frame, (size, size), interpolation=cv2.INTER_LINEAR) for frame in frames])
    # In fp64 until the end, as the original computes it.
    return torch.from_numpy((resized / 255.0 - IMAGENET_MEAN) / IMAGENET_STD).permute(0, 3, 1, 2).float()


def normalised(pictures: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """fp32 [n,3,H,W] of uint8 RGB pictures of one size: v / 255, less mean, by std, as torchvision computes it."""
    import torch

    values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float() / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def in_chunks(forward: Callable[[Tensor], Tensor], inputs: Tensor, device: str, size: int | None = None) -> Tensor:
    """forward(inputs) in passes of one fixed size, fp32 on the CPU: kernels round differently for other sizes, and a
    clip's scores must not depend on which clips came with it.

    size: inputs a pass, the last one filled up; None: 24 on a GPU, 1 on a CPU, where more gain nothing.
    """
    import torch

    size = size or (CUDA_CHUNK if device.startswith("cuda") else 1)
    outputs = []
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        for part in inputs.split(size):
            filled = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])
            outputs.append(forward(filled.to(device))[: len(part)].float().cpu())
    return torch.cat(outputs)


def pick_device(device: str) -> str:
    """The torch device that "auto" means here, or `device` itself; UserError if it is absent.

    "auto" is a GPU if there is one; workers of an engine share the GPUs out by their numbers.
    """
    try:
        import torch
    except ImportError:
        raise UserError("models need torch; pip install vchitect-fast.") from None
    if device == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        mine = int(os.environ.get(WORKER, 0)) % torch.cuda.device_count()
        return f"cuda:{mine}" if mine else "cuda"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UserError(f'a device is "auto", "cpu", "cuda" or "cuda:N", got {device!r}; name one of these.')
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f'the device {device!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use "auto".')
    return device


def weight_file(place: str) -> Path:
    """`place` itself if it is a file, else the one file of weights in the folder; UserError where there is not one."""
    path = Path(place)
    if path.is_file():
        return path
    found = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    got = ", ".join(f.name for f in found) or ("none" if path.is_dir() else "no such file or folder")
    raise UserError(f"{place} must be a file of weights or hold one ({', '.join(SUFFIXES)}), got {got}; name the file.")


def read_tensors(file: Path, inside: str = "") -> dict[str, Tensor]:
    """The state dict in a file (safetensors, or torch's with weights_only); that under the key `inside` if it is there."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: Any
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {file} ({_first_line(error)}); copy the file again.") from None
    except Exception as error:  # UnpicklingError and what a foreign pickle makes torch's reader raise
        raise UserError(
            f"{file} must hold tensors only, got something else ({_first_line(error)}); "
            "save its state dict with safetensors.torch.save_file where you trust it."
        ) from None
    if inside and isinstance(found, dict) and isinstance(found.get(inside), dict):
        found = found[inside]
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise UserError(f"{file} must hold a state dict (names of tensors), got other things; save model.state_dict().")
    return dict(found)


def match_tensors(file: Path, got: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """UserError unless names and shapes are exactly the expected ones; it names the first few that differ."""
    wrong = {
        "missing": [name for name in expected if name not in got],
        "unknown": [name for name in got if name not in expected],
        "misshapen": [
            f"{name} {list(got[name].shape)} instead of {list(size)}"
            for name, size in expected.items()
            if name in got and tuple(got[name].shape) != size
        ],
    }
    parts = [
        f"{kind} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for kind, names in wrong.items()
        if names
    ]
    if parts:
        raise UserError(
            f"{file} must hold exactly the {len(expected)} tensors of its layout, got {'; '.join(parts)}; "
            "give the original checkpoint."
        )


def _unit(rows: Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
