"""Files and folders are whole or not there: when a block fails, when two processes write, when one is killed half way.

pytest tests/test_files.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vchitect_fast.errors import UserError
from vchitect_fast.files import whole_file, whole_folder, write_text


def killed(code: str, path: Path) -> None:
    """Run code of another process, which knows `path` and `die()`, and see that it was killed."""
    head = "import os, sys; from pathlib import Path; from vchitect_fast.files import *; path = Path(sys.argv[1])\n"
    head += "def die(*_): os.kill(os.getpid(), 9)\n"
    ended = subprocess.run([sys.executable, "-P", "-c", head + code, str(path)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def old_folder(path: Path) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text("old")
    (path / "inner" / "only-old.txt").write_text("old")
    return path


def content(folder: Path) -> dict[str, str]:
    return {str(item.relative_to(folder)): item.read_text() for item in sorted(folder.rglob("*")) if item.is_file()}


OLD = {"a.txt": "old", "inner/only-old.txt": "old"}


def test_a_file_comes_into_being_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.json"
    with whole_file(path) as partial:
        assert partial.suffix == ".json"  # writers that read the format from the name
        partial.write_text("{}")
        assert not path.exists()
    assert content(path.parent) == {"a.json": "{}"}
    write_text(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"


def test_a_folder_takes_the_place_of_the_whole_old_one(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "model")
    with whole_folder(path) as partial:
        (partial / "deep" / "er").mkdir(parents=True)
        (partial / "deep" / "er" / "b.txt").write_text("new")
        assert content(path) == OLD
    assert content(tmp_path) == {"model/deep/er/b.txt": "new"}
    assert os.listdir(tmp_path) == ["model"]


def test_folders_beside_it_with_names_like_ours_are_left_alone(tmp_path: Path) -> None:
    for name in ("model.old", "model.partial"):
        old_folder(tmp_path / name)
    for _ in range(2):
        with whole_folder(tmp_path / "model") as partial:
            (partial / "b.txt").write_text("new")
    assert content(tmp_path / "model") == {"b.txt": "new"}
    assert content(tmp_path / "model.old") == content(tmp_path / "model.partial") == OLD


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(
        UserError, match=r"could not write .*a\.txt \(.*File exists.*\); free some space or choose another"
    ):
        write_text(tmp_path / "file" / "a.txt", "new")

    def full(self: Path, *_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("kind", [whole_file, whole_folder])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, kind: Callable[[Path], AbstractContextManager[Path]], error: type[BaseException]
) -> None:
    folder = old_folder(tmp_path / "model")
    path = folder / "a.txt" if kind is whole_file else folder

    def write() -> None:
        with kind(path) as partial:
            (partial if kind is whole_file else partial / "a.txt").write_text("ne")
            assert content(folder).items() >= OLD.items()
            raise error

    with pytest.raises(error):
        write()
    assert content(tmp_path) == {f"model/{name}": text for name, text in OLD.items()}
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), whole_file(path):
        pass
    assert content(tmp_path) == {"a.txt": "old"}


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as partial:
        partial.write_text("first")
        code = f"from vchitect_fast.files import write_text; write_text({str(path)!r}, 'second')"
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed("with whole_file(path) as partial: partial.write_text('ne'); die()", path)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_kill_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "model")
    killed("with whole_folder(path) as partial: (partial / 'left.txt').write_text('ne'); die()", path)
    assert content(path) == OLD
    with whole_folder(path) as partial:
        assert content(partial) == {}  # what the killed one had written is not mixed in
        (partial / "b.txt").write_text("new")
    assert content(tmp_path) == {"model/b.txt": "new"}


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    path = old_folder(tmp_path / "model")
    code = """
rename = Path.rename
Path.rename = lambda self, target: die() if self.name.endswith(".partial") else rename(self, target)
with whole_folder(path) as partial: (partial / "b.txt").write_text("new")
"""
    killed(code, path)
    assert not path.exists()  # the worst moment there is
    with whole_folder(path) as partial:
        assert content(path) == OLD
        (partial / "c.txt").write_text("newer")
    assert content(tmp_path) == {"model/c.txt": "newer"}


def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_folder(tmp_path / "model")
    rename = Path.rename

    def refuse_partial(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(PermissionError), whole_folder(path) as partial:
        (partial / "b.txt").write_text("new")
    assert content(tmp_path) == {f"model/{name}": text for name, text in OLD.items()}
