"""The bench of curation: what it runs works, CPU time of grandchildren counts, the ratio is to the faster reader.

pytest tests/benchmarks/test_bench_curation.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from real_video import bikes

from vchitect_fast.benchmarks import curation
from vchitect_fast.benchmarks.curation import OURS, WHOLE, Spent, commands, ratio, run_stages, spend, videos
from vchitect_fast.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bench is for Linux")


def test_the_shared_stages_find_the_clips_of_bikes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stages(str(bikes())) == 0
    assert capsys.readouterr().out == "6 clips, 0 duplicates\n"


def test_cpu_time_of_a_grandchild_counts_and_a_failure_is_named() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    spent = spend([sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"])
    assert spent.cpu_s >= 0.3 and spent.wall_s >= 0.3
    with pytest.raises(UserError, match="no such thing"):
        spend([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_the_ratio_is_to_the_faster_reader() -> None:
    found = {OURS: [Spent(3.0, 4.0), Spent(9.0, 4.0), Spent(3.0, 4.0)], WHOLE: [Spent(6.0, 8.0)],
             "scenedetect, pyav": [Spent(2.0, 5.0)], "scenedetect, opencv": [Spent(4.0, 2.0)]}  # fmt: skip
    assert ratio(found, OURS, "wall_s") == (1.5, "scenedetect, pyav")
    assert ratio(found, OURS, "cpu_s") == (2.0, "scenedetect, opencv")
    assert ratio(found, WHOLE, "cpu_s")[0] == 4.0


def test_files_are_made_by_stream_copy_and_a_wrong_filter_is_refused(tmp_path: Path) -> None:
    (made,) = videos(tmp_path, "640x272, 1 min").items()
    shape, (path, seconds) = made
    assert shape == "640x272, 1 min" and seconds == 60.0
    assert path.stat().st_size == pytest.approx(6 * bikes().stat().st_size, rel=0.01)  # nothing was recoded
    assert set(commands(path, tmp_path)) == {OURS, WHOLE, "scenedetect, pyav", "scenedetect, opencv"}
    with pytest.raises(UserError, match="no shape contains '9999'"):
        videos(tmp_path, "9999")
    assert curation.GOAL == 1.5
