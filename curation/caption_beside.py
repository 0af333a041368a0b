"""Captions without a model: a text file beside the video, VIDEO.txt, or one text for every clip.

The file holds one line for all clips of the video, or one line a clip in their order; an empty line is an empty caption.
Nothing is guessed: another number of lines, or bytes that are no UTF-8, are a UserError naming the file. A file without
any text is refused too. Blank lines after the last caption do not count.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from vchitect_fast.errors import UserError


def captions_beside(video: str | Path, num_clips: int, default: str = "") -> list[str]:
    """One caption a clip of `video` (a local path or a URL that fsspec opens); `default` for all where no file is."""
    content, beside = _read_beside(str(video))
    if content is None:
        return [default] * num_clips
    try:
        text = content.decode("utf-8-sig")  # Windows editors put a mark in front, which is no part of a caption
    except UnicodeDecodeError as error:
        raise UserError(f"{beside} must be UTF-8 text, got byte {error.start} that is not; save it as UTF-8.") from None
    # Not splitlines: U+2028 and its like may stand inside a caption.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while lines and not lines[-1] and (len(lines) != num_clips or not any(lines)):
        lines.pop()
    if len(lines) not in (1, num_clips):
        raise UserError(
            f"{beside} must have 1 line or {num_clips}, one a clip of {PurePosixPath(video).name}, got {len(lines)}; correct it."
        )
    return lines * num_clips if len(lines) == 1 else lines


def _read_beside(video: str) -> tuple[bytes | None, str]:
    """The bytes of the text file beside a video, or None where there is none, and its name."""
    if "://" not in video:
        beside: Any = Path(video).with_suffix(".txt")
        if not os.path.isfile(beside):  # False too where the longer suffix makes the name too long
            return None, str(beside)
        try:
            return beside.read_bytes(), str(beside)
        except OSError as error:
            raise UserError(f"cannot read the captions {beside} ({error.strerror}); make it readable.") from None
    import fsspec

    scheme, _, rest = video.partition("://")
    url = f"{scheme}://{PurePosixPath(rest).with_suffix('.txt')}"
    try:
        with fsspec.open(url, "rb") as file:
            return file.read(), url
    except FileNotFoundError:
        return None, url
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read the captions {url} ({error}); make it readable or remove it.") from None
