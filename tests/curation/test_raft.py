"""Motion by RAFT: weights in both layouts, the flow of the original network, VBench's rule, and what is refused.

Original below is princeton-vl/RAFT (core/raft.py, extractor.py, update.py, corr.py) written down again under its names,
so that a wrong name, order or scale in the stage shows as another flow. Weights are random: no trained ones are here.
pytest tests/curation/test_raft.py
"""

from __future__ import annotations

import builtins
import itertools
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from close import assert_close_to_exact
from real_video import bikes
from torch import Tensor, nn

from vchitect_fast.curation import raft
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.motion_rule import dynamic_degree, pair_score, sampled_frames
from vchitect_fast.curation.raft import RaftMotion, load_raft
from vchitect_fast.curation.stage import ClipSpan, Sample
from vchitect_fast.errors import UserError

LONGEST_SUM = 256 * 9  # convc2: the most products that one output of the network adds up


class Residual(nn.Module):
    def __init__(self, before: int, width: int, norm: Any, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, width, 3, stride, 1), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1), norm(width)
        self.downsample = None
        if stride > 1:
            self.norm3 = norm(width)
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride), self.norm3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu((self.downsample(x) if self.downsample else x) + y)


class Encoder(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(64), nn.Conv2d(3, 64, 7, 2, 3)
        self.layer1 = nn.Sequential(Residual(64, 64, norm, 1), Residual(64, 64, norm, 1))
        self.layer2 = nn.Sequential(Residual(64, 96, norm, 2), Residual(96, 96, norm, 1))
        self.layer3 = nn.Sequential(Residual(96, 128, norm, 2), Residual(128, 128, norm, 1))
        self.conv2 = nn.Conv2d(128, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.layer3(self.layer2(self.layer1(F.relu(self.norm1(self.conv1(x)))))))


class Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.gru, self.flow_head = nn.Module(), nn.Module(), nn.Module()
        self.encoder.convc1, self.encoder.convc2 = nn.Conv2d(324, 256, 1), nn.Conv2d(256, 192, 3, padding=1)
        self.encoder.convf1, self.encoder.convf2 = nn.Conv2d(2, 128, 7, padding=3), nn.Conv2d(128, 64, 3, padding=1)
        self.encoder.conv = nn.Conv2d(256, 126, 3, padding=1)
        for gate in "zrq":
            setattr(self.gru, f"conv{gate}1", nn.Conv2d(384, 128, (1, 5), padding=(0, 2)))
            setattr(self.gru, f"conv{gate}2", nn.Conv2d(384, 128, (5, 1), padding=(2, 0)))
        self.flow_head.conv1 = nn.Conv2d(128, 256, 3, padding=1)
        self.flow_head.conv2 = nn.Conv2d(256, 2, 3, padding=1)
        self.mask = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 576, 1))

    def forward(self, net: Tensor, inp: Tensor, corr: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, g = self.encoder, self.gru
        cor, flo = F.relu(e.convc2(F.relu(e.convc1(corr)))), F.relu(e.convf2(F.relu(e.convf1(flow))))
        inp = torch.cat([inp, F.relu(e.conv(torch.cat([cor, flo], 1))), flow], 1)
        for z_conv, r_conv, q_conv in ((g.convz1, g.convr1, g.convq1), (g.convz2, g.convr2, g.convq2)):
            z, r = torch.sigmoid(z_conv(torch.cat([net, inp], 1))), torch.sigmoid(r_conv(torch.cat([net, inp], 1)))
            net = (1 - z) * net + z * torch.tanh(q_conv(torch.cat([r * net, inp], 1)))
        delta = self.flow_head.conv2(F.relu(self.flow_head.conv1(net)))
        return net, 0.25 * self.mask(net), delta


class Original(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fnet, self.cnet, self.update_block = Encoder(nn.InstanceNorm2d), Encoder(nn.BatchNorm2d), Update()

    def forward(self, image1: Tensor, image2: Tensor, iters: int) -> Tensor:
        """[B,3,H,W] twice, 0..255 -> flow [B,2,H,W]."""
        image1, image2 = 2 * (image1 / 255) - 1, 2 * (image2 / 255) - 1
        a, b = self.fnet(image1), self.fnet(image2)
        n, _, h, w = a.shape
        level = (a.flatten(2).transpose(1, 2) @ b.flatten(2)).view(n * h * w, 1, h, w) / 16
        pyramid = [level] + [level := F.avg_pool2d(level, 2) for _ in range(3)]
        net, inp = self.cnet(image1).split(128, 1)
        net, inp = torch.tanh(net), torch.relu(inp)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        start = torch.stack([columns, rows]).to(a)[None].repeat(n, 1, 1, 1)
        offsets = torch.stack(torch.meshgrid(*[torch.arange(-4, 5).to(a)] * 2, indexing="ij"), -1)
        coords = start
        for _ in range(iters):
            looked = []
            for number, level in enumerate(pyramid):
                at = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**number + offsets
                at = 2 * at / (torch.tensor([level.shape[3], level.shape[2]]).to(a) - 1) - 1
                looked.append(F.grid_sample(level, at, align_corners=True).view(n, h, w, 81))
            corr = torch.cat(looked, -1).permute(0, 3, 1, 2)
            net, mask, delta = self.update_block(net, inp, corr, coords - start)
            coords = coords + delta
        mask = mask.view(n, 1, 9, 8, 8, h, w).softmax(2)
        near = F.unfold(8 * (coords - start), 3, padding=1).view(n, 2, 9, 1, 1, h, w)
        return (mask * near).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 8 * h, 8 * w)


def vbench(network: Original, frames: list[np.ndarray], iters: int, dtype: torch.dtype) -> list[float]:
    """VBench's pair scores: InputPadder (sintel), then mean of the top int(0.05 H W) of the padded field."""
    images = [torch.from_numpy(frame).permute(2, 0, 1)[None].to(dtype) for frame in frames]
    scores = []
    for image1, image2 in itertools.pairwise(images):
        height, width = image1.shape[-2:]
        tall, wide = (height // 8 + 1) * 8 - height, (width // 8 + 1) * 8 - width
        tall, wide = tall % 8, wide % 8
        edges = (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2)
        with torch.no_grad():
            flow = network.to(dtype)(*(F.pad(image, edges, mode="replicate") for image in (image1, image2)), iters)
        radii = flow[0].square().sum(0).sqrt().flatten().sort(descending=True).values
        scores.append(radii[: int(radii.numel() * 0.05)].mean().item())
    return scores


@pytest.fixture(scope="module")
def original() -> Original:
    torch.manual_seed(1)
    network = Original().eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() == 1:  # biases and batch norms: all different, so that none can take another's place
            tensor.add_(0.1 * torch.randn_like(tensor))
    for tensor in network.update_block.flow_head.conv2.parameters():  # so that one of the two pairs moves over 3 pixels
        tensor.data *= 1.079
    return network


@pytest.fixture(scope="module")
def things(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({f"module.{name}": tensor for name, tensor in original.float().state_dict().items()}, path)
    return path


def span(first: int = 0, last: int = 29, fps: float = 25.0) -> ClipSpan:
    return ClipSpan("bikes", str(bikes()), first, last, first / fps, (last + 1) / fps, 640, 272, fps)


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    """Three sampled frames of bikes.mp4 at a short side of 128, 133 pixels wide, which 8 does not divide."""
    found = clip_frames(span(), RaftMotion("").wants(span())[:3])
    assert {frame.shape for frame in found} == {(128, 301, 3)}
    return [np.ascontiguousarray(frame[:, 80:213]) for frame in found]  # a part: the network in fp64 is slow


def test_the_original_layout_gives_the_originals_flow_and_vbenchs_scores(
    original: Original, things: Path, frames: list[np.ndarray]
) -> None:
    (scores,) = RaftMotion(str(things), device="cpu").score([Sample(span(), frames, {})])
    exact, reference = (vbench(original, frames, 2, dtype) for dtype in (torch.float64, torch.float32))
    assert scores["num_pairs"] == 2
    assert scores["num_over"] == sum(score > 3.0 for score in exact)
    assert scores["dynamic"] == (scores["num_over"] >= 1)  # round(4 * 3 / 16)
    assert scores["degree"] == scores["flow"] / 3.0
    means = torch.tensor([scores["flow"]]), torch.tensor([np.mean(exact)]), torch.tensor([np.mean(reference)])
    assert_close_to_exact(means[0], means[1].double(), means[2], reduced=LONGEST_SUM)
    pixels = torch.from_numpy(np.stack(frames[:2])[:, :, :128]).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        exact_flow = original.double()(*pixels.double().chunk(2), 2)
        reference_flow = original.float()(*pixels.chunk(2), 2)
        flow = load_raft(str(things))(*(2 * (pixels / 255) - 1).chunk(2), num_flow_updates=2)[-1]
    assert_close_to_exact(flow, exact_flow, reference_flow, reduced=LONGEST_SUM)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvisions_layout_gives_torchvisions_flow(tmp_path: Path, frames: list[np.ndarray], suffix: str) -> None:
    from safetensors.torch import save_file
    from torchvision.models.optical_flow import raft_large

    network = raft_large(weights=None).eval()
    path = tmp_path / f"raft_large_C_T_SKHT_V2-ff5fadd5{suffix}"
    (torch.save if suffix == ".pth" else save_file)(network.state_dict(), path)
    state = torch.random.get_rng_state()
    loaded = load_raft(str(tmp_path))  # the folder that holds it
    assert torch.equal(torch.random.get_rng_state(), state)
    pixels = torch.from_numpy(np.stack(frames[:2])[:, :, :128]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found, expected = (n(*pixels.chunk(2), num_flow_updates=1)[-1] for n in (loaded, network))
    assert torch.equal(found, expected)
    assert not any(p.requires_grad for p in loaded.parameters())


class Shift:
    """In the network's place: a flow that is the difference of the two images, so that scores are known exactly."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, int]] = []

    def __call__(self, before: Tensor, after: Tensor, num_flow_updates: int) -> list[Tensor]:
        assert before.min() >= -1 and after.max() <= 1
        self.calls.append((before.shape, num_flow_updates))
        return [((after - before) * 127.5)[:, :2]]


@pytest.mark.parametrize(("pairs_at_once", "batches"), [(1, [1] * 6), (4, [4, 2]), (100, [6])])
def test_every_pair_is_seen_once_in_batches_of_bounded_memory(
    monkeypatch: pytest.MonkeyPatch, pairs_at_once: int, batches: list[int]
) -> None:
    network = Shift()
    monkeypatch.setattr(raft, "load_raft", lambda *_: network)
    pair_bytes = 4 * (136 // 8 * 136 // 8) ** 2 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
    monkeypatch.setitem(raft._CORRELATION_BYTES, "cpu", int(pair_bytes * (pairs_at_once + 0.5)))
    levels = [0, 3, 4, 14, 14, 20, 21]
    frames = [np.full((129, 131, 3), level, np.uint8) for level in levels]
    (scores,) = RaftMotion("", iterations=7, device="cpu").score([Sample(span(), frames, {})])
    assert network.calls == [(torch.Size([n, 3, 136, 136]), 7) for n in batches]
    steps = np.abs(np.diff(levels)) * np.sqrt(2)  # both parts of the flow
    assert scores["flow"] == pytest.approx(steps.mean(), rel=1e-5)  # rounding of pixels to -1..1 and back
    assert (scores["num_pairs"], scores["num_over"]) == (6, 3)  # over 6 * 129 / 256
    assert scores["dynamic"] is True


def test_padding_repeats_the_edge_half_on_each_side() -> None:
    image = torch.arange(3 * 5.0).view(1, 1, 3, 5)
    rows = [[r, r, r + 1, r + 2, r + 3, r + 4, r + 4, r + 4] for r in (0, 0, 0, 5, 10, 10, 10, 10)]
    assert raft._pad(image)[0, 0].tolist() == rows


def test_small_clips_are_enlarged_to_what_raft_can_take(things: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 72 * 3).reshape(64, 72, 3)
    small = [ramp.astype(np.uint8), np.roll(ramp, 5, 1).astype(np.uint8)]
    (scores,) = RaftMotion(str(things), iterations=1, device="cpu").score([Sample(span(), small, {})])
    assert scores["degree"] == scores["flow"] / 3.0  # the threshold of 128 pixels, not of 64


def check_move(scores: list[float], num_frames: int, short_side: int) -> bool:
    """VBench's set_params and check_move."""
    threshold, needed, count = 6.0 * (short_side / 256.0), round(4 * (num_frames / 16.0)), 0
    for score in scores:
        if score > threshold:
            count += 1
        if count >= needed:
            return True
    return False


def test_the_rule_is_vbenchs_for_every_length() -> None:
    random = np.random.default_rng(0)
    for num_frames in range(1, 60):
        for side in (128, 272, 720):
            scores = list(random.uniform(0, 6.0 * side / 128, num_frames - 1)) + [6.0 * side / 256] * (num_frames > 1)
            found = dynamic_degree(scores, num_frames, side)
            assert found["dynamic"] is check_move(scores, num_frames, side)
            assert found["num_over"] == sum(score > 6.0 * side / 256 for score in scores)


@pytest.mark.parametrize(
    ("pairs", "num_frames", "dynamic"),
    [
        ([], 1, False),  # no pair: nothing was seen to move
        ([0.0], 2, True),  # none needed, as VBench has it
        ([3.0, 3.0], 3, False),  # over means over
        ([3.1, 0.0], 3, True),
        ([3.1] + [0.0] * 4, 6, False),  # round(1.5) is 2
        ([3.1, 3.1] + [0.0] * 7, 10, True),  # round(2.5) is 2
    ],
)
def test_edge_cases_of_the_rule(pairs: list[float], num_frames: int, dynamic: bool) -> None:
    found = dynamic_degree(pairs, num_frames, 128)
    assert found["dynamic"] is dynamic
    assert set(found) == set(RaftMotion.columns)
    assert (found["flow"] is None) == (found["degree"] is None) == (not pairs)


def test_a_broken_flow_field_is_an_error_and_no_stillness() -> None:
    with pytest.raises(ValueError, match="1 of 2 pairs is not finite"):
        dynamic_degree([1.0, float("nan")], 3, 128)


def test_a_pair_scores_the_mean_of_its_fastest_twentieth() -> None:
    flow = np.zeros((2, 10, 21), np.float32)
    flow[:, 0, :10] = [[3], [4]]
    flow[:, 1, 0] = 6, 8
    assert pair_score(flow) == (9 * 5 + 10) / 10  # int(210 / 20) of them
    assert pair_score(np.full((2, 1, 1), 1, np.float64)) == np.sqrt(2)


@pytest.mark.parametrize(
    ("fps", "every"), [(25.0, 3), (24.0, 3), (60.0, 8), (20.0, 2), (12.0, 2), (5.0, 1), (29.97, 4)]
)
def test_about_eight_frames_a_second_are_compared(fps: float, every: int) -> None:
    assert sampled_frames(25, fps) == list(range(0, 25, every))
    assert sampled_frames(1, fps) == [0]


def test_wants_are_those_frames_of_the_clip() -> None:
    import av

    with av.open(str(bikes())) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = span(31, 74)
    wants = RaftMotion("", short_side=272).wants(clip)
    for frame, number in zip(clip_frames(clip, wants), range(31, 75, 3), strict=True):
        assert np.array_equal(frame, whole[number])


def without(state: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stranger", "must hold the weights of RAFT .large., got fnet.layer9.conv1.weight"),
        ("missing", "missing update_block.flow_head.conv2.bias"),
        ("misshapen", r"misshapen mask_predictor.conv.bias \[575\] instead of \[576\]"),
        ("twins", "cnet.layer2.0.norm3.weight and cnet.layer2.0.downsample.1.weight alike"),
        ("small", "unknown"),
        ("code", "must hold tensors only"),
    ],
)
def test_foreign_weights_are_refused(tmp_path: Path, things: Path, kind: str, message: str) -> None:
    from torchvision.models.optical_flow import raft_small

    state = torch.load(things, weights_only=True)
    if kind == "stranger":
        state["module.fnet.layer9.conv1.weight"] = torch.zeros(1)
    elif kind == "missing":
        state = without(state, "flow_head.conv2.bias")
    elif kind == "misshapen":
        state["module.update_block.mask.2.bias"] = torch.zeros(575)
    elif kind == "twins":
        state["module.cnet.layer2.0.norm3.weight"] = state["module.cnet.layer2.0.norm3.weight"] + 1
    elif kind == "small":
        state = raft_small(weights=None).state_dict()
    path = tmp_path / "raft.pth"
    torch.save(state, path)
    if kind == "code":
        path.write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(UserError, match=message):
        RaftMotion(str(path)).check()


def test_counts_of_training_batches_may_be_absent(tmp_path: Path, things: Path, original: Original) -> None:
    path = tmp_path / "raft-things.pth"
    torch.save(without(torch.load(things, weights_only=True), "num_batches_tracked"), path)
    RaftMotion(str(path)).check()
    assert torch.equal(load_raft(str(path)).mask_predictor.conv.bias, original.float().update_block.mask[2].bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 127}, "short_side of 128 pixels or more, got 127"),
        ({"iterations": 0}, "1 iteration or more, got 0"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"model": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_parameters_that_cannot_work_are_refused(things: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RaftMotion(**{"model": str(things), **changes}).check()


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, things: Path) -> None:
    genuine = builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(UserError, match=re.escape("pip install 'vchitect-fast[models]'")):
        RaftMotion(str(things)).check()


def test_the_key_holds_what_decides_the_scores(tmp_path: Path, things: Path) -> None:
    stage = RaftMotion(str(things))
    copy = tmp_path / "copy.pth"
    copy.write_bytes(things.read_bytes())
    assert RaftMotion(str(copy), device="cpu").key() == stage.key()
    copy.write_bytes(things.read_bytes() + b"\0")
    keys = {s.key() for s in (stage, RaftMotion(str(copy)), RaftMotion(str(things), 256), RaftMotion(str(things), 128, 20))}  # fmt: skip
    assert len(keys) == 4
