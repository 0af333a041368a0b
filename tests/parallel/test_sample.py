"""A video that ranks sample together is the one that a process samples alone, and rank 0 writes it.

pytest tests/parallel/test_sample.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ranks

from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.sample import Pipeline, psnr_db
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import read_video

SETTINGS = {"codec": "dct", "text_encoder": "hash", "fps": 8.0, "shift": 3.0, "shape": "3x64x32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model with random weights, as `train` leaves one."""
    torch.manual_seed(0)
    model = VchitectTransformer(preset("vchitect-nano"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("sampled") / "model"
    model.save_pretrained(path)
    (path / "pipeline.json").write_text(json.dumps(SETTINGS))
    return path


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("shape", [VideoShape(5, 64, 32), VideoShape(1, 64, 48)], ids=str)
def test_ranks_make_the_video_of_one_process(folder: Path, world_size: int, shape: VideoShape) -> None:
    """Two prompts, with and without guidance; frames that do not divide, and an image, of which all but one rank have none."""
    prompts, options = ["a cat", "a dog"], [{"guidance": 1.0}, {"guidance": 4.0, "shift": 3.0}]
    alone = Pipeline.load(folder, None, None, torch.device("cpu"))
    first, *others = ranks(world_size).run("sample_calls:generate", folder, prompts, shape, options)
    for k, each in enumerate(options):
        video = alone.generate(prompts, shape, seeds=range(2), num_steps=3, **each)
        assert video.float().std() > 20, "no even grey"
        assert first[k].shape == video.shape
        assert psnr_db(first[k], video) > 60, "rounding apart"
        assert all(other[k].shape == (2, 0, *video.shape[2:]) for other in others)


@pytest.mark.soak
def test_torchrun_writes_one_video(folder: Path, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vchitect_fast.sample"]
    options = [
        "--model",
        folder,
        "--prompt",
        "a cat",
        "--steps",
        "2",
        "--out",
        tmp_path / "x.mp4",
        "--shape",
        "3x60x30",
        "--json",
    ]
    found = subprocess.run(
        [sys.executable, "-P", *command, *map(str, options)], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout)["shape"] == "3x64x32", "one rank prints, and nothing but the JSON"
    assert found.stderr.count("3x60x30 rounded to 3x64x32") == 1
    assert read_video(tmp_path / "x.mp4")[0].shape == (3, 32, 64, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4", "x.png"]
