"""Aesthetics: LAION's head in its own layout, folded or not, on CLIP embeddings of real frames; the proxy's formula.

pytest tests/curation/test_aesthetics.py
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close_to_exact
from real_video import bikes
from torch import Tensor, nn

from vchitect_fast.curation.aesthetics import AestheticProxy, Aesthetics, load_head, measures
from vchitect_fast.curation.clip_model import load_clip
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import ClipSpan, Sample
from vchitect_fast.errors import UserError


def published_head() -> nn.Module:
    """improved-aesthetic-predictor's MLP: state keys layers.0, 2, 4, 6, 7."""

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(768, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
                nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    torch.manual_seed(3)
    return MLP().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small CLIP with embeddings of 768, one of 48, and the head, each in the original's layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    root = tmp_path_factory.mktemp("aesthetics")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, dim in (("clip", 768), ("narrow", 48)):
        config = CLIPVisionConfig(**small, patch_size=32, projection_dim=dim)
        torch.manual_seed(4)
        CLIPVisionModelWithProjection(config).save_pretrained(root / name)
    (root / "head").mkdir()
    torch.save(published_head().state_dict(), root / "head" / "sac+logos+ava1-l14-linearMSE.pth")
    return {path.name: str(path) for path in root.iterdir()}


def sample(stage: Any, name: str = "bikes.mp4", seconds: float = 1.16) -> Sample:
    span = ClipSpan("", str(bikes().with_name(name)), 0, 28, 0.0, seconds, 0, 0, 25.0)
    return Sample(span, clip_frames(span, stage.wants(span)), {})


def test_the_folded_head_is_the_head(folders: dict[str, str]) -> None:
    head = published_head()
    embeddings = torch.nn.functional.normalize(torch.randn(64, 768), dim=-1)
    with torch.no_grad():
        reference, exact = head(embeddings)[:, 0], head.double()(embeddings.double())[:, 0]
    direction, bias = load_head(folders["head"])
    assert direction.shape == (768,)
    folded = torch.from_numpy(embeddings.double().numpy() @ direction + bias)
    assert_close_to_exact(folded.float(), exact, reference, reduced=1024)


def test_scores_are_those_of_the_published_head(folders: dict[str, str]) -> None:
    stage = Aesthetics(folders["clip"], folders["head"], device="cpu")
    stage.check()
    samples = [sample(stage), sample(stage, "bigbuckbunny.mp4")]
    assert [len(s.frames) for s in samples] == [3, 3]
    found = stage.score(samples)
    assert all(set(scores) == set(stage.columns) for scores in found)
    embeddings = torch.from_numpy(load_clip(folders["clip"]).image_embeddings([f for s in samples for f in s.frames]))
    head = published_head()
    with torch.no_grad():
        reference, exact = head(embeddings).view(2, 3), head.double()(embeddings.double()).view(2, 3)
    for name, reduced in (("score", lambda x: x.mean(1)), ("min", lambda x: x.amin(1))):
        actual = torch.tensor([scores[name] for scores in found])
        assert_close_to_exact(actual, reduced(exact), reduced(reference), reduced=1024, name=name)
    assert found[0]["min"] < found[0]["score"]


def test_clips_score_alike_in_any_company(folders: dict[str, str]) -> None:
    stage = Aesthetics(folders["clip"], folders["head"], device="cpu")
    samples = [sample(stage, "carphone_pristine.mp4"), sample(stage)]
    assert stage.score(samples) == [stage.score([one])[0] for one in samples]
    assert stage.score([]) == []


def test_the_key_follows_the_weights_and_not_their_place(folders: dict[str, str], tmp_path: Path) -> None:
    stage = Aesthetics(folders["clip"], folders["head"])
    moved = tmp_path / "moved.pth"
    moved.write_bytes((Path(folders["head"]) / "sac+logos+ava1-l14-linearMSE.pth").read_bytes())
    clip = shutil.copytree(folders["clip"], tmp_path / "clip")
    assert Aesthetics(str(clip), str(moved), device="cpu").key() == stage.key()
    state = published_head().state_dict()
    torch.save(state | {"layers.7.bias": state["layers.7.bias"] + 1}, tmp_path / "other.pth")
    assert Aesthetics(folders["clip"], str(tmp_path / "other.pth")).key() != stage.key()
    assert Aesthetics(folders["narrow"], folders["head"]).key() != stage.key()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "layers.4.bias"}, "missing layers.4.bias"),
        # The ReLU variant of the head has the same layers under other numbers.
        (lambda s: {n.replace("7", "8"): t for n, t in s.items()}, "missing layers.7.weight.* unknown layers.8.weight"),
        (lambda s: s | {"layers.0.weight": torch.zeros(1024, 512)}, r"misshapen layers.0.weight \[1024, 512\]"),
    ],
)
def test_another_head_is_refused(folders: dict[str, str], tmp_path: Path, change: Any, message: str) -> None:
    torch.save(change(published_head().state_dict()), tmp_path / "head.pth")
    with pytest.raises(UserError, match=message):
        Aesthetics(folders["clip"], str(tmp_path)).check()


def test_another_clip_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"reads 768 numbers a picture \(CLIP ViT-L/14\), got 48"):
        Aesthetics(folders["narrow"], folders["head"]).check()


def test_the_proxy_is_its_formula() -> None:
    import cv2

    stage = AestheticProxy()
    one = sample(stage)
    assert all(min(frame.shape[:2]) == 256 for frame in one.frames)
    [found] = stage.score([one])
    assert set(found) == set(stage.columns)
    rows = []
    for frame in one.frames:
        r, g, b = frame.astype(np.float64).transpose(2, 0, 1)
        grey = 0.299 * r + 0.587 * g + 0.114 * b
        variance = cv2.Laplacian(grey, cv2.CV_64F).var()
        rg, yb = r - g, 0.5 * (r + g) - b  # Hasler and Suesstrunk 2003, M^(3)
        colour = np.sqrt(rg.std() ** 2 + yb.std() ** 2) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)
        rows.append([variance / (variance + 100), colour / 109, 1 - abs(grey.mean() / 127.5 - 1), grey.std() / 64])
    expected = np.minimum(1, rows).mean(0)
    names = ("sharpness", "colourfulness", "exposure", "contrast")
    # fp64 both ways, sums of 1.5e5 numbers: their rounding is at most eps times that count.
    bound = np.finfo(np.float64).eps * one.frames[0].size
    assert max(abs(found[name] - value) / value for name, value in zip(names, expected, strict=True)) < bound
    assert abs(found["score"] - expected.mean()) < bound


def test_the_proxy_stays_within_0_and_1_and_tells_what_it_should() -> None:
    black, white = np.zeros((9, 16, 3), np.uint8), np.full((9, 16, 3), 255, np.uint8)
    assert measures(black) == measures(white) == (0, 0, 0, 0)
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    vivid = np.stack([checks, 255 - checks, checks], -1).astype(np.uint8)
    assert all(0 <= value <= 1 for value in measures(vivid)) and measures(vivid)[1] == 1
    assert all(0 <= value <= 1 for value in measures(np.full((1, 1, 3), 90, np.uint8)))
    [sharp] = sample(AestheticProxy()).frames[:1]
    import cv2

    blurred = cv2.GaussianBlur(sharp, (0, 0), 3)
    grey = np.repeat(sharp.mean(2, keepdims=True), 3, 2).astype(np.uint8)
    assert measures(blurred)[0] < measures(sharp)[0] / 2
    assert measures(grey)[1] == 0 < measures(sharp)[1]
    assert measures(sharp // 4)[2] < measures(sharp)[2] and measures(sharp // 4)[3] < measures(sharp)[3]


def test_a_proxy_has_a_name_of_its_own_and_nothing_drops() -> None:
    assert AestheticProxy.name != Aesthetics.name and AestheticProxy.backend != Aesthetics.backend
    assert not AestheticProxy.rules and not Aesthetics.rules
