"""selective_ratio where a Plan is made: `autotune plan --selective-ratio`, its two readings, inputs offloaded, memory predicted.

pytest tests/offload/test_selective_ratio.py; the machine is made up.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_device import cluster, device
from offloading import ALL, INPUT, work_of

from vchitect_fast.architecture import preset
from vchitect_fast.autotune.memory import step_memory
from vchitect_fast.cli import main
from vchitect_fast.offload.policy import offload_budget_bytes
from vchitect_fast.plan import Plan, Policy
from vchitect_fast.workload import Workload

COMMAND = [
    "autotune",
    "plan",
    "--model",
    "vchitect-tiny",
    "--shapes",
    "8x96x64",
    "--text-tokens",
    "16",
    "--dtype",
    "float32",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cluster().save("cluster.json")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        (["--selective-ratio", "0.25"], [0, 1, 3]),
        (["--selective-ratio", "0.25", "--ratio-means", "kept"], [0, 1, 3]),
        (["--selective-ratio", "0.25", "--ratio-means", "recomputed"], [1]),
    ],
)
def test_both_readings(folder: Path, options: list[str], recomputed: list[int]) -> None:
    assert main([*COMMAND, *options]) == 0
    policy = Plan.load("plan.json").entries[0].policy
    assert [i for i, item in enumerate(policy) if item != Policy.keep()] == recomputed
    assert all(policy[i] == Policy.recompute() for i in recomputed)


def test_inputs_of_recomputed_blocks_go_to_host_memory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--selective-ratio", "0", "--offload-inputs"]) == 0
    [entry] = Plan.load("plan.json").entries
    config = preset("vchitect-tiny")
    assert entry.policy == (INPUT,) * config.num_layers
    work = Workload(config, entry.video_shape, entry.microbatch, 16)
    assert entry.offload_bytes == offload_budget_bytes(work, entry.policy, "float32") > 0
    assert "copies to host memory not included" in entry.predicted.confidence
    capsys.readouterr()
    assert main([*COMMAND, "--offload-inputs"]) == 2
    assert "--offload-inputs needs --selective-ratio" in capsys.readouterr().err


def test_memory_of_the_usual_policies_is_what_it_was() -> None:
    config = preset("vchitect-tiny")
    work = work_of("8x96x64", 2, config, 16)
    for number in range(config.num_layers + 1):
        policy = (Policy.recompute(),) * number + (Policy.keep(),) * (config.num_layers - number)
        by_number = step_memory(work, device(), "float32", num_recomputed=number, accumulation=1)
        by_policy = step_memory(work, device(), "float32", num_recomputed=number, accumulation=1, policy=policy)
        # the first block's text is one row set a sample, which the older formula counts once a frame
        expanded = 4 * config.hidden_dim * (work.text_rows - work.batch * work.num_text_tokens)
        assert 0 <= by_number.peak_bytes - by_policy.peak_bytes <= expanded


def test_offload_frees_a_gpu_and_on_a_cpu_the_pool_is_counted() -> None:
    config = preset("vchitect-tiny")
    work, policy = work_of("8x96x64", 2, config, 16), (ALL,) * config.num_layers
    moved = offload_budget_bytes(work, policy, "float32")
    gpu, cpu = device(kind="cuda"), device()
    peaks = [
        step_memory(work, one, "float32", num_recomputed=0, accumulation=1, policy=policy).saved_bytes
        for one in (gpu, cpu)
    ]
    assert peaks[1] - peaks[0] == moved
    plain = step_memory(
        work, gpu, "float32", num_recomputed=0, accumulation=1, policy=(Policy.keep(),) * config.num_layers
    )
    assert peaks[0] < plain.saved_bytes
