"""From a checkpoint to a model folder to a video: export, the sample command, filmstrips, and what they refuse.

Run: pytest tests/test_sample.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vchitect_fast.cli import main
from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.sample import Pipeline, filmstrip, psnr_db, to_frames
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import read_video

SETTINGS = {"codec": "dct", "text_encoder": "hash", "fps": 8.0, "shift": 3.0, "shape": "3x48x32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano model with random weights, as `train` leaves one."""
    torch.manual_seed(0)
    model = VchitectTransformer(preset("vchitect-nano"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "pipeline.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "model"


def sample(folder: Path, out: Path, *options: str) -> int:
    return main(["sample", "--model", str(folder), "--prompt", "a cat", "--out", str(out), "--steps", "3", *options])


def test_writes_a_video_and_a_filmstrip(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(folder, tmp_path / "x.mp4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    frames, fps = read_video(result["video"])
    assert frames.shape == (3, 32, 48, 3)
    assert fps == pytest.approx(8.0)
    assert Image.open(result["filmstrip"]).size == (3 * 50, 32 + 18)
    assert result["shape"] == "3x48x32"


def test_a_sample_is_its_seed_and_its_prompt(folder: Path) -> None:
    pipeline = Pipeline.load(folder, None, None, torch.device("cpu"))
    shape = VideoShape(2, 32, 32)

    def make(prompts: list[str], seeds: list[int], **options) -> torch.Tensor:
        return pipeline.generate(prompts, shape, seeds=seeds, num_steps=3, **options)

    both = make(["a cat", "a dog"], [1, 2])
    assert torch.equal(both, make(["a cat", "a dog"], [1, 2]))
    alone = make(["a dog"], [2])[0]
    assert psnr_db(both[1], alone) > 50, "a sample must not depend on its neighbours but for rounding"
    assert not torch.equal(make(["a cat"], [1]), make(["a dog"], [1]))
    assert not torch.equal(make(["a cat"], [1]), make(["a cat"], [3]))
    assert not torch.equal(make(["a cat"], [1]), make(["a cat"], [1], guidance=1.0))
    assert not torch.equal(make(["a cat"], [1]), make(["a cat"], [1], guidance_kind="released"))


def test_rounds_the_shape_and_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(folder, tmp_path / "x.mp4", "--shape", "1x40x30") == 0
    assert "1x40x30 rounded to 1x48x32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "harm", "fragment"),
    [
        (["--shape", "12x99"], lambda f: None, "frames x width x height"),
        (["--codec", "nowhere"], lambda f: None, "nowhere"),
        (["--shape", "1x512x32"], lambda f: None, "exceed the position grid"),
        (["--steps", "0"], lambda f: None, "at least 1 step"),
        ([], lambda f: (f / "pipeline.json").unlink(), "give --shape"),
        (["--shape", "1x32x32"], lambda f: (f / "pipeline.json").unlink(), "give --codec and --text-encoder"),
        (["--shape", "1x32x32", "--codec", "dct"], lambda f: (f / "pipeline.json").unlink(), "give --text-encoder"),
        (["--model", "nowhere"], lambda f: None, "nowhere does not exist"),
    ],
)
def test_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], harm, fragment: str
) -> None:
    harm(folder)
    assert sample(folder, tmp_path / "x.mp4", *options) == 2
    assert fragment in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


def test_export_needs_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "m")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_filmstrip_spreads_frames_and_shortens_captions() -> None:
    video = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 8, 16, 3).contiguous()
    picture = np.asarray(filmstrip({"a caption much longer than the strip is wide " * 4: video}, max_frames=5))
    assert picture.shape == (8 + 18, 5 * 18, 3)
    assert [int(picture[20, k * 18 + 4, 0]) for k in range(5)] == [0, 5, 10, 14, 19]


def test_psnr_and_frames_by_hand() -> None:
    a = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    assert psnr_db(a, a) == float("inf")
    assert psnr_db(a, a + 255) == pytest.approx(0.0)
    assert psnr_db(a, a + 51) == pytest.approx(13.979, abs=1e-3)
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 1, 5).expand(1, 1, 3, 1, 5)
    assert to_frames(video)[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
