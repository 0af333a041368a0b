"""From a checkpoint to a model folder to a video: export, the sample command, filmstrips, and what they refuse.

Run: pytest tests/test_sample.py
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vchitect_fast import checkpoint
from vchitect_fast.cli import main
from vchitect_fast.export import export_checkpoint
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
    result = json.loads(capsys.readouterr().out)  # which is nothing but the JSON
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
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "no bar and no blank line where there is no terminal"
    assert "1x40x30 rounded to 1x48x32" in lines[0]
    assert sample(folder, tmp_path / "x.mp4", "--shape", "1x40x30", "--json") == 0
    streams = capsys.readouterr()
    assert json.loads(streams.out)["shape"] == "1x48x32"
    assert "1x40x30 rounded to 1x48x32" in streams.err


def test_sampling_holds_one_step_at_a_time(folder: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    pipeline = Pipeline.load(folder, None, None, torch.device("cpu"))
    velocity = pipeline.velocity

    def watched(z: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(z))
        return velocity(z, *inputs)

    pipeline.velocity = watched
    pipeline.config = preset("vchitect-nano")
    most = 0

    def decode(latents: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = sum(reference() is not None for reference in alive)
        return type(pipeline.codec).decode(pipeline.codec, latents)

    pipeline.codec.decode = decode  # type: ignore[method-assign]
    pipeline.generate(["a"], VideoShape(2, 32, 32), seeds=[0], num_steps=6, guidance=1.0)
    assert len(alive) == 6
    assert most <= 2


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
        (["--shift", "0"], lambda f: None, "the shift must be a positive number, got 0"),
        (["--shift", "-1"], lambda f: None, "the shift must be a positive number, got -1"),
        (["--shift", "nan"], lambda f: None, "the shift must be a positive number, got nan"),
        (["--fps", "0"], lambda f: None, "frames a second must be from 0.1 to 1000, got 0"),
        (["--fps", "-8"], lambda f: None, "frames a second must be"),
        (["--fps", "inf"], lambda f: None, "frames a second must be"),
        (["--guidance", "nan"], lambda f: None, "--guidance must be a finite number"),
        (["--seed", "99999999999999999999"], lambda f: None, "--seed must be a whole number"),
        (["--seed", "-1"], lambda f: None, "--seed must be a whole number"),
        (["--out", "y.png"], lambda f: None, "--out must end in .mp4, got y.png"),
        ([], lambda f: (f / "pipeline.json").write_text("[]"), "must hold a JSON object, got list"),
        ([], lambda f: (f / "pipeline.json").write_text('{"fps": "abc"}'), "has fps 'abc', expected a number"),
        ([], lambda f: (f / "pipeline.json").write_text('{"codec": 5}'), "has codec 5, expected a text"),
    ],
)
def test_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], harm, fragment: str
) -> None:
    harm(folder)
    assert sample(folder, tmp_path / "x.mp4", *options) == 2
    streams = capsys.readouterr()
    assert fragment in streams.err
    assert (streams.out, streams.err.count("\n")) == ("", 1)
    assert not (tmp_path / "x.mp4").exists()


def test_the_folder_of_a_run_is_told_from_its_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(folder.parent, tmp_path / "x.mp4") == 2
    assert f"is the folder of a training run; give the model in it, {folder}." in capsys.readouterr().err


def write_checkpoint(run: Path) -> Path:
    """As `train` leaves one, of a run whose codec is a folder beside it."""
    model = VchitectTransformer(preset("vchitect-nano"))
    masters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": tensor for name, tensor in [*masters.items(), *model.named_buffers()]}
    tensors |= {f"ema.{name}": tensor + 1 for name, tensor in masters.items()}
    config = {"codec": "sd3", "text_encoder": "hash", "fps": 8.0, "shift": 1.0}
    state = {"model": model.config.to_dict(), "config": config, "shape": "2x32x32"}
    return checkpoint.save(run, 1, tensors, state, 1)


def test_export_takes_a_run_or_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(Path("checkpoint-x"))  # a run may be called so
    weights = {}
    for name, source, options in (
        ("a", "checkpoint-x", []), ("b", str(folder), []), ("c", "checkpoint-x", ["--weights", "model"]),
    ):  # fmt: skip
        assert main(["export", "--run", source, "--out", name, *options]) == 0
        weights[name] = VchitectTransformer.from_pretrained(name).proj_out.weight
    assert torch.equal(weights["a"], weights["b"])
    assert torch.equal(weights["a"], weights["c"] + 1)
    settings = json.loads(Path("a", "pipeline.json").read_text())
    assert settings["codec"] == str(tmp_path / "sd3")
    assert settings["text_encoder"] == "hash"


def test_export_leaves_what_is_not_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    write_checkpoint(run)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(run)
    for out in (run, Path(), run / "checkpoint-00000001", tmp_path):
        assert main(["export", "--run", str(run), "--out", str(out)]) == 2
        assert "nothing was written" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_export_is_whole_with_its_pipeline_and_loads_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "run")
    loaded: list[str] = []
    load_prefix = checkpoint.load_prefix

    def watched(source: Path, prefix: str, **options) -> dict[str, torch.Tensor]:
        found = load_prefix(source, prefix, **options)
        loaded.extend(prefix + name for name in found)
        return found

    monkeypatch.setattr(checkpoint, "load_prefix", watched)
    appeared: list[list[str]] = []
    rename = Path.rename

    def seen(self: Path, target: Path) -> Path:
        appeared.append(sorted(path.name for path in self.iterdir()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", seen)
    export_checkpoint(folder, tmp_path / "out")
    assert appeared == [["config.json", "diffusion_pytorch_model.safetensors", "pipeline.json"]]
    assert len(loaded) == len(VchitectTransformer(preset("vchitect-nano")).state_dict())


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
