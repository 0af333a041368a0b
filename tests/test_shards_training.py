"""Training reads clips inside tars: the same batches, bit by bit, as from the same clips as files, and a whole run.

Real video (bikes.mp4) throughout. pytest tests/test_shards_training.py
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_video import bikes_clips

from vchitect_fast import checkpoint
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.curation.export import export
from vchitect_fast.data import Batch, VideoData
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, read_manifest, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.model import preset
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.shapes import VideoShape

BATCHES = {VideoShape(3, 64, 32): 3, VideoShape(12, 48, 32): 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six shots of bikes.mp4 exported in both forms: files/manifest.parquet and tars/index.parquet (two tars)."""
    folder = tmp_path_factory.mktemp("exported")
    write_manifest(bikes_clips(), folder / "m.jsonl")
    export(folder / "m.jsonl", str(folder / "files"))
    export(folder / "m.jsonl", str(folder / "tars"), form="shards", max_shard_clips=4)
    return folder


def opened(clips: list[Clip], cache: Path | None = None) -> VideoData:
    return VideoData(
        clips, BATCHES, seed=3, fps=8.0, codec=load_codec("dct"), cache=cache, device="cpu",
        text_encoder=load_text_encoder("hash", width=24, pooled_width=20),
    )  # fmt: skip


def assert_same(one: Batch, other: Batch) -> None:
    assert one.shape == other.shape
    assert [replace(w.clip, path=Path()) for w in one.windows] == [replace(w.clip, path=Path()) for w in other.windows]
    for name in ("latents", "text_embeds", "pooled"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_batches_from_tars_are_those_from_files_however_they_are_reached(exported: Path, tmp_path: Path) -> None:
    files, tars = read_manifest(exported / "files/manifest.parquet"), read_manifest(exported / "tars/index.parquet")
    assert {clip.path.parent.suffix for clip in tars} == {".tar"}
    with opened(files) as data:
        want = [data.batch(step) for step in range(8)]
    with opened(tars, tmp_path) as data:
        assert [assert_same(data.batch(step), want[step]) for step in range(8)] == [None] * 8
        assert data.skipped == {}
    for cache in (tmp_path, None):  # another process: from the cache, then without one, out of order
        with opened(tars, cache) as data:
            for step in (7, 2, 5):
                assert_same(data.batch(step), want[step])


def test_the_cache_knows_a_member_by_its_tar(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vchitect_fast import data as data_module

    shutil.copytree(exported / "tars", tmp_path / "tars")
    clips, decoded = read_manifest(tmp_path / "tars/index.parquet"), []
    decode: Callable = data_module.decode_window
    monkeypatch.setattr(data_module, "decode_window", lambda w, *rest: decoded.append(w) or decode(w, *rest))

    def num_decoded() -> int:
        decoded.clear()
        with opened(clips, tmp_path / "cache") as data:
            data.first_batches(9)
        return len(decoded)

    assert num_decoded() > 5
    assert num_decoded() == 0
    clips[0].path.parent.touch()
    assert num_decoded() > 0, "a tar that was written again is not taken for the old one"


def test_bad_members_are_skipped_and_named_like_bad_files(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "tars", tmp_path / "tars")
    clips = read_manifest(tmp_path / "tars/index.parquet")
    tar = clips[0].path.parent
    content = tar.read_bytes()
    with tarfile.open(tar) as archive:
        second = archive.getmember(clips[1].path.name)
    tar.write_bytes(content[: second.offset_data + 1000])
    outside = replace(clips[0], path=tar / "../../secret.mp4")
    with opened([*clips, outside]) as data:
        used = {clip.path for step in range(12) for clip in data.batch(step).clips}
        reasons = {Path(path).name: reason for path, reason in data.skipped.items()}
    assert used == {clips[0].path, clips[4].path, clips[5].path}
    assert "cut short" in reasons[clips[1].path.name]
    assert "cut short" in reasons[clips[3].path.name]
    assert "would leave its folder" in reasons["secret.mp4"]


def write_plan(path: Path, *shapes: str) -> None:
    nano = preset("vchitect-nano")
    predicted = Prediction(
        1.0, {"forward_s": 0.3, "backward_s": 0.6, "optimizer_s": 0.1}, 1.0, {}, "made up for a test"
    )
    policy = (Policy.keep(),) * nano.num_layers
    Plan(
        entries=tuple(
            PlanEntry(shape, policy, microbatch=2, accumulation=1, num_chunks=1, predicted=predicted) for shape in shapes
        ),
        model=nano.fingerprint(), device=this_device().fingerprint(), compute_dtype="float32",
        device_name="this machine", num_text_tokens=16, peak_flops=1e10,
    ).save(path)  # fmt: skip


def test_a_planned_shape_that_no_clip_fits_is_refused_before_anything_is_computed(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(tmp_path / "plan.json", "4x32x16", "400x32x16")
    config = TrainConfig(
        manifest=str(exported / "tars"), plan=str(tmp_path / "plan.json"), out=str(tmp_path / "run"), model="vchitect-nano",
        cache=str(tmp_path / "cache"), steps=2,
    )  # fmt: skip
    config.save(tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert "400x32x16: it takes clips with 400 or more frames at 8 fps" in capsys.readouterr().err
    assert read_log(tmp_path / "run", "validation") == []
    assert main(["train", str(tmp_path / "run.yaml"), "mixture={4x32x16: 1, 400x32x16: 0}"]) == 0


def test_train_runs_on_an_index_of_shards_and_on_their_folder_as_on_files(exported: Path, tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", "4x32x16")
    finals = {}
    places = {"files": "files/manifest.parquet", "tars": "tars/index.parquet", "folder": "tars"}
    for name, place in places.items():
        config = TrainConfig(
            manifest=str(exported / place), plan=str(tmp_path / "plan.json"), out=str(tmp_path / name),
            model="vchitect-nano", cache=str(tmp_path / f"cache-{name}"), steps=4, warmup_steps=1, validate_every=2,
            save_every=2, log_every=2,
        )  # fmt: skip
        config.save(tmp_path / f"{name}.yaml")
        if name == "tars":  # stopped and gone on with
            assert main(["train", str(tmp_path / "tars.yaml"), "steps=2"]) == 0
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        assert [event["step"] for event in read_log(tmp_path / name, "step")] == [1, 2, 3, 4]
        finals[name] = checkpoint.load_prefix(checkpoint.latest(tmp_path / name), "")
    for name in ("tars", "folder"):
        assert finals["files"].keys() == finals[name].keys()
        assert all(torch.equal(tensor, finals[name][key]) for key, tensor in finals["files"].items())
