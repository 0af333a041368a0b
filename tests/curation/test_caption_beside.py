"""Captions from the text file beside a video: one for all, one a clip, the default, and every refusal.

pytest tests/curation/test_caption_beside.py
"""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from vchitect_fast.curation.caption_beside import captions_beside
from vchitect_fast.errors import UserError


@pytest.mark.parametrize(
    ("text", "num_clips", "expected"),
    [
        ("for all\n", 3, ["for all"] * 3),
        ("for all", 1, ["for all"]),
        ("a\nb\nc\n", 3, ["a", "b", "c"]),
        ("a\r\nb\r\nc", 3, ["a", "b", "c"]),
        ("  a \n\tb\n", 2, ["a", "b"]),
        ("a\n\nc\n", 3, ["a", "", "c"]),
        ("\nb\n", 2, ["", "b"]),  # the first clip has none; not "b" for both
        ("a\n\n", 2, ["a", ""]),
        ("a\nb\n\n\n", 2, ["a", "b"]),
        ("one\n\n\n", 6, ["one"] * 6),
        ("a\u2028still a\nb\x85\n", 2, ["a\u2028still a", "b"]),
        ("\ufeffa\nb\n", 2, ["a", "b"]),
        ("ein Fahrrad f\u00e4hrt\n", 1, ["ein Fahrrad f\u00e4hrt"]),
        ("for all\n", 0, []),
    ],
)
@pytest.mark.parametrize("where", ["local", "url"])
def test_lines_become_captions(tmp_path: Path, text: str, num_clips: int, expected: list[str], where: str) -> None:
    if where == "local":
        (tmp_path / "ride.v2.txt").write_bytes(text.encode())
        assert captions_beside(tmp_path / "ride.v2.mp4", num_clips, "not this") == expected
        assert captions_beside(str(tmp_path / "ride.v2.mp4"), num_clips, "not this") == expected
    else:
        with fsspec.open("memory://captions/ride.v2.txt", "wb") as file:
            file.write(text.encode())
        assert captions_beside("memory://captions/ride.v2.mp4", num_clips, "not this") == expected


def test_without_a_file_the_default_is_everyones(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("not this")
    assert captions_beside(tmp_path / "ride.mp4", 2, "bikes") == ["bikes", "bikes"]
    assert captions_beside("memory://nothing/ride.mp4", 2, "bikes") == ["bikes", "bikes"]
    assert captions_beside(tmp_path / "ride.mp4", 2) == ["", ""]


@pytest.mark.parametrize(
    ("content", "num_clips", "message"),
    [
        (b"one\ntwo\n", 6, r"ride.txt must have 1 line or 6, one a clip of ride.mp4, got 2; correct it"),
        (b"a\nb\nc\n", 2, "1 line or 2, .* got 3"),
        (b"a\n\nc\n", 2, "got 3"),  # a blank line inside is a clip without a caption, not nothing
        (b"", 2, "got 0"),
        (b" \n\n", 2, "got 0"),
        (b"", 1, "got 0"),
        ("f\u00e4hrt".encode("latin-1"), 1, "ride.txt must be UTF-8 text, got byte 1 that is not"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: bytes, num_clips: int, message: str) -> None:
    (tmp_path / "ride.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        captions_beside(tmp_path / "ride.mp4", num_clips, "not this")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "ride.txt").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot read the captions .*ride.txt \(Permission denied\)"):
        captions_beside(tmp_path / "ride.mp4", 1)
    with pytest.raises(UserError, match=r"cannot read the captions nonsense://a/ride.txt"):
        captions_beside("nonsense://a/ride.mp4", 1)
