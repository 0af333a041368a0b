"""Shards: what WebDataset readers expect, an index that training reads, and tars from elsewhere, hostile ones refused.

pytest tests/curation/test_shards.py
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_video import bikes, bikes_clips, truncate

from vchitect_fast.curation import shards
from vchitect_fast.curation.encoders import find_ffmpeg, run_ffmpeg
from vchitect_fast.curation.export import export
from vchitect_fast.curation.shards import run_index
from vchitect_fast.errors import UserError
from vchitect_fast.manifest import COLUMNS, read_manifest, read_rows, write_manifest
from vchitect_fast.video import read_video


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bikes.mp4 at 160x68; the same frames at the same times."""
    target = tmp_path_factory.mktemp("small") / "small.mp4"
    assert run_ffmpeg(find_ffmpeg(), ["-i", str(bikes()), "-vf", "scale=160:68", "-crf", "8", str(target)]) == ""
    return target


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    rows = [asdict(clip) | {"path": str(small), "clip": f"c-{k}", "s.x": 0.5 * k, "s.list": [k]} for k, clip in enumerate(bikes_clips())]  # fmt: skip
    write_manifest(rows, folder / "clips.parquet")
    return folder


def write_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **links: bytes) -> Path:
    """A tar of files in order, then of links and devices: name -> type."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    return path


def test_a_shard_holds_video_row_and_caption_of_each_key(tmp_path: Path, curated: Path) -> None:
    export(curated, str(tmp_path), form="shards", max_shard_clips=4)
    rows = read_rows(tmp_path / "index.parquet")
    found: list[str] = []
    for number, keys in enumerate([range(4), range(4, 6)]):
        with tarfile.open(tmp_path / f"clips-{number:06d}.tar") as tar:
            names = tar.getnames()
            assert names == [f"c-{k}.{end}" for k in keys for end in ("mp4", "json", "txt")]
            for k in keys:
                text = json.loads(tar.extractfile(f"c-{k}.json").read())  # type: ignore[union-attr]
                assert text == rows[k]
                assert tar.extractfile(f"c-{k}.txt").read() == f"shot {k}".encode()  # type: ignore[union-attr]
            found += names
        assert read_rows(tmp_path / f"clips-{number:06d}.jsonl") == [rows[k] for k in keys], "a shard's own manifest"
    assert [row["path"] for row in rows] == [f"clips-00000{k // 4}.tar/c-{k}.mp4" for k in range(6)]
    assert [(row["s.x"], row["s.list"]) for row in rows] == [(0.5 * k, [k]) for k in range(6)]
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "clips-000000.jsonl", "clips-000000.tar", "clips-000001.jsonl", "clips-000001.tar", "index.parquet",
    ]  # fmt: skip


def test_members_are_the_files_of_the_other_form_and_indexing_again_gives_the_same_rows(
    tmp_path: Path, curated: Path
) -> None:
    export(curated, str(tmp_path / "tars"), form="shards", encoder="libx264")
    export(curated, str(tmp_path / "files"), encoder="libx264")
    tars, files = (read_manifest(tmp_path / name) for name in ("tars/index.parquet", "files/manifest.parquet"))
    for one, other in zip(tars, files, strict=True):
        assert asdict(one) | {"path": 0} == asdict(other) | {"path": 0}
        assert np.array_equal(read_video(one.path)[0], read_video(other.path)[0])
    again = tmp_path / "tars" / "again.parquet"
    assert run_index([str(tmp_path / "tars" / "clips-000000.tar"), "--out", str(again)]) == 0
    assert read_rows(again) == read_rows(tmp_path / "tars" / "index.parquet")


def test_the_size_of_a_shard_is_kept(tmp_path: Path, curated: Path) -> None:
    export(curated, str(tmp_path), form="shards", max_shard_gib=60_000 / 2**30)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert len(sizes) > 2
    with_one = [size for size, tar in zip(sizes, sorted(tmp_path.glob("*.tar")), strict=True) if len(tarfile.open(tar).getnames()) == 3]  # fmt: skip
    assert all(size <= 60_000 + tarfile.RECORDSIZE for size in sizes if size not in with_one)


def test_shards_of_other_clips_are_not_mixed_in(tmp_path: Path, curated: Path) -> None:
    out = tmp_path / "out"
    export(curated, str(out), form="shards")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rows = read_rows(curated / "clips.parquet")
    write_manifest([rows[0] | {"caption": "new"}, *rows[1:]], tmp_path / "captioned.parquet")
    write_manifest(rows[1:], tmp_path / "fewer.parquet")
    for name, reason in (("captioned", "another row or mode of it"), ("fewer", "not among those kept now")):
        with pytest.raises(UserError, match=rf"shards of another export \(clip 'c-0' .*{reason}"):
            export(tmp_path / f"{name}.parquet", str(out), form="shards")
    write_manifest([*rows, rows[1] | {"clip": "more"}], tmp_path / "more.parquet")
    assert export(tmp_path / "more.parquet", str(out), form="shards").num_reused == 6
    assert {name: (out / name).read_bytes() for name in before if name != "index.parquet"} == {
        name: content for name, content in before.items() if name != "index.parquet"
    }
    truncate(out / "clips-000001.tar", out / "clips-000000.tar", 0.5)
    with pytest.raises(UserError, match="clips-000000.tar .*cut short.*remove it and clips-000000.jsonl"):
        export(tmp_path / "more.parquet", str(out), form="shards")
    (out / "clips-000000.tar").unlink()
    with pytest.raises(UserError, match="clips-000000.jsonl without clips-000000.tar"):
        export(tmp_path / "more.parquet", str(out), form="shards")


def test_a_clip_that_comes_later_stands_where_the_table_has_it(tmp_path: Path, curated: Path) -> None:
    rows, late = read_rows(curated / "clips.parquet"), tmp_path / "late.mp4"
    write_manifest([rows[0] | {"path": str(late)}, *rows[1:]], tmp_path / "m.parquet")
    assert [item["clip"] for item in export(tmp_path / "m.parquet", str(tmp_path / "out"), form="shards").failed] == [
        "c-0"
    ]
    late.write_bytes(Path(rows[0]["path"]).read_bytes())
    assert export(tmp_path / "m.parquet", str(tmp_path / "out"), form="shards").num_reused == 5
    paths = [row["path"] for row in read_rows(tmp_path / "out" / "index.parquet")]
    assert paths == [f"clips-00000{int(k == 0)}.tar/c-{k}.mp4" for k in range(6)]


def test_tars_made_elsewhere_are_indexed(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = small.read_bytes()
    files = {
        "./a.mp4": video, "./a.txt": "  a caption, ü\n".encode(), "./a.json": b'{"caption": "not this", "score": 1, "width": 7}',
        "sub/b.x.MKV": video, "sub/b.json": b'{"text": "from json", "score": "high", "tags": {"x": [1]}}',
        "c.mp4": b"no video", "d.mp4": video, "README.md": b"hello",
    }  # fmt: skip
    tar = write_tar(tmp_path / "in" / "s.tar", files) if (tmp_path / "in").mkdir() is None else Path()
    assert run_index([str(tar), "--out", str(tmp_path / "index.parquet")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"left out: {tar}/c.mp4: cannot open it as a video")
    assert captured.out.startswith("3 clips in 1 tars")
    rows = read_rows(tmp_path / "index.parquet")
    assert [row["path"] for row in rows] == [f"in/s.tar/{name}" for name in ("a.mp4", "sub/b.x.MKV", "d.mp4")]
    assert [row["caption"] for row in rows] == ["a caption, ü", "from json", ""]
    assert [row["score"] for row in rows] == ["1", '"high"', None], "types that do not mix become JSON text"
    assert rows[1]["tags"] == '{"x": [1]}'
    for row in rows:
        facts = {name: row[name] for name in COLUMNS if name not in ("path", "caption")}
        assert facts == {"start": 0.0, "end": 10.0, "num_frames": 250, "width": 160, "height": 68, "fps": 25.0}
    frames, _ = read_video(read_manifest(tmp_path / "index.parquet")[1].path)
    assert np.array_equal(frames, read_video(small)[0])


HOSTILE: dict[str, tuple[list[tuple[str, bytes]], dict[str, bytes], str]] = {
    "leaves its folder": ([("../a.mp4", b"x")], {}, "would leave its folder"),
    "absolute": ([("/tmp/a.mp4", b"x")], {}, "would leave its folder"),
    "link": ([("a.mp4", b"x")], {"b.mp4": tarfile.SYMTYPE}, "link or a device"),
    "hard link": ([("a.mp4", b"x")], {"b.mp4": tarfile.LNKTYPE}, "link or a device"),
    "device": ([("a.mp4", b"x")], {"b.mp4": tarfile.BLKTYPE}, "link or a device"),
    "twice": ([("a.mp4", b"x"), ("a.mp4", b"y")], {}, "holds it twice"),
    "two videos": ([("a.mp4", b"x"), ("a.webm", b"y")], {}, "two videos of the key 'a'"),
    "no object": ([("a.mp4", b""), ("a.json", b"[1]")], {}, "must hold a JSON object, got list"),
    "no JSON": ([("a.mp4", b""), ("a.json", b"{")], {}, "is not JSON"),
    "no UTF-8": ([("a.mp4", b""), ("a.txt", b"\xff")], {}, "must be UTF-8 text"),
    "a line break": ([("a\nb.mp4", b"")], {}, "printable paths"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tar_that_cannot_be_trusted_is_refused(tmp_path: Path, small: Path, case: str) -> None:
    files, links, reason = HOSTILE[case]
    good: Any = [("good.mp4", small.read_bytes())]
    tar = write_tar(
        tmp_path / "s.tar", good + [(name, content or small.read_bytes()) for name, content in files], **links
    )
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=reason):
        shards.index([tar], tmp_path / "index.parquet")
    assert set(tmp_path.iterdir()) == before, "nothing is written and nothing extracted"


def test_tars_that_are_none_or_cut_short_are_refused(tmp_path: Path, small: Path) -> None:
    whole = write_tar(tmp_path / "s.tar", {"a.mp4": small.read_bytes(), "b.mp4": small.read_bytes()})
    with pytest.raises(UserError, match="cut short"):
        shards.index([truncate(whole, tmp_path / "t.tar", 0.7)], tmp_path / "i.parquet")
    with pytest.raises(UserError, match="no uncompressed tar"):
        shards.index([small], tmp_path / "i.parquet")
    with pytest.raises(UserError, match="does not end in .tar"):
        shards.index([whole.rename(tmp_path / "s.bin")], tmp_path / "i.parquet")
    with pytest.raises(UserError, match="No such file"):
        shards.index([tmp_path / "absent.tar"], tmp_path / "i.parquet")
    with pytest.raises(UserError, match="no clip in 1 tars can be used"):
        shards.index([write_tar(tmp_path / "e.tar", {"a.txt": b""})], tmp_path / "i.parquet")
