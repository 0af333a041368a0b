"""Embeddings for stitching: ViCLIP's and CLIP's rules on small checkpoints, and what `layout` makes of real shots.

The cuts of bikes.mp4 lie between different events, so their cosines must be under the paper's 0.6; a shot split inside is
one event and must be over it. pytest tests/curation/test_embedding.py; with -s it prints the cosines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from real_video import BIKES_CUTS, bikes

from vchitect_fast.curation import embedding
from vchitect_fast.curation.clip_model import load_clip, load_viclip
from vchitect_fast.curation.embedding import (
    ClipEmbedding,
    Embedding,
    LayoutEmbedding,
    ViclipEmbedding,
    filled,
    layout_embedding,
)
from vchitect_fast.curation.frames import frames_from, open_video, to_rgb

SAME_EVENT = 0.6  # the paper's threshold
Shot = list[np.ndarray]


def frames_of(name: str) -> Shot:
    with open_video(str(bikes().with_name(name))) as container:
        return [to_rgb(frame, LayoutEmbedding.short_side) for _, frame in frames_from(container, 0)]


@pytest.fixture(scope="module")
def shots() -> dict[str, Shot]:
    frames, edges = frames_of("bikes.mp4"), [0, *BIKES_CUTS, 250]
    found = {f"bikes {k}": frames[edges[k] + (k > 0) : edges[k + 1] - (k < 5)] for k in range(6)}
    return found | {
        name: frames_of(f"{name}.mp4") for name in ("bigbuckbunny", "carphone_pristine", "carphone_distorted")
    }


def cosine(one: Shot, other: Shot) -> float:
    return float(LayoutEmbedding().embed(one) @ LayoutEmbedding().embed(other))


def spread(shot: Shot) -> Shot:
    return [shot[int((k + 0.5) * len(shot) / 8)] for k in range(8)]


def bikes_cuts(shots: dict[str, Shot]) -> list[float]:
    return [cosine(shots[f"bikes {k}"][-8:], shots[f"bikes {k + 1}"][:8]) for k in range(5)]


def test_layout_tells_the_events_of_bikes_apart(shots: dict[str, Shot]) -> None:
    cuts = bikes_cuts(shots)
    print("cuts", np.round(cuts, 2))
    assert max(cuts) < SAME_EVENT


def test_layout_finds_a_split_shot_to_be_one_event(shots: dict[str, Shot]) -> None:
    """Beside each other as stitching compares them, at every fourth frame; and 8 frames spread over each half."""
    beside, halves = {}, {}
    for name, shot in shots.items():
        middles = range(8, len(shot) - 7, 4) if len(shot) >= 16 else [len(shot) // 2]
        beside[name] = min(cosine(shot[max(0, k - 8) : k], shot[k : k + 8]) for k in middles)
        halves[name] = cosine(spread(shot[: len(shot) // 2]), spread(shot[len(shot) // 2 :]))
    print("beside", {k: round(v, 2) for k, v in beside.items()}, "halves", {k: round(v, 2) for k, v in halves.items()})
    assert min(beside.values()) > SAME_EVENT and min(halves.values()) > SAME_EVENT


def test_layout_tells_videos_apart(shots: dict[str, Shot]) -> None:
    names = [name for name in shots if name != "carphone_distorted"]  # the same picture as carphone_pristine
    pairs = {(a, b): cosine(spread(shots[a]), spread(shots[b])) for k, a in enumerate(names) for b in names[k + 1 :]}
    print("pairs", sorted((round(value, 2), *pair) for pair, value in pairs.items())[-3:])
    assert max(pairs.values()) < SAME_EVENT
    assert cosine(spread(shots["carphone_pristine"]), spread(shots["carphone_distorted"])) > SAME_EVENT


@pytest.mark.parametrize("axis", [0, 1])
def test_black_bars_do_not_make_shots_alike(shots: dict[str, Shot], monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    """Bars of an eighth on two sides, put around the real frames."""

    def barred(shot: Shot) -> Shot:
        width = [(0, 0), (0, 0), (0, 0)]
        width[axis] = (shot[0].shape[axis] // 6,) * 2
        return [np.pad(frame, width) for frame in shot]

    with_bars = {name: barred(shot) for name, shot in shots.items() if name.startswith("bikes")}
    assert max(bikes_cuts(with_bars)) < SAME_EVENT
    monkeypatch.setattr(embedding, "_without_bars", lambda cells: cells)
    assert max(bikes_cuts(with_bars)) > SAME_EVENT, "the bars no longer show what they must show"


def test_a_spot_of_light_is_no_picture() -> None:
    cells = np.zeros((2, 8, 8, 3), np.uint8)
    cells[:, 2, 2:4] = 200
    assert embedding._without_bars(cells).shape == cells.shape
    cells[:, 2:7] = 200
    assert embedding._without_bars(cells).shape == (2, 5, 8, 3)
    assert embedding._without_bars(np.zeros_like(cells)).shape == cells.shape


def shifted(step_x: float, step_y: float, num: int = 8) -> np.ndarray:
    """Synthetic, since the truth must be known: a smooth pattern that moves `step` cells a frame, as grey cells."""
    y, x = np.mgrid[:8, :8].astype(float)
    frames = [128 + 50 * np.sin((x - step_x * t) / 1.5) * np.cos((y - step_y * t) / 1.7) for t in range(num)]
    return np.repeat(np.stack(frames)[..., None], 3, -1).round().astype(np.uint8)


@pytest.mark.parametrize(("x", "y"), [(0.3, 0.0), (-0.3, 0.0), (0.0, 0.3), (0.0, -0.3), (0.2, 0.2)])
def test_motion_has_the_direction_of_what_moves(x: float, y: float) -> None:
    found = embedding._motion(embedding._lab(shifted(x, y))[..., 0]).reshape(4, 2)
    directions = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert (directions @ np.array([x, y]) / np.hypot(x, y) > np.cos(np.radians(30))).all()
    assert np.linalg.norm(found) < 1


def test_motion_counts_and_stillness_adds_nothing() -> None:
    assert not embedding._motion(embedding._lab(shifted(0, 0))[..., 0]).any()
    assert not embedding._motion(embedding._lab(shifted(1, 1, num=1))[..., 0]).any()
    left, right, still = (layout_embedding(shifted(step, 0)) for step in (-0.3, 0.3, 0.0))
    assert not still[-8:].any() and np.dot(left[-8:], right[-8:]) < 0


def test_lab_is_cie_lab() -> None:
    import cv2

    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    theirs = cv2.cvtColor(colours.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    # OpenCV looks its curves up; its own 8-bit form has steps of 1, half of which nobody sees.
    assert np.abs(embedding._lab(colours) - theirs).max() < 0.5


def test_layout_needs_only_the_cells(shots: dict[str, Shot]) -> None:
    import cv2

    frames = shots["bikes 1"][:8]
    cells = np.stack([cv2.resize(frame, (8, 8), interpolation=cv2.INTER_AREA) for frame in frames])
    whole = LayoutEmbedding().embed(frames)
    assert np.array_equal(whole, layout_embedding(cells)) and np.array_equal(
        whole, layout_embedding(cells.reshape(8, -1))
    )


def viclip_checkpoint(folder: Path) -> Path:
    from vchitect_fast.curation.clip_model import _viclip_shapes

    prefix = "vision_encoder."
    show = {"conv1.weight": (64, 3, 1, 56, 56), "positional_embedding": (17, 64), "proj": (64, 24)}
    shapes = _viclip_shapes({prefix + name: torch.empty(size) for name, size in show.items()})
    make = torch.Generator().manual_seed(6)
    torch.save({"model": {n: torch.randn(s, generator=make) / 8 for n, s in shapes.items()}}, folder / "v.pth")
    return folder / "v.pth"


def clip_checkpoint(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModelWithProjection(CLIPVisionConfig(**small, patch_size=56, projection_dim=24)).save_pretrained(folder)
    return folder


def backends(folder: Path) -> list[Embedding]:
    (folder / "clip").mkdir()
    viclip, clip = str(viclip_checkpoint(folder)), str(clip_checkpoint(folder / "clip"))
    return [ViclipEmbedding(viclip, device="cpu"), ClipEmbedding(clip, device="cpu"), LayoutEmbedding()]


def test_every_backend_gives_one_vector_of_length_1(tmp_path: Path, shots: dict[str, Shot]) -> None:
    found = backends(tmp_path)
    assert len({one.backend for one in found}) == len({one.key() for one in found}) == 3
    for one in found:
        one.check()
        for frames in (shots["bikes 0"][:8], shots["bikes 5"], shots["bikes 1"][:1]):
            vector = one.embed(frames)
            assert vector.ndim == 1 and vector.dtype == np.float32
            # Rounding each of n squares to fp32 moves the length by at most eps times the root of n.
            assert abs(np.linalg.norm(vector.astype(np.float64)) - 1) < np.finfo(np.float32).eps * len(vector) ** 0.5
            assert np.array_equal(vector, one.embed(frames))
        assert one.num_frames == 8 and (one.weights == "") == (one.backend == "layout")


def test_clip_takes_the_mean_of_unit_vectors_and_viclip_all_frames(tmp_path: Path, shots: dict[str, Shot]) -> None:
    viclip, clip, _ = backends(tmp_path)
    assert isinstance(viclip, ViclipEmbedding) and isinstance(clip, ClipEmbedding)
    frames = shots["bikes 2"][:8]
    rows = load_clip(clip.folder).image_embeddings(frames)
    mean = rows.mean(0)
    assert np.array_equal(clip.embed(frames), mean / np.linalg.norm(mean))
    assert np.array_equal(viclip.embed(frames), load_viclip(viclip.folder).video_embedding(frames))


@pytest.mark.parametrize(
    ("num", "expected"),
    [(8, range(8)), (7, [0, 0, 1, 2, 3, 4, 5, 6]), (4, [0, 0, 1, 1, 2, 2, 3, 3]), (1, [0] * 8)],
)
def test_short_clips_fill_eight_frames_in_order(num: int, expected: Sequence[int]) -> None:
    frames = [np.full((1, 1, 3), k, np.uint8) for k in range(num)]
    assert [int(frame[0, 0, 0]) for frame in filled(frames)] == list(expected)
    with pytest.raises(AssertionError, match="sees 1 to 8 frames, got 9"):
        filled([frames[0]] * 9)


def test_the_key_follows_the_weights_and_not_their_place(tmp_path: Path) -> None:
    file = viclip_checkpoint(tmp_path)
    moved = tmp_path / "moved.pth"
    moved.write_bytes(file.read_bytes())
    assert ViclipEmbedding(str(moved), device="cpu").key() == ViclipEmbedding(str(file)).key()
    moved.write_bytes(file.read_bytes() + b"0")
    assert ViclipEmbedding(str(moved)).key() != ViclipEmbedding(str(file)).key()
