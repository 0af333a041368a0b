"""Members of tars: read where they lie, by name; what is hostile, double or cut short is refused with its reason.

pytest tests/test_members.py
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from vchitect_fast import members

LINKS = {"link.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "device.mp4": tarfile.CHRTYPE, "fifo.mp4": tarfile.FIFOTYPE}  # fmt: skip


def write_tar(path: Path, files: list[tuple[str, bytes]], links: dict[str, bytes] | None = None) -> Path:
    """A tar of files by name, in order, and of links and devices by type."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def read(path: Path) -> bytes:
    with members.opened(path) as file:
        assert not isinstance(file, str)
        return file.read()


def test_a_member_is_its_bytes_and_seeks_within_them(tmp_path: Path) -> None:
    files = [("a.mp4", b"0123456789"), ("./deep/b.json", b"{}"), ("n" * 150 + ".mp4", b"long"), ("empty.txt", b"")]
    tar = write_tar(tmp_path / "s.tar", files)
    assert [read(tar / name) for name in ("a.mp4", "deep/b.json", "n" * 150 + ".mp4", "empty.txt")] == [
        b"0123456789", b"{}", b"long", b"",
    ]  # fmt: skip
    with members.opened(tar / "a.mp4") as file:
        assert not isinstance(file, str)
        assert (file.seek(-3, os.SEEK_END), file.read(), file.read()) == (7, b"789", b"")
        assert (file.seek(2), file.seek(2, os.SEEK_CUR), file.read(2), file.tell()) == (2, 4, b"45", 6)
        assert (file.seek(99), file.read()) == (99, b"")
        with pytest.raises(OSError, match="before the beginning"):
            file.seek(-1)
    assert members.stamp(tar / "a.mp4") == (10, tar.stat().st_mtime_ns)
    where = members.located(tar / "a.mp4")
    assert where is not None
    assert tar.read_bytes()[where[1] : where[1] + where[2]] == b"0123456789"
    assert list(tmp_path.iterdir()) == [tar], "nothing is extracted"


def test_a_real_file_in_a_folder_named_like_a_tar_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "s.tar").mkdir()
    (tmp_path / "s.tar" / "a.mp4").write_bytes(b"xyz")
    path = tmp_path / "s.tar" / "a.mp4"
    with members.opened(path) as file:
        assert file == str(path)
    assert members.split(path) is members.located(path) is None
    assert members.stamp(path)[0] == 3
    assert members.split(tmp_path / "s.tar") is None


def test_a_tar_that_was_written_again_is_scanned_again(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "s.tar", [("a.mp4", b"old")])
    assert read(tar / "a.mp4") == b"old"
    write_tar(tar, [("first.txt", b"1" * 600), ("a.mp4", b"newer")])
    assert read(tar / "a.mp4") == b"newer"


@pytest.mark.parametrize(
    ("name", "asked"),
    [("../a.mp4", "../a.mp4"), ("/etc/a.mp4", "etc/a.mp4"), ("x/../../a.mp4", "x/../../a.mp4"), ("..\\a.mp4", "..\\a.mp4")],
)  # fmt: skip
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: str, asked: str) -> None:
    tar = write_tar(tmp_path / "s.tar", [("good.mp4", b"good"), (name, b"bad")])
    with pytest.raises(OSError) as caught:
        read(tar / asked)
    assert caught.value.strerror and caught.value.strerror.startswith("s.tar ")
    [reason] = members.contents(tar).refused.values()
    assert "would leave its folder" in reason
    assert read(tar / "good.mp4") == b"good"


@pytest.mark.parametrize("name", LINKS)
def test_links_and_devices_are_refused(tmp_path: Path, name: str) -> None:
    tar = write_tar(tmp_path / "s.tar", [("good.mp4", b"good")], LINKS)
    with pytest.raises(OSError) as caught:
        read(tar / name)
    assert "a link or a device" in str(caught.value.strerror)
    assert list(members.contents(tar).members) == ["good.mp4"]


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "s.tar", [("a.mp4", b"1"), ("b.mp4", b"b"), ("./a.mp4", b"2"), ("a.mp4", b"3")])
    with pytest.raises(OSError) as caught:
        read(tar / "a.mp4")
    assert caught.value.strerror == "s.tar holds it twice"
    assert read(tar / "b.mp4") == b"b"


def test_a_tar_that_is_cut_short_gives_what_lies_whole_in_front(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "w.tar", [("a.mp4", b"a" * 700), ("b.mp4", b"b" * 700)]).read_bytes()
    outcomes = set()
    for size in range(100, 512 * 6 + 1, 100):  # the two members end at 512 * 6
        tar = tmp_path / f"{size}.tar"
        tar.write_bytes(whole[:size])
        for name, content, end in (("a.mp4", b"a", 1212), ("b.mp4", b"b", 512 * 4 + 188)):
            try:
                got = read(tar / name)
                assert got == content * 700
                assert size >= end
                outcomes.add("whole")
            except OSError as error:
                outcomes.add("short" if "short" in str(error.strerror) else "no tar")
        if size >= 600:
            assert members.contents(tar).damage
    assert outcomes == {"whole", "short", "no tar"}
    assert not members.contents(tmp_path / "w.tar").damage


def test_garbage_between_members_is_damage_and_not_the_end(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"b")]).read_bytes())
    content[1024 + 30] ^= 0x55  # in the header of b.mp4
    (tmp_path / "s.tar").write_bytes(content)
    assert read(tmp_path / "s.tar" / "a.mp4") == b"a"
    with pytest.raises(OSError) as caught:
        read(tmp_path / "s.tar" / "b.mp4")
    assert caught.value.strerror == "s.tar is damaged after 1 members (no end mark)"


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    with pytest.raises(OSError) as caught:
        read(tmp_path / "s.tar" / "a.mp4")
    assert "no uncompressed tar" in str(caught.value.strerror)
