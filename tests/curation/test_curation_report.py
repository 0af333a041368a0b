"""The report page: its numbers against plain Python, hostile texts without power, and its looks in a real browser.

Real clips and scores (curated_folder.py); file names, captions and reasons are made up where they attack the page. The last
tests need a Chromium and are skipped without one. pytest tests/curation/test_curation_report.py
"""

from __future__ import annotations

import base64
import html
import itertools
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import browse, needs_chromium
from curated_folder import STAGES, Row, clip_rows, scores, spans, write_folder
from real_video import bikes

from vchitect_fast.curation import report, report_figures
from vchitect_fast.curation.compare import compare
from vchitect_fast.curation.dataset import Dataset, duration
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.report import NUM_DROPPED_SHOWN, NUM_FRAMES, NUM_KEPT_SHOWN, SHORT_SIDE, write_report
from vchitect_fast.curation.report_page import POLICY
from vchitect_fast.curation.rules import Rule
from vchitect_fast.curation.stage import Want
from vchitect_fast.errors import UserError

ATTACK = "</title><script>alert(1)</script>\"'><img src=http://example.invalid/a.png onerror=alert(2)>\u202e\n&amp;"
TAGS = set(
    "html head meta title style body main h1 h2 h3 p div b span i small bdi br table tr th td figure figcaption img svg "
    "rect line text polyline pre code".split()
)


GONE = {name: f"/gone/{name}.mp4" for name in ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")}


class Page(HTMLParser):
    """A page's tags, attributes and text, as a browser reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[bytes]:
        head = "data:image/jpeg;base64,"
        found = [value for name, value in self.attributes if name == "src"]
        assert all(value.startswith(head) for value in found)
        return [base64.b64decode(value.removeprefix(head)) for value in found]


def hostile(folder: Path) -> Path:
    """Every text that comes from outside is an attack; the names with a script in them are of real files."""
    video = folder / "<script>alert(1)<" / "script>\"'\u202e\n&.mp4"
    video.parent.mkdir(parents=True)
    shutil.copy(bikes(), video)
    rows = clip_rows(paths={"bikes": str(video), "bigbuckbunny": f"/gone/{ATTACK}.mp4"})
    for row in rows:
        row["caption"] = ATTACK + " long words" * 80 + "w" * 300 if row["kept"] else row["caption"]
        row["reason"] = None if row["kept"] else ATTACK + "w" * 300
    stages = [dict(stage) for stage in STAGES]
    stages[0] |= {"backend": ATTACK, "weights": ATTACK, "key": ATTACK, "parameters": {ATTACK: ATTACK + "w" * 300}}
    line = dict.fromkeys(("video", "path", "clip", "stage", "reason"), ATTACK + "w" * 300)
    return write_folder(folder / "a <b>'folder'", rows, stages, [line] * 3)


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    page = Page(write_report(hostile(tmp_path)))
    assert page.tags.keys() <= TAGS, "a tag from outside"
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "href"]
    assert page.pictures
    shown = ATTACK.replace("\u202e", "\\u202e").replace("\n", "\\n")
    # Caption, reason, backend, parameters, quarantine: each reads as it was written.
    assert page.text.count(shown) > 20
    assert not {"\u202e", "\x1b"} & set(page.source)
    assert "<title>Curation of a &lt;b&gt;" in page.source


def test_nothing_is_fetched_and_no_script_may_run(tmp_path: Path) -> None:
    page = Page(write_report(write_folder(tmp_path, clip_rows(paths=GONE))))
    assert ("content", POLICY) in page.attributes and "default-src 'none'" in POLICY
    assert "url(" not in page.source and "@import" not in page.source and page.tags["script"] == 0


def test_the_numbers_are_those_of_the_folder(tmp_path: Path) -> None:
    rows = clip_rows(paths=GONE)
    lines: list[Row] = [
        {"video": "v", "path": f"/data/{k}.mp4", "stage": "probe", "reason": f"reason {k}"} for k in range(1000, 1230)
    ]
    lines.append(
        {"video": "w", "path": "/data/0.mp4", "clip": "w-0-9", "stage": "tone", "reason": "odd", "attempts": 3}
    )
    text = " ".join(Page(write_report(write_folder(tmp_path, rows, quarantine=lines))).text.split())
    kept = [row for row in rows if row["kept"]]
    hours = sum(row["end"] - row["start"] for row in kept) / 3600
    assert f"{len(kept)} clips stay, {100 * len(kept) / 15:.1f} %" in text
    assert f"{duration(hours)} of video stay" in text
    assert "231 in quarantine: 230 videos, 1 clip " in text
    assert "static 10 stay" in text and "5 dropped (33.3 %)" in text
    assert "tone.mean > 80: 1, tone.is_dark == false: 3" in text
    for row in rows:
        assert row["reason"] is None or row["reason"] in text
    assert "/data/0.mp4 w-0-9 tone odd 3" in text
    assert "reason 1198" in text and "reason 1199" not in text and "The first 200 of 231" in text
    assert "whole video probe" in text
    assert text.count("proxy, not the paper's model") == 3  # funnel, histogram, settings: wherever its name stands
    assert "curate what-if" in text and "--aesthetics_proxy" in text


def test_the_paper_s_table_is_right(tmp_path: Path) -> None:
    """Two folders, sizes at the edges of the classes (made up), captions of known length, one of them empty."""
    sizes = [(596, 336), (595, 335), (1080, 1920), (7680, 4320), (853, 479)]
    rows = [row for row in clip_rows() if row["kept"]]
    for row, (width, height), caption in zip(rows, sizes, ("a b c", "a", "", " a\n b ", "one  two"), strict=True):
        row |= {"width": width, "height": height, "caption": caption}
        row["path"] = f"s3://bucket/all/{'web/deep' if width < 700 else 'own'}/{row['clip']}.mp4"
    text = Page(write_report(write_folder(tmp_path, rows))).text
    table = " ".join(text[text.index("mean length") : text.index("length, s")].split())
    for name, group in (("web/deep", rows[:2]), ("own", rows[2:]), ("all", rows)):
        seconds = sum(row["end"] - row["start"] for row in group)
        words = [len(row["caption"].split()) for row in group if row["caption"]]
        shorts = [min(row["width"], row["height"]) for row in group]
        edges = (0, 336, 480, 720, 1080, 2160, 10**9)
        classes = [sum(a <= s < b for s in shorts) for a, b in itertools.pairwise(edges)]
        line = [name, len(group), f"{seconds / len(group):.1f} s", duration(seconds / 3600), f"{np.mean(words):.1f}"]
        assert " ".join(map(str, line + [num or "-" for num in classes])) in table
    assert "below 336p 336p 480p 720p 1080p 4k" in table


def test_pictures_are_the_clips_frames(tmp_path: Path) -> None:
    page = Page(write_report(write_folder(tmp_path)))
    pictures = page.pictures
    assert len(pictures) == 15 * NUM_FRAMES
    expected = set()
    for span in spans():
        frames = clip_frames(span, [Want(time, SHORT_SIDE) for time in span.spread(NUM_FRAMES)])
        assert {min(frame.shape[:2]) for frame in frames} == {SHORT_SIDE}
        expected |= {report._jpeg(frame) for frame in frames}
    assert set(pictures) == expected


def test_a_video_that_is_gone_costs_its_pictures_only(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(bikes().read_bytes()[:5000])
    rows = clip_rows(paths={"bigbuckbunny": "/gone/b.mp4", "bikes": str(broken)})
    page = Page(write_report(write_folder(tmp_path, rows)))
    assert len(page.pictures) == 6 * NUM_FRAMES
    assert page.text.count("no pictures: cannot open it as a video") == 9


def many(num: int, **changes: object) -> list[Row]:
    """Copies of a real clip's row under other ids (made up), three clips a video."""
    row = next(row for row in clip_rows() if row["kept"])
    return [dict(row, clip=f"{k}", video=f"{k // 3}", path=f"/gone/{k // 3}.mp4", **changes) for k in range(num)]


def test_a_sample_is_shown_of_many_and_no_video_fills_it(tmp_path: Path) -> None:
    rows = many(90) + [
        dict(row, clip=f"d{row['clip']}") for row in many(20, kept=False, dropped_by="tone", reason="dull")
    ]
    page = Page(write_report(write_folder(tmp_path, rows)))
    assert page.text.count("no pictures") == NUM_KEPT_SHOWN + NUM_DROPPED_SHOWN
    assert page.text.count("dull") == NUM_DROPPED_SHOWN and "6 of 20 clips" in page.text
    kept = page.text[page.text.index("Clips that stay") : page.text.index("Clips that went")]
    assert set(Counter(re.findall(r"\d+\.mp4", kept)).values()) == {1}  # 30 videos for 24 places


def test_an_empty_folder_and_one_without_survivors_have_a_report(tmp_path: Path) -> None:
    text = Page(write_report(write_folder(tmp_path / "none", many(4, kept=False, dropped_by="tone", reason="r")))).text
    assert "No clip stays." in text and "It is empty" in text
    data = write_folder(tmp_path / "all", many(4))
    import pyarrow.parquet

    path = data / "clips.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    assert "0 clips found" in " ".join(Page(write_report(data)).text.split())


def test_commands_are_quoted_for_a_shell(tmp_path: Path) -> None:
    data = Dataset(write_folder(tmp_path / "it's $(here)"))
    lines = report.commands(data)
    assert len(lines) == 3
    for line in lines:
        told = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout
        assert str(data.folder) in told


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (write_folder(tmp_path, clip_rows(paths=GONE)) / "report.html").mkdir()
    with pytest.raises(UserError, match="could not write .*report.html"):
        write_report(tmp_path)


def rects(svg: str, kind: str) -> list[tuple[float, float, float]]:
    """(x, width, height) of the bars of one class."""
    found = re.findall(rf'<rect class="{kind}" x="([\d.-]+)" y="[\d.-]+" width="([\d.-]+)" height="([\d.-]+)"', svg)
    return [(float(x), float(width), float(height)) for x, width, height in found]


@pytest.mark.parametrize("condition", ["< 2.5", "<= 2.5", "> 4", ">= 4.0", "> -10", "== 2.5"])
def test_bars_hold_every_clip_on_its_side_of_the_rule(condition: str) -> None:
    rule = Rule.parse("static", "difference", condition)
    values = np.array([scores(span)["static.difference"] for span in spans()] + [2.5, 4.0, 4.0, 900.0])
    keeps = np.array([rule.keeps(value) for value in values])
    svg = report_figures.histogram(values[keeps], values[~keeps], rule)
    top = int(re.search(r">([\d,]+) clips? in the highest bar", svg)[1])  # type: ignore[index]
    scale = top / (report_figures.HEIGHT - report_figures.TOP - report_figures.BOTTOM)
    bars = {kind: rects(svg, kind) for kind in ("keep", "drop")}
    # Heights are printed to a tenth of a unit: a bar of whole clips is known to far less than half a clip.
    assert {k: sum(round(h * scale) for *_, h in found) for k, found in bars.items()} == {"keep": keeps.sum(), "drop": (~keeps).sum()}  # fmt: skip
    cut = float(re.search(r'class="cut" x1="([\d.-]+)"', svg)[1])  # type: ignore[index]
    for x, width, _ in bars["keep"] + bars["drop"]:
        assert x + width <= cut + 0.1 or x >= cut - 0.1  # no bar straddles the rule
    if rule.sign != "==":
        [(x, width, _)] = rects(svg, "side")
        assert (abs(x - cut) < 0.11) if rule.sign[0] == "<" else (abs(x + width - cut) < 0.11)


@pytest.mark.parametrize(
    ("condition", "between"), [("<= 1", 1.5), ("< 1", 0.5), ("> 1", 1.5), (">= 1", 0.5), ("< 1.5", 1.5)]
)
def test_a_rule_on_whole_numbers_cuts_between_two(condition: str, between: float) -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0])
    rule = Rule.parse("text", "significant_frames", condition)
    keeps = np.array([rule.keeps(value) for value in values])
    svg = report_figures.histogram(values[keeps], values[~keeps], rule, whole=True)
    cut = float(re.search(r'class="cut" x1="([\d.-]+)"', svg)[1])  # type: ignore[index]
    middles = sorted(x + width / 2 for kind in ("keep", "drop") for x, width, _ in rects(svg, kind))
    assert abs(np.interp(between, values, middles) - cut) < 0.11 and f"keeps {html.escape(condition)}" in svg
    assert [x > cut for x in middles] == [value > between for value in values]


def test_a_rule_on_many_whole_numbers_lies_on_an_edge() -> None:
    for low in range(7):
        edges = report_figures.bins([np.arange(low, 300.0)], 100.5, whole=True)
        assert 100.5 in edges and edges[0] < np.percentile(np.arange(low, 300), 0.5) and edges[1] - edges[0] == 10


def test_one_odd_clip_does_not_squeeze_the_others() -> None:
    values = np.concatenate([np.linspace(0, 1, 1000), [1e9]])
    edges = report_figures.bins([values])
    assert edges[-1] < 2
    assert report_figures.counts(values, edges).sum() == 1001


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e-12, 1e-12], [1e15, 1e15 + 2], [0.0, 1e-300], [-5.0, 1e30]])
def test_any_range_has_bins_and_ticks(values: list[float]) -> None:
    for whole in (False, True):
        if whole and max(map(abs, values)) > 1e20:
            continue
        edges = report_figures.bins([np.array(values)], whole=whole)
        assert report_figures.counts(np.array(values), edges).sum() == len(values)
        assert 1 <= len(report_figures.ticks(float(edges[0]), float(edges[-1]))) <= 11
        assert "nan" not in report_figures.histogram(np.array(values), np.empty(0), whole=whole)


@needs_chromium
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_in_a_browser_the_page_fits_and_asks_for_nothing(tmp_path: Path, kind: str) -> None:
    folder = hostile(tmp_path)
    path = write_report(folder) if kind == "report" else compare([folder, folder, folder], tmp_path / "compare.html")
    page = path.read_text()
    for number, width in enumerate((400, 1400)):
        place = tmp_path / str(number)
        place.mkdir()
        assert browse(page, place, width) == ("0 0 0", [])
    # Also without its content policy, which would only hide an attempt.
    place = tmp_path / "bare"
    place.mkdir()
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert bare != page and browse(bare, place, 400) == ("0 0 0", [])


@needs_chromium
def test_the_browser_would_notice(tmp_path: Path) -> None:
    """The check above, on a page with everything that it looks for."""
    page = '<p style="width:600px">wide</p><img src="http://example.invalid/a.png"><script>1</script>'
    told, hosts = browse(page, tmp_path, 400)
    assert re.fullmatch(r"2\d\d 1 1 P", told) and hosts == ["example.invalid"]
