"""Motion by RAFT: VBench's dynamic degree of a clip, in the paper's setting of 128 pixels and 2 iterations.

The network is torchvision's raft_large; its weights come from a file or a folder of yours, under torchvision's names
(raft_large_*.pth) or the original's (raft-things.pth), told apart by the names inside and matched without exception. The
rule on the flow is motion_rule.py. It downloads nothing, unpickles nothing but tensors, and averages over no clip: pairs
of one clip go through together, never with another's, so that a score does not depend on its neighbours.
Source: princeton-vl/RAFT at 2888e15 (core/raft.py, core/utils/utils.py `InputPadder`); VBench leaves the padding in the
field that it scores, and so does this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vchitect_fast.curation.clip_model import match_tensors, pick_device, read_tensors, weight_file
from vchitect_fast.curation.motion_rule import COLUMNS, dynamic_degree, pair_score, sampled_frames
from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want, weights_hash
from vchitect_fast.errors import UserError

SMALLEST = 128  # px: the coarsest of RAFT's four correlation levels has 2 cells a side there, and divides by 0 below
# Of a batch of pairs. At 128x304 a pair has 2 MB of them and 40 MB of features; a CPU is no faster with more pairs at once.
_CORRELATION_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


@dataclass(frozen=True)
class RaftMotion(Stage):
    """How much moves in a clip, by RAFT; motion_rule.py says what the scores are.

    model       raft-things.pth (princeton-vl) or raft_large_*.pth (torchvision), or a folder that holds it alone
    short_side  pixels that frames are shrunk to; the paper's 128 (VBench takes frames as they are)
    iterations  updates of the flow; the paper's 2 (VBench makes 20)
    device      "auto", "cpu", "cuda", "cuda:N"
    """

    model: str = field(metadata={"key": False})  # its hash is in the key
    short_side: int = 128
    iterations: int = 2
    device: str = field(default="auto", metadata={"key": False})

    name = "motion"
    backend = "raft"
    version = 1
    cost = 10000
    columns = COLUMNS
    main = "degree"
    rules = {"dynamic": "== true"}  # noqa: RUF012
    extra = "models"

    def wants(self, span: ClipSpan) -> list[Want]:
        """Every max(1, round(fps / 8))-th frame of the clip, from its first."""
        frame_s = span.seconds / span.num_frames
        # Half a frame inside, so that rounding of times cannot reach a neighbour.
        times = (span.start + (k + 0.5) * frame_s for k in sampled_frames(span.num_frames, span.fps))
        return [Want(time, self.short_side) for time in times]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """The verdict on each clip; ValueError where a flow field is not finite."""
        return [self._score(sample.frames) for sample in samples]

    def check(self) -> None:
        """Reads the weights once; UserError where they, a parameter or the device do not fit, or torchvision is missing."""
        if self.short_side < SMALLEST:
            raise UserError(f"motion by RAFT needs a short_side of {SMALLEST} pixels or more, got {self.short_side}.")
        if self.iterations < 1:
            raise UserError(f"motion by RAFT needs 1 iteration or more, got {self.iterations}.")
        pick_device(self.device)
        load_raft.__wrapped__(self.model)

    @property
    def weights(self) -> str:
        """Hash of the file."""
        return weights_hash(weight_file(self.model))

    def _score(self, frames: Sequence[np.ndarray]) -> Scores:
        import torch

        device = pick_device(self.device)
        network = load_raft(self.model, device)
        scores: list[float] = []
        num_pairs, first = _pairs_at_once(frames[0], device), 0
        with torch.inference_mode():
            while first < len(frames) - 1:
                images_NCHW = [_pad(_image(frame)) for frame in frames[first : first + num_pairs + 1]]
                both = 2 * (torch.cat(images_NCHW).to(device) / 255.0) - 1.0
                flows_P2HW = network(both[:-1], both[1:], num_flow_updates=self.iterations)[-1]
                scores += [pair_score(flow) for flow in flows_P2HW.cpu().numpy()]
                first += num_pairs
        short_side = min(_image(frames[0]).shape[-2:])  # before padding, as VBench has it
        return dynamic_degree(scores, len(frames), short_side)


def _pairs_at_once(frame: np.ndarray, device: str) -> int:
    """How many pairs of this size go through together: as many as their correlation volumes may take, or one."""
    height, width = _pad(_image(frame)).shape[-2:]
    pair_bytes = (
        4 * (height // 8 * (width // 8)) ** 2 * 4 // 3
    )  # float32; four levels, each a quarter of the one before
    return int(max(1, _CORRELATION_BYTES[device.partition(":")[0]] // pair_bytes))


def _image(frame: np.ndarray) -> Any:
    """float32 [1,3,H,W], 0..255; enlarged where the short side is under RAFT's smallest."""
    import torch

    image = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    height, width = image.shape[-2:]
    if min(height, width) >= SMALLEST:
        return image
    scale = SMALLEST / min(height, width)
    size = max(SMALLEST, round(height * scale)), max(SMALLEST, round(width * scale))
    return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)


def _pad(image: Any) -> Any:
    """To multiples of 8 by repeating the edge, half on each side (InputPadder, mode sintel)."""
    import torch

    tall, wide = (-size % 8 for size in image.shape[-2:])
    edges = [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2]
    return torch.nn.functional.pad(image, edges, mode="replicate")


@lru_cache(maxsize=2)
def load_raft(place: str, device: str = "cpu") -> Any:
    """torchvision's raft_large with the file's weights, once a process; UserError where a tensor is missing or unknown."""
    file = weight_file(place)
    tensors = read_tensors(file)
    try:
        import torch
        from torchvision.models.optical_flow import raft_large
    except ImportError as error:
        raise UserError(f"motion by RAFT needs torchvision ({error}); pip install 'vchitect-fast[models]'.") from None
    if any(name.startswith(("module.", "fnet.")) for name in tensors):
        tensors = from_original(file, tensors)
    # Counts of training batches: older files have none, and nothing reads them.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    with torch.random.fork_rng(devices=[]):  # first weights, thrown away, must not move the caller's generator
        network = raft_large(weights=None)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    match_tensors(
        file, tensors, {name: size for name, size in shapes.items() if not name.endswith("num_batches_tracked")}
    )
    network.load_state_dict(tensors, strict=False)
    return network.float().eval().requires_grad_(False).to(device)


def from_original(file: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights under princeton-vl/RAFT's names, with or without `module.`, under torchvision's; UserError names a stranger."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    modules = _original_modules()
    renamed = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        shortcut = module.removesuffix("norm3") + "downsample.1"
        # The original registers the norm of a shortcut twice, as norm3 and as the second part of downsample.
        if module.endswith(".norm3") and f"{shortcut}.{parameter}" in tensors:
            if not tensor.equal(tensors[f"{shortcut}.{parameter}"]):
                raise UserError(
                    f"{file} must hold {name} and {shortcut}.{parameter} alike, got two; give the original."
                )
        elif module in modules:
            renamed[f"{modules[module]}.{parameter}"] = tensor
        else:
            raise UserError(f"{file} must hold the weights of RAFT (large), got {name}; give raft-things.pth.")
    return renamed


def _original_modules() -> dict[str, str]:
    """Module of the original (core/extractor.py, core/update.py) -> module of torchvision's raft_large."""
    names = {
        "update_block.encoder.convc1": "update_block.motion_encoder.convcorr1.0",
        "update_block.encoder.convc2": "update_block.motion_encoder.convcorr2.0",
        "update_block.encoder.convf1": "update_block.motion_encoder.convflow1.0",
        "update_block.encoder.convf2": "update_block.motion_encoder.convflow2.0",
        "update_block.encoder.conv": "update_block.motion_encoder.conv.0",
        "update_block.flow_head.conv1": "update_block.flow_head.conv1",
        "update_block.flow_head.conv2": "update_block.flow_head.conv2",
        "update_block.mask.0": "mask_predictor.convrelu.0",
        "update_block.mask.2": "mask_predictor.conv",
    }
    for gate in "zrq":
        for half in "12":  # along x, then along y
            names[f"update_block.gru.conv{gate}{half}"] = f"update_block.recurrent_block.convgru{half}.conv{gate}"
    for theirs, ours in (("fnet", "feature_encoder"), ("cnet", "context_encoder")):
        names |= {f"{theirs}.conv1": f"{ours}.convnormrelu.0", f"{theirs}.norm1": f"{ours}.convnormrelu.1"}
        names[f"{theirs}.conv2"] = f"{ours}.conv"
        for block in (f"layer{layer}.{number}" for layer in (1, 2, 3) for number in (0, 1)):
            for half in "12":
                names[f"{theirs}.{block}.conv{half}"] = f"{ours}.{block}.convnormrelu{half}.0"
                names[f"{theirs}.{block}.norm{half}"] = f"{ours}.{block}.convnormrelu{half}.1"
        for layer in (2, 3):
            for part in "01":
                shortcut = f"layer{layer}.0.downsample.{part}"
                names[f"{theirs}.{shortcut}"] = f"{ours}.{shortcut}"
    return names
