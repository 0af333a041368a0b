"""Watermark: LAION's EfficientNet-B3 in the original layout loads strictly and scores real frames as the original does.

pytest tests/curation/test_watermark.py
"""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close_to_exact
from real_video import bikes
from torch import nn

from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.stage import ClipSpan, Sample
from vchitect_fast.curation.watermark import Watermark, load_watermark_model, watermark_pixels
from vchitect_fast.errors import UserError


def published_model() -> nn.Module:
    """example_use.py of LAION-5B-WatermarkDetection, by the old name, with random weights."""
    import timm

    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm: the name is deprecated
        model = timm.create_model("efficientnet_b3a", pretrained=False, num_classes=2)
    model.classifier = nn.Sequential(
        nn.Linear(in_features=1536, out_features=625), nn.ReLU(), nn.Dropout(p=0.3),
        nn.Linear(in_features=625, out_features=256), nn.ReLU(), nn.Linear(in_features=256, out_features=2),
    )  # fmt: skip
    return model.eval()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("watermark") / "watermark_model_v1.pt"
    torch.save(published_model().state_dict(), file)
    return file


def sample(name: str = "bikes.mp4") -> Sample:
    span = ClipSpan("", str(bikes().with_name(name)), 0, 28, 0.0, 1.16, 0, 0, 25.0)
    wants = Watermark("").wants(span)
    assert [want.time for want in wants] == span.ends() and all(want.short_side is None for want in wants)
    return Sample(span, clip_frames(span, wants), {})


def published_pixels(frames: list[np.ndarray]) -> torch.Tensor:
    from torchvision import transforms as T

    steps = [T.Resize((256, 256)), T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    return torch.stack([T.Compose([T.ToPILImage(), *steps])(frame) for frame in frames])


def test_pixels_are_those_of_the_original() -> None:
    frames = [sample(name).frames[0] for name in ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")]
    assert torch.equal(watermark_pixels(frames), published_pixels(frames))


def test_probabilities_are_those_of_the_original(model_file: Path) -> None:
    stage = Watermark(str(model_file.parent), device="cpu")
    stage.check()
    samples = [sample(), sample("carphone_pristine.mp4")]
    found = stage.score(samples)
    assert all(set(scores) == set(stage.columns) for scores in found)
    model, pixels = published_model(), published_pixels([frame for one in samples for frame in one.frames])
    with torch.no_grad():
        reference, exact = model(pixels).softmax(1), model.double()(pixels.double()).softmax(1)
    actual = torch.tensor([p for scores in found for p in scores["probabilities"]])
    # The longest sum is that of the widest 1x1 convolution, over 2304 channels.
    assert_close_to_exact(actual, exact[:, 0], reference[:, 0], reduced=2304)
    for scores, own in zip(found, exact.view(2, 3, 2), strict=True):
        assert scores["probability"] == max(scores["probabilities"])
        assert scores["watermarked"] == bool((own[:, 0] > own[:, 1]).any())
    assert found == [stage.score([one])[0] for one in samples], "a clip's scores depend on its neighbours"
    assert stage.score([]) == []


@pytest.mark.parametrize(("bias", "expected"), [([9.0, 0.0], True), ([0.0, 9.0], False)])
def test_index_0_is_the_watermark(model_file: Path, tmp_path: Path, bias: list[float], expected: bool) -> None:
    state = torch.load(model_file, weights_only=True) | {"classifier.5.bias": torch.tensor(bias)}
    torch.save({"weights": state, "epoch": 1}, tmp_path / "other.pt")  # as inference.py once wanted it
    stage = Watermark(str(tmp_path / "other.pt"), device="cpu")
    [scores] = stage.score([sample()])
    assert scores["watermarked"] is expected and (scores["probability"] > 0.9) is expected
    rule = Rule.parse(stage.name, "watermarked", stage.rules["watermarked"])
    assert rule.keeps(scores["watermarked"]) is not expected


def test_one_marked_frame_marks_the_clip(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict of a stand-in for the network: only the middle frame looks marked."""
    logits = iter([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    monkeypatch.setattr(
        "vchitect_fast.curation.watermark.load_watermark_model", lambda *_: lambda part: torch.tensor([next(logits)])
    )
    [scores] = Watermark(str(model_file), device="cpu").score([sample()])
    assert scores["watermarked"] is True and scores["probability"] == scores["probabilities"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "classifier.3.bias"}, "missing classifier.3.bias"),
        (lambda s: s | {"module.extra": torch.zeros(1)}, "unknown module.extra"),
        (lambda s: s | {"classifier.5.weight": torch.zeros(3, 256)}, r"misshapen classifier.5.weight \[3, 256\]"),
        (lambda s: {f"module.{n}": t for n, t in s.items()}, "missing conv_stem.weight"),
    ],
)
def test_another_checkpoint_is_refused(model_file: Path, tmp_path: Path, change: Any, message: str) -> None:
    torch.save(change(torch.load(model_file, weights_only=True)), tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        Watermark(str(tmp_path), device="cpu").check()


def test_the_key_follows_the_weights_and_not_their_place(model_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.pt"
    moved.write_bytes(model_file.read_bytes())
    assert Watermark(str(moved), device="cpu").key() == Watermark(str(model_file)).key()
    moved.write_bytes(model_file.read_bytes() + b"0")
    assert Watermark(str(moved)).key() != Watermark(str(model_file)).key()


def test_without_timm_the_extra_is_named(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs timm .*vchitect-fast\[models\]"):
        load_watermark_model.__wrapped__(str(model_file))
