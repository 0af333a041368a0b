"""Clips of WebDataset tars made anywhere: found, indexed once, trained on like files; what is bad is left out and named.

pytest tests/test_clips.py
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_video import bikes, truncate

from vchitect_fast import clips as clips_module
from vchitect_fast import webdataset
from vchitect_fast.clips import INDEX_FOLDER, read_clips
from vchitect_fast.data import VideoData
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import Clip, write_manifest
from vchitect_fast.model.text import load_text_encoder
from vchitect_fast.model.vae import load_codec
from vchitect_fast.shapes import VideoShape
from vchitect_fast.video import write_video

VIDEO = {"start": 0.0, "end": 1.6, "num_frames": 16, "width": 64, "height": 32, "fps": 10.0}
PICTURE = {"start": 0.0, "end": 0.0, "num_frames": 1, "width": 48, "height": 64, "fps": 1.0}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """16 frames 64x32 at 10 a second, each of its own grey."""
    path = tmp_path_factory.mktemp("video") / "v.mp4"
    write_video(path, (torch.arange(16) * 15).to(torch.uint8)[:, None, None, None].expand(16, 32, 64, 3), 10.0)
    return path.read_bytes()


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A JPEG, 48x64."""
    content = io.BytesIO()
    Image.fromarray(np.linspace(0, 255, 64 * 48 * 3).reshape(64, 48, 3).astype(np.uint8)).save(content, "JPEG")
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, bytes] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def facts(clip: Clip) -> dict[str, Any]:
    return {name: value for name, value in asdict(clip).items() if name not in ("path", "caption")}


@pytest.fixture
def shards(tmp_path: Path, video: bytes, picture: bytes) -> Path:
    """Two tars: videos with and without stated sizes, a thumbnail, a picture, and what is no sample."""
    stated = {"width": 64, "height": 32, "num_frames": 16, "fps": 10, "caption": "not this", "key": "x"}
    write_tar(
        tmp_path / "in/s-000.tar",
        {
            "./a.mp4": video, "./a.txt": " a caption, ü\n".encode(), "./a.json": json.dumps(stated).encode(), "a.jpg": picture,
            "sub/b.x.MP4": video, "sub/b.json": b'{"text": "from json", "width": "64", "fps": 10}', "README.md": b"hello",
        },
    )  # fmt: skip
    write_tar(tmp_path / "in/s-001.tar", {"p.jpeg": picture, "p.txt": b"picture", "d.mp4": video})
    return tmp_path / "in"


def test_a_folder_of_tars_is_a_manifest(shards: Path) -> None:
    clips = read_clips(shards)
    assert [clip.path.relative_to(shards).as_posix() for clip in clips] == [
        "s-000.tar/a.mp4", "s-000.tar/sub/b.x.MP4", "s-001.tar/p.jpeg", "s-001.tar/d.mp4",
    ]  # fmt: skip
    assert [clip.caption for clip in clips] == ["a caption, ü", "from json", "picture", ""]
    assert [facts(clip) for clip in clips] == [
        VIDEO,
        VIDEO,
        PICTURE,
        VIDEO,
    ]
    for name in (f"{shards}/*.tar", f"{shards}/s-{{000..001}}.tar", f"{shards.parent}/**/s-00?.tar"):
        assert read_clips(name) == clips, name
    assert read_clips(shards / "s-001.tar") == clips[2:]
    write_manifest(clips, shards / "m.jsonl")
    assert read_clips(shards / "m.jsonl") == clips


def test_a_tar_is_read_once_and_again_when_it_changed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, probed = [], []
    for module, name, seen in ((clips_module, "samples", read), (webdataset, "probe", probed)):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, *rest, _real=real, _seen=seen: (_seen.append(path.name), _real(path, *rest))[1]
        )
    first = read_clips(shards)
    assert (read, probed) == (["s-000.tar", "s-001.tar"], ["b.x.MP4", "p.jpeg", "d.mp4"]), "a.mp4 states its sizes"
    assert read_clips(shards) == first
    assert len(read) == 2
    (shards / "s-001.tar").touch()
    assert read_clips(shards) == first
    assert read == ["s-000.tar", "s-001.tar", "s-001.tar"]
    (shards / INDEX_FOLDER / "s-000.tar.json").write_text('{"version": 1, "st')
    assert read_clips(shards) == first, "a damaged index is made again"
    assert sorted(path.name for path in (shards / INDEX_FOLDER).iterdir()) == ["s-000.tar.json", "s-001.tar.json"]
    read.clear()
    for _ in range(2):
        assert read_clips(shards, tmp_path / "cache") == first
    assert read == ["s-000.tar", "s-001.tar"]
    assert len(list((tmp_path / "cache" / "tars").iterdir())) == 2


def opened(clips: list[Clip], shapes: dict[VideoShape, int]) -> VideoData:
    text_encoder = load_text_encoder("hash", width=24, pooled_width=20)
    return VideoData(
        clips, shapes, seed=3, fps=5.0, codec=load_codec("dct"), cache=None, device="cpu", text_encoder=text_encoder
    )


def test_training_reads_tars_and_files_alike_pictures_included(
    shards: Path, tmp_path: Path, video: bytes, picture: bytes
) -> None:
    tars, files = read_clips(shards), []
    for number, clip in enumerate(tars):
        path = tmp_path / f"{number}{clip.path.suffix}"
        path.write_bytes(picture if clip.num_frames == 1 else video)
        files.append(replace(clip, path=path))
    batches = {VideoShape(1, 48, 64): 1, VideoShape(4, 64, 32): 2}
    with opened(tars, batches) as one, opened(files, batches) as other:
        seen = set()
        for step in range(4):
            a, b = one.batch(step), other.batch(step)
            seen.add(a.shape)
            assert [w.clip.caption for w in a.windows] == [w.clip.caption for w in b.windows]
            assert torch.equal(a.latents, b.latents)
        assert seen == set(batches)
        assert one.skipped == other.skipped == {}


def test_what_is_bad_is_left_out_and_named(
    tmp_path: Path, video: bytes, picture: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    members = {
        "good.mp4": video, "no_json.mp4": video, "no_json.json": b"{", "list.mp4": video, "list.json": b"[1]",
        "no_utf8.mp4": video, "no_utf8.txt": b"\xff", "garbage.mp4": b"no video", "cut.mp4": video[: len(video) // 3],
        "../outside.mp4": video, "/abs.mp4": video, "huge.jpg": picture[:30],
    }  # fmt: skip
    write_tar(
        tmp_path / "a.tar",
        members,
        {"link.mp4": tarfile.SYMTYPE, "hard.mp4": tarfile.LNKTYPE, "dev.mp4": tarfile.CHRTYPE},
    )
    write_tar(tmp_path / "twice.tar", {"x.mp4": video, "x.webm": video})
    whole = write_tar(tmp_path / "whole.tar", {"first.mp4": video, "second.mp4": video * 20})
    truncate(whole, tmp_path / "short.tar", 0.6)
    whole.unlink()
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "folder.tar").mkdir()
    with caplog.at_level(logging.WARNING, logger="vchitect_fast.clips"):
        for _ in range(2):  # also when the index is known
            caplog.clear()
            found = [clip.path.relative_to(tmp_path).as_posix() for clip in read_clips(tmp_path)]
            assert found == ["a.tar/good.mp4", "short.tar/first.mp4"]
            said = {Path(record.message.split()[0]).name: record.message for record in caplog.records}
            assert set(said) == {"a.tar", "twice.tar", "short.tar", "none.tar", "folder.tar"}
            assert "11 samples are left out" in said["a.tar"]
            assert "two videos of the key 'x'" in said["twice.tar"]
            assert "cut short" in said["short.tar"]
            assert "no uncompressed tar" in said["none.tar"]
    index = json.loads((tmp_path / INDEX_FOLDER / "a.tar.json").read_text())["left_out"]
    for name, reason in {
        "no_json.mp4": "is not JSON", "list.mp4": "must hold a JSON object, got list", "no_utf8.mp4": "must be UTF-8",
        "garbage.mp4": "cannot open it as a video", "../outside.mp4": "would leave its folder", "/abs.mp4": "would leave",
        "link.mp4": "a link or a device", "hard.mp4": "a link or a device", "dev.mp4": "a link or a device",
    }.items():  # fmt: skip
        assert reason in index[name]
    assert {"cut.mp4", "huge.jpg"} <= index.keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar") == [INDEX_FOLDER], (
        "nothing is extracted"
    )


def test_what_cannot_be_read_at_all_is_refused(tmp_path: Path, video: bytes) -> None:
    with pytest.raises(UserError, match="or .tar files as the manifest, found none at"):
        read_clips(tmp_path)
    with pytest.raises(UserError, match="or .tar files as the manifest, found none at"):
        read_clips(tmp_path / "absent.tar")
    write_tar(tmp_path / "s-0.tar", {"a.txt": b"a"})
    with pytest.raises(UserError, match=r"1 of the 2 tars of .* are absent, first .*s-1.tar"):
        read_clips(str(tmp_path / "s-{0..1}.tar"))
    with pytest.raises(UserError, match="no clip in the 1 tars .*they hold no video and no image"):
        read_clips(tmp_path)
    write_tar(tmp_path / "s-0.tar", {"a.mp4": b"a"})
    with pytest.raises(UserError, match=r"no clip in the 1 tars .*1 samples are left out: 'a.mp4' cannot open it"):
        read_clips(tmp_path)
    write_tar(tmp_path / "s-0.tar", {"a.mp4": video})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the index of .*set cache= .*curate index"):
        read_clips(tmp_path, tmp_path / "file")


def test_a_bar_is_shown_where_it_takes_long(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    read_clips(shards / "s-000.tar")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(clips_module, "PATIENCE_S", -1.0)
    read_clips(shards / "s-001.tar")
    assert "indexing tars" in capsys.readouterr().err


def test_bikes_states_what_its_probe_finds(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", {"bikes.mp4": bikes().read_bytes()})
    [clip] = read_clips(tmp_path)
    assert facts(clip) == {"start": 0.0, "end": 10.0, "num_frames": 250, "width": 640, "height": 272, "fps": 25.0}
