"""Text: both readers on real frames with text of known place, the paper's rule, exact areas, and no word to the network.

Letters are burnt into frames of bikes.mp4 on a plate, so that their box is known to the pixel. A reader's box is right
when it and the true one have an IoU of 0.5, the measure of the ICDAR competitions: then its area is within a factor of 2.
pytest tests/curation/test_text.py
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import pickle
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_video import bikes

from vchitect_fast.curation import text
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import ClipSpan, Sample
from vchitect_fast.curation.text import Detection, EasyText, RapidText, Text, covered
from vchitect_fast.errors import UserError

SPAN = ClipSpan("bikes", str(bikes()), 0, 29, 0.0, 1.2, 640, 272, 25.0)
PACKAGES = {RapidText: ("rapidocr", "onnxruntime"), EasyText: ("easyocr", "easyocr_en_models")}


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    """A frame of bikes.mp4 without text, 640x272."""
    return clip_frames(SPAN, RapidText().wants(SPAN)[:1])[0]


@pytest.fixture(scope="module")
def seen() -> dict[Any, list[Detection]]:
    """What a reader found in a frame, so that it need not look again: it takes a second."""
    return {}


@pytest.fixture(params=[RapidText, EasyText])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seen: dict[Any, list[Detection]]) -> Text:
    """Each reader, on a machine whose sockets fail the test."""
    for name in PACKAGES[request.param]:
        pytest.importorskip(name, reason=f"needs {name}")

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"the network was asked for {arguments[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    genuine = request.param.detect

    def detect(self: Text, frame: np.ndarray) -> list[Detection]:
        known = (request.param, frame.tobytes())
        if known not in seen:
            seen[known] = genuine(self, frame)
        return seen[known]

    monkeypatch.setattr(request.param, "detect", detect)
    return request.param() if request.param is RapidText else EasyText(device="cpu")


def burn(frame: np.ndarray, words: str, size: int, left: int = 60, top: int = 60) -> tuple[np.ndarray, list[int]]:
    """The frame with words on a black plate, and the plate [x0,y0,x1,y1] around the letters."""
    from PIL import Image, ImageDraw, ImageFont

    image, font = Image.fromarray(frame), ImageFont.load_default(size=size)
    draw = ImageDraw.Draw(image)
    plate = [int(edge) for edge in draw.textbbox((left, top), words, font=font)]
    draw.rectangle(plate, fill=(0, 0, 0))
    draw.text((left, top), words, font=font, fill=(255, 255, 255))
    return np.asarray(image), plate


def corners(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def share(plate: list[int], frame: np.ndarray) -> float:
    return (plate[2] - plate[0]) * (plate[3] - plate[1]) / (frame.shape[0] * frame.shape[1])


def test_a_reader_is_quiet(reader: Text, plain: np.ndarray, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader.check()
        assert reader.detect(np.zeros_like(plain)) == []
        assert reader.detect(burn(plain, "BREAKING NEWS", 48)[0])
    assert capfd.readouterr() == ("", "")


def test_burnt_in_text_is_found_where_it_is(reader: Text, plain: np.ndarray) -> None:
    frame, plate = burn(plain, "BREAKING NEWS", 48)
    found = [line for line in reader.detect(frame) if line.score >= 0.4 and len(line.text) >= 4]
    assert len(found) == 1 and "BREAK" in found[0].text and "NEWS" in found[0].text
    both = share(plate, frame) + covered([found[0].polygon], 640, 272)
    union = covered([found[0].polygon, corners(*plate)], 640, 272)
    assert (both - union) / union >= 0.5


def test_the_papers_rule_on_real_frames(reader: Text, plain: np.ndarray) -> None:
    large, plate = burn(plain, "BREAKING NEWS", 48)
    small, small_plate = burn(plain, "subtitle", 20)
    assert share(plate, large) > 2 * 0.02 and share(small_plate, small) < 0.02 / 2
    short, _ = burn(plain, "ON!", 90)
    scores = reader.score([Sample(SPAN, frames, {}) for frames in ([large, small], [short], [large, large])])
    assert [found["significant_frames"] for found in scores] == [1, 0, 2]
    assert [found["valid"] for found in scores] == [True, True, False]
    assert share(plate, large) / 2 <= scores[0]["area_max"] <= share(plate, large) * 2
    assert scores[1]["area_max"] == 0 and scores[1]["texts"] == []
    assert len(scores[0]["texts"]) == 2 and scores[0]["texts"][1].lower() == "subtitle"
    assert scores[2]["texts"] == scores[0]["texts"][:1]
    assert all(set(found) == set(Text.columns) for found in scores)


def test_onnxruntime_leaves_no_identifier_at_home_and_easyocr_no_folder(tmp_path: Path) -> None:
    """In a process of its own, because telemetry is decided once; its uploader, if on, keeps a file in the home folder."""
    for names in PACKAGES.values():
        for name in names:
            pytest.importorskip(name, reason=f"needs {name}")
    program = (
        "import sys, numpy; from vchitect_fast.curation.text import EasyText, RapidText\n"
        "RapidText().detect(numpy.zeros((64, 64, 3), numpy.uint8))\n"
        "paths = list(sys.path); EasyText(device='cpu').check(); assert sys.path == paths"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []


def test_rapidocr_drops_nothing_by_a_score_of_its_own() -> None:
    pytest.importorskip("rapidocr", reason="needs rapidocr")
    assert text._rapid(1, 384).text_score == 0  # its default of 0.5 would hide what counts from 0.4


class Told(Text):
    """A reader that says what its test told it; the frame's first pixel chooses."""

    backend = "told"
    said: tuple[list[Detection], ...] = ()

    def detect(self, frame: np.ndarray) -> list[Detection]:
        return self.said[frame[0, 0, 0]]


def told(*said: list[Detection], scores: dict[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
    stage = Told(**parameters)
    object.__setattr__(stage, "said", said)
    frames = [np.full((100, 200, 3), number, np.uint8) for number in range(len(said))]
    return stage.score([Sample(SPAN, frames, scores or {})])[0]


def line(x1: float, words: str = "words", score: float = 0.9, x0: float = 0.0) -> Detection:
    """Text over columns x0..x1 of the whole height of a frame of 200 x 100."""
    return Detection(corners(x0, 0, x1, 100), words, score)


def test_what_counts_and_what_is_significant() -> None:
    assert told([line(4)])["significant_frames"] == 0  # exactly 2 % is not over it
    assert told([line(4.25)])["significant_frames"] == 1
    assert told([line(100, score=0.3999)], [line(100, "abc")], [line(100, " ab ")])["significant_frames"] == 0
    assert told([line(100, score=0.4)], [line(100, "abcd")])["significant_frames"] == 2
    assert told([line(100, "abc", 0.1)], min_length=3, min_score=0.1)["significant_frames"] == 1
    assert told([line(100)], area_ratio=0.5)["significant_frames"] == 0
    assert told([line(100)], [])["valid"] and not told([line(100)], [line(100)])["valid"]
    found = told([line(50, "later"), line(50, "first")], [line(100, " first "), line(1, "abc")])
    assert found == {"significant_frames": 2, "area_max": 0.5, "texts": ["later", "first"], "valid": False}


def test_boxes_of_a_watermark_are_left_out() -> None:
    marked = {"watermark": {"boxes": [[0.0, 0.0, 0.25, 1.0]], "probability": 0.9}}
    assert told([line(50)], scores=marked)["area_max"] == 0
    assert told([line(100)], scores=marked)["area_max"] == 0.25
    for scores in ({"watermark": {"probability": 0.9}}, {"watermark": {"boxes": None}}, {}):
        assert told([line(50)], scores=scores)["area_max"] == 0.25


@pytest.mark.parametrize(
    ("polygons", "expected"),
    [
        ([], 0.0),
        ([corners(0, 0, 8, 8)], 0.25),
        ([corners(0, 0, 8, 8), corners(4, 0, 12, 8)], 0.375),  # a sum would say 0.5
        ([corners(0, 0, 8, 8), corners(2, 2, 4, 4)], 0.25),
        ([corners(0, 0, 4, 4), corners(8, 8, 12, 12)], 0.125),
        ([corners(-8, -8, 8, 8)], 0.25),  # clipped: a sum would say 1
        ([corners(20, 20, 30, 30)], 0.0),
        ([np.array([[8, 0], [16, 8], [8, 16], [0, 8]])], 0.5),  # tilted by 45 degrees
        ([np.array([[0, 0], [16, 16], [16, 0], [0, 16]])], 0.5),  # crossed corners: two triangles
        ([np.array([[3, 3]] * 4), np.array([[0, 0], [4, 0], [8, 0], [0, 0]])], 0.0),  # a point and a line
    ],
)
def test_areas_are_exact(polygons: list[np.ndarray], expected: float) -> None:
    assert covered(polygons, 16, 16) == expected


def test_regions_count_for_nothing_wherever_they_overlap() -> None:
    regions = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5]]
    assert covered([corners(0, 0, 16, 16)], 16, 16, regions) == 1 - 0.375
    assert covered([corners(0, 0, 8, 8)], 16, 16, regions) == 0


def test_no_frame_is_looked_at_twice() -> None:
    assert [want.time for want in Told().wants(SPAN)] == pytest.approx([0.075 + 0.15 * k for k in range(8)])
    three = ClipSpan("v", "v", 0, 2, 0.0, 0.12, 640, 272, 25.0)
    assert [want.time for want in Told().wants(three)] == pytest.approx([0.02, 0.06, 0.10])
    assert {want.short_side for want in Told().wants(three)} == {720}


def test_the_key_holds_what_decides_the_scores(tmp_path: Path) -> None:
    for name in (*PACKAGES[RapidText], *PACKAGES[EasyText]):
        pytest.importorskip(name, reason=f"needs {name}")
    same = {RapidText().key(), RapidText(threads=2).key()}
    assert len(same) == 1
    linked = tmp_path / "models"
    linked.symlink_to(EasyText()._folder(), target_is_directory=True)
    assert EasyText(models=str(linked), device="cpu").key() == EasyText().key()
    keys = {stage.key() for stage in (RapidText(), EasyText(), RapidText(min_score=0.5), RapidText(area_ratio=0.03))}
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "num_frames of the text stage must be 1 or more, got 0"),
        ({"short_side": 0}, "short_side of the text stage must be 1 or more"),
        ({"min_length": -1}, "min_length of the text stage must be 0 or more"),
        ({"min_score": 1.5}, "min_score of the text stage must be between 0 and 1, got 1.5"),
        ({"area_ratio": float("nan")}, "area_ratio of the text stage must be between 0 and 1, got nan"),
        ({"threads": 0}, "threads of the text stage must be 1 or more"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RapidText(**changes).check()


def test_models_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(text.RAPID_MODELS, "Det", "absent.onnx")
    with pytest.raises(UserError, match="needs absent.onnx inside rapidocr"):
        RapidText().check()
    with pytest.raises(UserError, match=f"needs craft_mlt_25k.pth in {tmp_path}, got none"):
        EasyText(models=str(tmp_path)).check()


def test_models_of_other_bytes_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("easyocr", reason="needs easyocr")
    for name in text.EASY_MODELS:
        (tmp_path / name).write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(UserError, match="needs EasyOCR's own models, got others"):
        EasyText(models=str(tmp_path), device="cpu").check()


def test_no_pickle_runs_while_easyocr_loads(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    torch.save({"code": os.getcwd}, path)
    with text._only_tensors(), pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=False)
    assert torch.load(path, weights_only=False) == {"code": os.getcwd}


@pytest.mark.parametrize(
    ("stage", "package", "extra"),
    [(RapidText, "rapidocr", "curation"), (EasyText, "easyocr_en_models", "easyocr"), (EasyText, "easyocr", "easyocr")],
)
def test_without_a_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, stage: type[Text], package: str, extra: str
) -> None:
    if package == "easyocr":
        pytest.importorskip("easyocr_en_models", reason="needs the models to get so far")
    found, genuine = importlib.util.find_spec, builtins.__import__

    def lacking(name: str, *rest: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return genuine(name, *rest)

    monkeypatch.setattr(builtins, "__import__", lacking)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(UserError, match=re.escape(f"pip install 'vchitect-fast[{extra}]'")):
        stage().check()
    assert stage.extra == extra
