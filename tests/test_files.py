"""Files are whole or not there, also when a block fails and when two processes write the same name.

pytest tests/test_files.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vchitect_fast.files import whole_file


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with whole_file(path) as partial:
            partial.write_text("ne")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("first")
        code = f"from vchitect_fast.files import write_text; write_text({str(path)!r}, 'second')"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]
