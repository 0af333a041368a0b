"""Damage for tests of curation: real clips with flipped bytes, headers that lie, and things that are no files."""

from __future__ import annotations

import os
import random
import socket
import struct
from pathlib import Path

import av
from curated import carphone
from real_video import remux


def first_frames(source: Path, target: Path, num_frames: int) -> Path:
    """The first packets of a video, as they are."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if number >= num_frames or packet.dts is None:
                break
            packet.stream = copied
            new.mux(packet)
    return target


def flipped(source: Path, target: Path, seed: int) -> Path:
    """1 to 64 bytes changed at random places."""
    draw, content = random.Random(seed), bytearray(source.read_bytes())
    for _ in range(2 ** draw.randrange(7)):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    target.write_bytes(content)
    return target


def decodes_cleanly(path: Path, num_frames: int) -> bool:
    """Whether the first frames decode, in order and without a complaint, by one thread that is told to complain."""
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_type = "NONE"  # others report damage now and then, or never
        last = None
        for number, frame in enumerate(container.decode(stream), 1):
            if frame.is_corrupt or (last is not None and frame.pts <= last):
                return False
            last = frame.pts
            if number == num_frames:
                return True
    return False


def _patched(target: Path, *changes: tuple[bytes, int, bytes]) -> Path:
    """carphone with bytes replaced at an offset in a box's payload."""
    content = bytearray(carphone().read_bytes())
    for box, offset, new in changes:
        at = content.index(box, content.index(b"trak" if box == b"avc1" else b"moov")) + 4 + offset
        content[at : at + len(new)] = new
    target.write_bytes(content)
    return target


def lying_headers(folder: Path) -> dict[str, str]:
    """Writes videos whose headers claim the absurd; name -> what quarantine says, "" where the frames are fine."""
    big, most, bomb = struct.pack(">I", 2**31), struct.pack(">I", 2**32 - 1), 40_000_000
    pixels, shown = struct.pack(">HH", 60000, 60000), struct.pack(">II", 60000 << 16, 60000 << 16)
    files: dict[str, tuple[str, list[tuple[bytes, int, bytes]]]] = {
        "shown 60000x60000": ("", [(b"tkhd", 76, shown)]),
        "coded 60000x60000": ("", [(b"avc1", 24, pixels), (b"tkhd", 76, shown)]),  # H.264 has sizes of its own
        "2^31 frames of one length": ("", [(b"stts", 8, big)]),
        "2^31 lengths": ("Cannot allocate memory", [(b"stts", 4, big)]),
        "2^31 sizes": ("Invalid data", [(b"stsz", 8, big)]),
        "2^31 chunks": ("", [(b"stco", 4, big)]),
        # 2.4 GiB of index from 30 bytes, without a limit.
        "40 million frames of a byte": (
            "truncated",
            [(b"stsz", 4, struct.pack(">II", 1, bomb)), (b"stsc", 4, struct.pack(">IIII", 1, 1, bomb, 1))],
        ),
        "no such codec": ("there is no decoder", [(b"avc1", -4, b"xxxx")]),
        "2^32 ticks": ("", [(b"mvhd", 16, most), (b"mdhd", 16, most)]),
        "2^32 ticks a second": ("", [(b"mdhd", 12, most)]),
    }  # fmt: skip
    for name, (_, changes) in files.items():
        _patched(folder / f"{name}.mp4", *changes)
    # 3.6 gigapixels in the picture's own header.
    png = folder / "png.mov"
    with av.open(str(png), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb24"
        for packet in (*stream.encode(av.VideoFrame(64, 64, "rgb24")), *stream.encode(None)):
            container.mux(packet)
    content = png.read_bytes()
    at = content.index(b"IHDR") + 4
    png.write_bytes(content[:at] + struct.pack(">II", 60000, 60000) + content[at + 8 :])
    return {f"{name}.mp4": reason for name, (reason, _) in files.items()} | {"png.mov": "Invalid data"}


def no_videos(folder: Path) -> dict[str, str]:
    """Makes names that are no video; name -> what quarantine says. Root can read what chmod forbids, so none is that."""
    files = {
        "empty.mp4": (b"", "the file is empty"),
        "text.mp4": (b"no video at all\n" * 99, "Invalid data"),
        "random.mp4": (random.Random(0).randbytes(50_000), "Invalid data"),
        "zeros.mp4": (bytes(50_000), "Invalid data"),
        "list.mp4": (b"ffconcat version 1.0\nfile whole.mkv\n", "it is a list of other files; name those"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n", "Invalid data"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    remux(carphone(), folder / "whole.mkv")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame("fltp", "mono", 1024)
        frame.sample_rate, frame.pts = 44100, 0
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    (folder / "dangling.mp4").symlink_to("nowhere")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "proc.mp4").symlink_to("/proc/kmsg" if Path("/proc/kmsg").exists() else "/proc/self/status")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # the system allows short names only
        try:
            made.bind("socket.mp4")
        finally:
            os.chdir(here)
    (folder / "folder.mp4").mkdir()  # looked into, and nothing is there
    special = "it is no file but a folder, a pipe or a device"
    return {name: reason for name, (_, reason) in files.items()} | {
        "sound.mp4": "it has no video stream", "dangling.mp4": "No such file", "loop.mp4": "symbolic links", "pipe.mp4": special,
        "device.mp4": special, "socket.mp4": special, "proc.mp4": "the file is empty", "whole.mkv": "",
    }  # fmt: skip
