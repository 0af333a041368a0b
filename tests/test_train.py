"""The loop on real clips with the nano model: what it logs, exact resume after kill -9 and SIGTERM, what it refuses.

Run: pytest tests/test_train.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vchitect_fast import checkpoint
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.machine import this_device
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.metrics import read_log
from vchitect_fast.model import VchitectTransformer, preset
from vchitect_fast.plan import Plan, PlanEntry, Policy, Prediction
from vchitect_fast.quickstart import example_folder
from vchitect_fast.resume import only_process_in
from vchitect_fast.train import train
from vchitect_fast.validate import Validation

NANO = preset("vchitect-nano")
SHAPE = "4x32x16"


def plan_of(path: Path, **change) -> Path:
    """A Plan for the nano model on this machine; nothing of it was measured."""
    entry = PlanEntry(
        shape=SHAPE,
        policy=(change.pop("policy", Policy.keep()),) * NANO.num_layers,
        microbatch=change.pop("microbatch", 2),
        accumulation=change.pop("accumulation", 1),
        num_chunks=change.pop("num_chunks", 1),
        predicted=Prediction(
            1.0, {"forward_s": 0.3, "backward_s": 0.6, "optimizer_s": 0.1}, 1.0, {}, "made up for a test"
        ),
    )
    values = {"model": NANO.fingerprint(), "device": this_device().fingerprint(), "compute_dtype": "float32"}
    values |= {"device_name": "this machine", "num_text_tokens": 16, "peak_flops": 1e10, **change}
    Plan(entries=(entry,), **values).save(path)
    return path


def clips() -> list[Clip]:
    video = example_folder() / "bikes.mp4"
    starts = {"a van": 0.1, "a taxi": 1.4, "a cyclist": 3.2}
    return [Clip(video, start, start + 0.6, 15, 640, 272, 25.0, caption) for caption, start in starts.items()]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """run.yaml of eight steps on three real clips, everything in the temporary folder."""
    write_manifest(clips(), tmp_path / "clips.jsonl")
    config = TrainConfig(
        manifest=str(tmp_path / "clips.jsonl"), plan=str(plan_of(tmp_path / "plan.json")), out=str(tmp_path / "run"),
        model="vchitect-nano", cache=str(tmp_path / "cache"), steps=8, warmup_steps=2, learning_rate=1e-2, ema_decay=0.9,
        validate_every=4, save_every=4, log_every=4,
    )  # fmt: skip
    config.save(tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def final(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint."""
    return checkpoint.load_prefix(checkpoint.latest(run), "")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[:1]}"


def test_a_run_learns_logs_and_leaves_a_model(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run_file), "steps=60", "validate_every=30", "save_every=30", "sample_every=60"]) == 0
    run = run_file.parent / "run"
    steps = read_log(run, "step")
    assert [event["step"] for event in steps] == list(range(1, 61))
    fields = "loss grad_norm learning_rate shape step_s data_s encode_s forward_s backward_s optimizer_s tokens_per_s model_flops mfu peak_gib"
    assert set(fields.split()) <= steps[0].keys()
    event = steps[-1]
    parts = sum(event[name] for name in ("data_s", "encode_s", "forward_s", "backward_s", "optimizer_s"))
    assert event["step_s"] == pytest.approx(parts)
    assert event["mfu"] == pytest.approx(event["model_flops"] / event["step_s"] / 1e10)
    assert event["tokens_per_s"] == pytest.approx(2 * 4 * 2 / event["step_s"])  # B T S, with S = (2/2) x (4/2)

    checks = read_log(run, "validation")
    assert [check["step"] for check in checks] == [0, 30, 60]
    assert checks[-1]["loss"] < 0.9 * checks[0]["loss"]
    assert len(checks[0]["by_sigma"]) == 5

    printed = capsys.readouterr().out
    for fragment in ("predicted", "measured", "MFU", "tokens/s", "saved", "vchitect-fast sample"):
        assert fragment in printed
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        "step-00000060-0.mp4", "step-00000060-1.mp4", "step-00000060-2.mp4", "step-00000060.png",
    ]  # fmt: skip
    model = VchitectTransformer.from_pretrained(run / "model")
    assert torch.equal(model.proj_out.weight, final(run)["ema.proj_out.weight"])
    assert json.loads((run / "model" / "pipeline.json").read_text())["codec"] == "dct"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_as_if_it_had_not_stopped(run_file: Path, kind: signal.Signals) -> None:
    """Stopped in the middle of a step by the signal, resumed by the same command: the same bits in every tensor."""
    folder = run_file.parent
    command = [
        sys.executable,
        "-P",
        "-m",
        "vchitect_fast.cli",
        "train",
        str(run_file),
        "steps=400",
        "validate_every=0",
        "save_every=20",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "run" / "checkpoint-00000040").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.01)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if kind == signal.SIGTERM else -9), output
    state = checkpoint.read_state(checkpoint.latest(folder / "run"))
    stopped_at = state["step"]
    assert 20 <= stopped_at < 400  # a kill between the folder and `latest` leaves the one before
    if kind == signal.SIGTERM:  # saved where it was, not at the last multiple of save_every
        assert read_log(folder / "run", "step")[-1]["step"] == stopped_at

    config = TrainConfig.load(run_file, [f"steps={stopped_at + 10}", "validate_every=0", "save_every=1000"])
    resumed = train(config)
    straight = train(replace(config, out=str(folder / "straight")))
    assert resumed["step"] == straight["step"] == stopped_at + 10
    assert_same(final(folder / "run"), final(folder / "straight"))
    losses = [[event["loss"] for event in read_log(folder / name, "step")] for name in ("run", "straight")]
    assert losses[0] == losses[1]  # the log was rewound to the checkpoint and holds each step once


def test_recomputation_gives_the_same_run_bit_by_bit(run_file: Path) -> None:
    config = TrainConfig.load(run_file)
    train(config)
    plan = plan_of(run_file.parent / "recompute.json", policy=Policy.recompute())
    train(replace(config, plan=str(plan), out=str(run_file.parent / "recomputed")))
    assert_same(final(run_file.parent / "run"), final(run_file.parent / "recomputed"))


def test_bf16_keeps_fp32_masters_and_resumes_exactly(run_file: Path) -> None:
    plan = plan_of(run_file.parent / "bf16.json", compute_dtype="bfloat16", microbatch=1, accumulation=2)
    config = TrainConfig.load(run_file, [f"plan={plan}"])
    train(config)
    whole = final(run_file.parent / "run")
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    rounded = whole["model.proj_out.weight"].bfloat16().float()
    assert not torch.equal(whole["model.proj_out.weight"], rounded), "masters hold more than bf16 does"
    halves = replace(config, out=str(run_file.parent / "halves"))
    train(replace(halves, steps=4))
    train(halves)
    assert_same(whole, final(run_file.parent / "halves"))


def test_bf16_masters_keep_the_bits_of_fp32_weights(run_file: Path) -> None:
    VchitectTransformer(NANO).save_pretrained(run_file.parent / "mine")
    plan = plan_of(run_file.parent / "bf16.json", compute_dtype="bfloat16")
    overrides = [
        f"plan={plan}",
        f"model={run_file.parent / 'mine'}",
        "steps=1",
        "learning_rate=1e-30",
        "weight_decay=0",
    ]
    train(TrainConfig.load(run_file, overrides))
    mine = VchitectTransformer.from_pretrained(run_file.parent / "mine")
    assert torch.equal(final(run_file.parent / "run")["model.context_embedder.weight"], mine.context_embedder.weight)


def test_a_step_that_is_not_finite_is_not_taken(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights so large that the loss overflows: the run ends, names the clips, and the last checkpoint stays finite."""
    train(TrainConfig.load(run_file, ["steps=4"]))
    model = VchitectTransformer(NANO)
    with torch.no_grad():
        model.proj_out.bias.fill_(1e30)
    model.save_pretrained(run_file.parent / "huge")
    assert main(["train", str(run_file), f"model={run_file.parent / 'huge'}", f"out={run_file.parent / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert "was not taken" in error
    assert "bikes.mp4" in error
    assert not list((run_file.parent / "x").glob("checkpoint-*"))


def test_starts_from_a_folder_and_from_sd3(run_file: Path) -> None:
    from diffusers import SD3Transformer2DModel

    VchitectTransformer(NANO).save_pretrained(run_file.parent / "mine")
    train(TrainConfig.load(run_file, ["steps=1", f"model={run_file.parent / 'mine'}", f"out={run_file.parent / 'a'}"]))
    sizes = {
        name: value for name, value in NANO.to_dict().items() if name not in ("_class_name", "rope_scaling_factor")
    }
    SD3Transformer2DModel(**sizes).save_pretrained(run_file.parent / "sd3")
    overrides = [
        "steps=1",
        "warmup_steps=0",
        f"init_from_sd3={run_file.parent / 'sd3'}",
        f"out={run_file.parent / 'b'}",
    ]
    train(TrainConfig.load(run_file, overrides))
    temporal = "model.transformer_blocks.0.attn.to_out_temporal.weight"
    assert final(run_file.parent / "b")[temporal].abs().max() > 0, "the silent branch must learn from the first step"


def _other_heads(folder: Path) -> None:
    """The same widths and names, other heads: nothing but the sizes in the checkpoint tells them apart."""
    other = replace(NANO, num_attention_heads=1, attention_head_dim=16)
    VchitectTransformer(other).save_pretrained(folder / "other")
    plan_of(folder / "plan.json", model=other.fingerprint())
    config = TrainConfig.load(folder / "run.yaml", [f"model={folder / 'other'}"])
    config.save(folder / "run.yaml")


def _break_all(folder: Path) -> None:
    for file in (folder / "run").glob("checkpoint-*/*.distcp"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "overrides", "fragment"),
    [
        (lambda f: plan_of(f / "plan.json", model="0" * 12), [], "this Plan is for model 000000000000"),
        (lambda f: plan_of(f / "plan.json", device="0" * 12), [], "this Plan is for device 'this machine'"),
        (
            lambda f: plan_of(f / "plan.json", mesh={"dp_replicate": 1, "dp_shard": 1, "sp": 2}),
            [],
            "is for 2 ranks, here is 1; start 2",
        ),
        (lambda f: plan_of(f / "plan.json", fsdp_group="global"), [], "has fsdp_group 'global'"),
        (
            lambda f: plan_of(f / "plan.json", num_chunks=4, policy=Policy(qkv="recompute")),
            [],
            "block 0: in 4 chunks all groups but block_input are recomputed",
        ),
        (
            lambda f: plan_of(f / "plan.json", num_text_tokens=333),
            [],
            "for 333 text tokens, the text encoder 'hash' gives 16",
        ),
        (lambda f: None, ["modle=x"], "unknown run field 'modle'; did you mean 'model'?"),
        (lambda f: None, ["model=vchitect-nan"], "neither a model folder nor a preset"),
        (lambda f: None, ["steps"], "an override is name=value"),
        (lambda f: None, ["validation_manifest=nowhere.jsonl"], "nowhere.jsonl"),
        (lambda f: (f / "run").write_text("a file"), [], "cannot write into the run's folder"),
        (lambda f: None, ["plan=nowhere.json"], "cannot read the Plan nowhere.json"),
        (lambda f: None, ["codec=nowhere"], "nowhere"),
        (lambda f: None, ["text_encoder=nowhere"], "nowhere"),
        (lambda f: (f / "clips.jsonl").write_text('{"path": "x.mp4"}\n'), [], "needs the column 'start', got path"),
        (
            lambda f: write_manifest([replace(clip, path=f / "absent.mp4") for clip in clips()], f / "clips.jsonl"),
            [],
            "no clip for any shape can be decoded",
        ),
        (
            lambda f: write_manifest([replace(c, end=c.start + 0.1) for c in clips()], f / "clips.jsonl"),
            [],
            "no clip of 3 fits a bucket",
        ),
    ],
)
def test_refuses_before_any_work(
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
    harm,
    overrides: list[str],
    fragment: str,
) -> None:
    harm(run_file.parent)
    assert main(["train", str(run_file), *overrides]) == 2
    *notices, error = capsys.readouterr().err.strip().splitlines()
    assert fragment in error
    assert error.startswith("vchitect-fast train: ")
    assert all(notice.startswith("skipping") for notice in notices), notices
    assert not list((run_file.parent / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("harm", "overrides", "fragment"),
    [
        (_break_all, [], "is missing; no checkpoint in "),
        (_other_heads, [], "holds a model of other sizes"),
        (lambda f: None, ["seed=1"], "was trained with seed 0, got 1"),
        (lambda f: None, ["resume=false"], "choose another out="),
    ],
)
def test_refuses_to_resume(
    run_file: Path,
    capsys: pytest.CaptureFixture[str],
    harm,
    overrides: list[str],
    fragment: str,
) -> None:
    train(TrainConfig.load(run_file))
    harm(run_file.parent)
    before = (run_file.parent / "run" / "log.jsonl").read_text()
    assert main(["train", str(run_file), "steps=9", *overrides]) == 2
    assert fragment in capsys.readouterr().err
    assert (run_file.parent / "run" / "log.jsonl").read_text() == before


def test_a_bad_clip_is_skipped_and_named(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = run_file.parent / "broken.mp4"
    data = (example_folder() / "bikes.mp4").read_bytes()
    broken.write_bytes(data[: len(data) // 3])
    write_manifest([*clips(), replace(clips()[0], path=broken)], run_file.parent / "clips.jsonl")
    assert main(["train", str(run_file)]) == 0
    done = read_log(run_file.parent / "run", "done")[-1]
    assert list(done["skipped"]) == [str(broken)]
    assert f"skipped  {broken}" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_good_checkpoint(run_file: Path) -> None:
    """A real limit on file size stands for the full disk: writes fail in the middle of the second checkpoint."""
    train(TrainConfig.load(run_file, ["steps=4"]))
    good = final(run_file.parent / "run")
    limited = (
        "import resource, signal, sys; from vchitect_fast.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        f"sys.exit(main(['train', {str(run_file)!r}, 'steps=8']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "could not write" in done.stderr
    assert "checkpoint-00000004" in done.stderr
    assert_same(good, final(run_file.parent / "run"))
    assert [path.name for path in sorted((run_file.parent / "run").glob("checkpoint-*"))] == ["checkpoint-00000004"]


def test_says_what_changed_when_it_goes_on(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig.load(run_file, ["steps=4"]))
    write_manifest(clips()[:2], run_file.parent / "clips.jsonl")
    assert main(["train", str(run_file), "learning_rate=1e-3"]) == 0
    printed = capsys.readouterr().out
    assert "changed  learning_rate: 0.01 -> 0.001" in printed
    assert "changed  clips: " in printed
    assert "changed  steps" not in printed, "with a constant schedule the number of steps decides nothing"
    assert read_log(run_file.parent / "run", "resumed")[-1]["changed"].keys() == {"learning_rate", "clips"}
    assert main(["train", str(run_file), "learning_rate=1e-3"]) == 0
    assert "8 steps are done, 8 asked for: nothing to do" in capsys.readouterr().out


def test_one_process_a_folder(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_process_in(run_file.parent / "run"):
        assert main(["train", str(run_file)]) == 2
    assert "another process trains into" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main(["train", str(run_file)]) == 2
    assert "is for 1 rank, here are 2; start 1" in capsys.readouterr().err


def test_sigterm_before_the_first_step_leaves_a_checkpoint(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Validation,
        "__call__",
        lambda self, step: os.kill(os.getpid(), signal.SIGTERM) or {"step": step, "loss": 1.0, "by_sigma": {}},
    )
    assert train(TrainConfig.load(run_file))["step"] == 0
    monkeypatch.undo()
    config = TrainConfig.load(run_file)
    train(config)
    train(replace(config, out=str(run_file.parent / "straight")))
    assert_same(final(run_file.parent / "run"), final(run_file.parent / "straight"))


def test_validation_does_not_depend_on_the_batch(run_file: Path) -> None:
    config = TrainConfig.load(run_file, ["steps=1"])
    train(config)
    other = plan_of(run_file.parent / "other.json", microbatch=1)
    train(replace(config, plan=str(other), out=str(run_file.parent / "other")))
    losses = [read_log(run_file.parent / name, "validation")[0]["loss"] for name in ("run", "other")]
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]
