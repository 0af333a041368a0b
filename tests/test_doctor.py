"""The law of the doctor: nothing is available that was not imported or run, and what is broken says why and what to do."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vchitect_fast import cli, doctor
from vchitect_fast.doctor import BROKEN, MISSING, OK, Finding


@pytest.fixture(scope="module")
def examined() -> list[Finding]:
    return doctor.examine()


def all_ok(examined: list[Finding], **states: str) -> dict[str, Finding]:
    """Findings as on a machine that has everything, but for the given states."""
    found = {finding.name: Finding(finding.name, OK, "here", finding.remedy) for finding in examined}
    for name, state in states.items():
        key = name.replace("_", " ")
        found[key] = Finding(key, state, "planted", found[key].remedy)
    return found


def ability(found: dict[str, Finding], part: str) -> doctor.Ability:
    [match] = [ability for ability in doctor.abilities(found) if ability.part == part]
    return match


def test_finds_what_this_environment_has(examined: list[Finding]) -> None:
    found = {finding.name: finding for finding in examined}
    for name in ("torch", "PyAV", "pyarrow", "diffusers", "transformers", "scenedetect"):
        assert found[name].state == OK, found[name]
    assert "h264" in found["PyAV"].detail
    assert sys.modules["torch"].__version__ in found["torch"].detail


def test_the_extension_is_tried_not_only_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = pytest.importorskip("vchitect_fast._C", reason="built with VCHITECT_FAST_EXT=0")
    assert extension.build_info()["compiler"] in doctor.look("C++ module", doctor._extension, "").detail

    class Lazy:
        def __init__(self, budget_bytes: int) -> None: ...
        def offload(self, address: int, num_bytes: int) -> int:
            return 1

        def prefetch(self, ticket: int, address: int) -> None: ...
        def wait(self, ticket: int) -> None: ...
        def release(self, ticket: int) -> None: ...

    monkeypatch.setattr(extension, "Engine", Lazy)
    finding = doctor.look("C++ module", doctor._extension, "")
    assert finding.state == BROKEN
    assert "came back different" in finding.detail


def test_a_library_that_is_not_there_is_missing() -> None:
    finding = doctor.look("novelty", doctor._version_of("no_such_library"), "pip install novelty")
    assert finding == Finding("novelty", MISSING, "not installed", "pip install novelty")


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ("raise OSError('libcudart.so.99: cannot open')", "OSError: libcudart.so.99: cannot open"),
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
    ],
)
def test_a_library_whose_import_fails_is_broken_with_the_reason(
    content: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_library.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.look("planted", doctor._version_of("planted_library"), "")
    assert finding.state == BROKEN
    assert detail in finding.detail


def test_a_gpu_that_torch_cannot_use_is_said(
    examined: list[Finding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'NVIDIA Planted 9000, 81559 MiB, 580.1'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = doctor.look("GPU", doctor._gpu, "")
    assert (gpu.state, gpu.detail) == (OK, "NVIDIA Planted 9000, 81559 MiB, 580.1")
    found = all_ok(examined, CUDA_in_torch=MISSING)
    assert not ability(found, "train on the GPU").works
    assert "torch" in ability(found, "train on the GPU").remedy
    assert "CPU" in ability(found, "train, sample").how


def test_a_driver_that_fails_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    finding = doctor.look("GPU", doctor._gpu, "")
    assert finding.state == BROKEN
    assert "exit status 9" in finding.detail


def test_abilities_follow_the_findings(examined: list[Finding]) -> None:
    assert all(ability.works for ability in doctor.abilities(all_ok(examined)))
    lacking = ability(all_ok(examined, diffusers=MISSING), "sd3 codec")
    assert (lacking.works, lacking.how, lacking.remedy) == (False, "diffusers is missing", "pip install -e '.[sd3]'")
    assert not ability(all_ok(examined, torch=BROKEN), "train, sample").works
    assert ability(all_ok(examined, scenedetect=MISSING), "curate").remedy == "pip install -e '.[curation]'"


def test_json_and_exit_code(
    examined: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: examined)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert [finding["name"] for finding in report["findings"]] == [finding.name for finding in examined]
    without_torch = list(all_ok(examined, torch=MISSING).values())
    monkeypatch.setattr(doctor, "examine", lambda: without_torch)
    assert cli.main(["doctor", "--json"]) == 1


def test_tables_end_with_commands_to_copy(examined: list[Finding]) -> None:
    found = all_ok(examined, wandb=MISSING)
    text = io.StringIO()
    doctor.show(list(found.values()), doctor.abilities(found), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert lines[-1].startswith("  pip install -e '.[wandb]'")
    for name in found:
        assert name in text.getvalue()
