"""How a run goes on: behind a torn checkpoint, with other ranks, one run a folder. tests/test_train.py has the rest.

pytest tests/test_resume.py; what ranks do is in resume_cases.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import resume_cases
import torch
from ranks import ranks
from resume_cases import NANO, plan_of_ranks
from test_train import final, run_file  # noqa: F401  a fixture

from vchitect_fast import checkpoint
from vchitect_fast.cli import main
from vchitect_fast.config import TrainConfig
from vchitect_fast.errors import UserError
from vchitect_fast.metrics import read_log
from vchitect_fast.parallel.mesh import Mesh
from vchitect_fast.plan import ShardSpec
from vchitect_fast.resume import check_supported, only_process_in, run_state


def test_a_torn_checkpoint_is_passed_over_said_and_written_again(
    run_file: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(run_file)]) == 0
    run = run_file.parent / "run"
    before = final(run)
    torn = next((run / "checkpoint-00000008").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["train", str(run_file)]) == 0
    said = f"{torn.name} has {torn.stat().st_size - 1} bytes instead of"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"changed checkpoint: checkpoint {run}/checkpoint-00000008: {said}" in printed
    assert "-> checkpoint-00000004" in printed
    [event] = read_log(run, "resumed")
    assert event["step"] == 4 and said in event["changed"]["checkpoint"]
    after = final(run)
    assert checkpoint.latest(run) == run / "checkpoint-00000008"
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_another_number_of_samples_is_another_run_and_another_sharding_is_not(tmp_path: Path) -> None:
    config = TrainConfig(manifest="clips.jsonl", plan="plan.json")
    one, dp, sp = ((1, 1, 1), (2, 2, 1), (1, 1, 4))
    decides = []
    for sizes in (one, dp, sp):
        plan, mesh = plan_of_ranks(sizes, ShardSpec()), Mesh(dict(zip(resume_cases.NAMES, sizes, strict=True)))
        decides.append(run_state(config, plan, NANO, [], mesh)["decides"])
    assert decides[0] == decides[2]
    assert decides[1]["samples_a_step"] != decides[0]["samples_a_step"]
    assert {name for name in decides[0] if decides[0][name] != decides[1][name]} == {"samples_a_step"}


def test_ranks_hold_the_folder_together_and_resume_together(tmp_path: Path) -> None:
    first, second = ranks(2).run("resume_cases:hold_and_resume", str(tmp_path))
    for found in (first, second):
        assert found["done"] == 1 and "is missing" in found["changed"]["checkpoint"]
        assert found["loaded"] == [1.0] * 8
    with only_process_in(tmp_path):
        for found in ranks(2).run("resume_cases:refused_to_hold", str(tmp_path)):
            assert f"another process trains into {tmp_path}" in found


def test_a_plan_without_its_ranks_is_refused() -> None:
    plan = plan_of_ranks((1, 1, 2), ShardSpec("frames", temporal="tokens"))
    with pytest.raises(UserError, match="one process shards no parameters, the Plan has fsdp_group 'global'"):
        check_supported(plan)
    with pytest.raises(UserError, match="does not do what the Plan's 3x32x32 sets: shard"):
        check_supported(replace(plan, mesh=dict.fromkeys(resume_cases.NAMES, 1), fsdp_group="none"))
    for said in ranks(2).run("resume_cases:supported", plan):
        assert said == "supported"
