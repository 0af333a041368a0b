"""`make gpu` with made-up stages: which are begun, what ends a stage, what stops no other, going on where it stopped.

pytest tests/benchmarks/test_bench_gpu.py
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from vchitect_fast.benchmarks import gpu
from vchitect_fast.benchmarks.gpu import FAILED, HELD, NO_GPU, NOT_REACHED, REHEARSED, SHORT, STAGES, Stage, run_all
from vchitect_fast.benchmarks.record import load


def says(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def stage(name: str, *codes: str, expected_s: int = 1, limit_s: int = 30, **more) -> Stage:
    return Stage(name, "made up", tuple(says(code) for code in codes), expected_s, limit_s, **more)


GOOD = stage("good", "print('one'); print('two pass')")
SHORT_ONE = stage("short", "import sys; print('2 %'); sys.exit(1)")
BAD = stage("bad", "1 / 0", "print('runs all the same')")
# What it started must go with it: the child would write after a second.
HANGS = stage(
    "hangs",
    "import subprocess, sys, time; print('begun', flush=True);"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1); open(\"late\", \"w\")']);"
    "time.sleep(60)",
    limit_s=1,
)


def states(
    stages: list[Stage], out: Path, *, minutes: float = 5, tiny: bool = False, again: bool = False
) -> dict[str, str]:
    return {one.name: one.state for one in run_all(stages, out, minutes, tiny=tiny, again=again)}


def test_a_stage_that_fails_hangs_or_falls_short_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    begin = time.monotonic()
    found = run_all([BAD, HANGS, SHORT_ONE, GOOD], tmp_path, 5, tiny=False, again=False)
    assert time.monotonic() - begin < 20  # the 60 s of the one that hangs were not waited for
    assert [one.state for one in found] == [FAILED, FAILED, SHORT, HELD]
    assert found[0].says == "runs all the same" and "ZeroDivisionError" in (tmp_path / "bad.log").read_text()
    assert found[1].says == "over its 1 s; begun" and 1 <= found[1].took_s < 10
    assert (found[2].says, found[3].says) == ("2 %", "two pass")
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


def test_tests_fail_and_do_not_fall_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_tests", lambda folder: ["one", "two"])
    tests = Stage(
        "tests", "made up", ((*says("import sys; print(*sys.argv[1:]); sys.exit(1)"), "{tests}"),), 1, 9, (), "t"
    )
    [found] = run_all([tests], tmp_path, 5, tiny=False, again=False)
    assert (found.state, found.says) == (FAILED, "one two")


def test_what_has_an_outcome_is_not_run_again(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    counting = stage("counting", f"open({str(counts)!r}, 'a').write('x')")
    for again, number in ((False, 1), (False, 1), (True, 2)):
        assert states([counting], tmp_path, again=again) == {"counting": HELD}
        assert len(counts.read_text()) == number
    (tmp_path / "counting.json").unlink()
    states([counting], tmp_path)
    assert len(counts.read_text()) == 3


def test_a_stage_begins_when_it_fits_into_the_minutes(tmp_path: Path) -> None:
    long, quick = stage("long", "", expected_s=100), stage("quick", "", expected_s=1)
    assert states([long, quick], tmp_path, minutes=0.5) == {"long": NOT_REACHED, "quick": HELD}
    assert not (tmp_path / "long.json").exists()  # so that it is begun another time
    assert states([long, quick], tmp_path, minutes=5) == {"long": HELD, "quick": HELD}
    assert states([GOOD], tmp_path, minutes=0, tiny=True) == {"good": NOT_REACHED}


def test_a_stage_does_not_outlive_the_minutes(tmp_path: Path) -> None:
    sleeps = stage("sleeps", "import time; time.sleep(60)")
    [found] = run_all([sleeps], tmp_path, 2 / 60, tiny=False, again=False)
    assert found.state == FAILED and found.took_s < 10


def test_a_rehearsal_runs_the_tiny_words_and_holds_nothing(tmp_path: Path) -> None:
    other = stage("other", "raise SystemExit(3)", tiny=(says("print('tiny')"), says("raise SystemExit(1)")))
    same = stage("same", "import sys; print(sys.argv[1:])")
    broken = stage("broken", "raise SystemExit(3)")
    found = run_all([other, same, broken], tmp_path, 5, tiny=True, again=False)
    assert [one.state for one in found] == [REHEARSED, REHEARSED, FAILED]
    assert found[1].says == "['--tiny']"


def test_what_is_not_here_is_named(tmp_path: Path) -> None:
    lacking = stage("lacking", "", needs="no_such_module")
    [found] = run_all([lacking], tmp_path, 5, tiny=False, again=False)
    assert (found.state, found.says) == (NOT_REACHED, "no_such_module is not here")


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out
    assert printed.count(NO_GPU) == len(STAGES) and "Nothing was measured: torch sees no GPU here." in printed
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_became_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: True)
    monkeypatch.setattr(gpu, "STAGES", (GOOD, SHORT_ONE))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "2 stages: 1 held, 1 falls short" in captured.out and "good: held after" in captured.err
    took = {record.provider: record.median_s for record in load(tmp_path / "stages.jsonl")}
    assert took.keys() == {"good", "short"} and all(0 < seconds < 30 for seconds in took.values())
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert gpu.main(["--only", "none"]) == 2
    assert "expected stages among good, short, got none" in capsys.readouterr().err
    assert gpu.main(["--list"]) == 0 and "about 0 minutes on an H100" in capsys.readouterr().out


def test_the_real_stages() -> None:
    """Names are files, every script is there, no test with a GPU part is left out or run twice."""
    names = [one.name for one in STAGES]
    assert len(set(names)) == len(names) and all(one.expected_s < one.limit_s for one in STAGES)
    for one in STAGES:
        for tiny in (False, True):
            for words in one.words(Path("out"), tiny):
                assert "{" not in " ".join(words[1:3]) and "{out}" not in " ".join(words)
                module = words[words.index("-m") + 1] if "-m" in words else "json"
                assert find_spec(module) is not None, words
    marked = [path for path in (gpu.ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    run = [name for one in STAGES if one.tests for name in gpu.gpu_tests(one.tests)]
    assert sorted(run) == sorted(str(path.relative_to(gpu.ROOT)) for path in marked) and len(run) > 10
    assert json.dumps(names)
