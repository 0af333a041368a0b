"""The page of a profile: what it says, hostile texts without power, its pictures against their numbers, its fit in a browser.

The last tests need a Chromium and are skipped without one. pytest tests/profiling/test_report.py
"""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import browse, needs_chromium
from made_up_analysis import STEP_US, made_up_analysis, made_up_memory, made_up_rank, made_up_trace

from vchitect_fast.page import MAX_TEXT, POLICY, Bar, lane, text
from vchitect_fast.profiling.facts import Analysis
from vchitect_fast.profiling.figures import CLASS_COLOURS, memory_over_time, roofline
from vchitect_fast.profiling.kinds import KINDS
from vchitect_fast.profiling.report import middle_step, span_rows, write_report
from vchitect_fast.profiling.timeline import timeline
from vchitect_fast.profiling.trace import Columns, Kind, Lane
from vchitect_fast.profiling.work import find_work

ATTACK = "</title><script>alert(1)</script>\"'><img src=http://example.invalid/a.png onerror=alert(2)>\u202e\x00\n&amp;"
TAGS = set(
    "html head meta title style body main h1 h2 h3 h4 p div b span i small bdi br table tr th td figure figcaption svg line text "
    "circle polygon ol li".split()
)


class Page(HTMLParser):
    """A page's tags, attributes and text, as a browser reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


def written(folder: Path, attack: str = "", analysis: Analysis | None = None) -> Path:
    """The page of two made-up ranks."""
    traces, memories = [made_up_trace(attack)] * 2, [made_up_memory(attack)] * 2
    found = analysis or made_up_analysis(attack)
    return write_report(folder / "report.html", found, traces, memories, title=f"Profile of run.yaml{attack}")


def test_the_page_says_what_was_found(tmp_path: Path) -> None:
    page = " ".join(Page(written(tmp_path)).text.split())
    for said in (
        "2 ranks; shown is the first. 3 steps recorded with torch.profiler", "10.0 ms one step", "56 % of it compute",
        "99.1 % of the step lies in spans", "The device waits 2.8 ms a step for data.", "2.80 ms a step", "Setting: cache",
        "Step 4, the median one of 3", "Idle, by what the CPU did meanwhile: data 2.80 ms, launching 0.90 ms.",
        "backward/spatial 2.80 ms 58 %", "copy out 2.50 ms 1.20 ms 52 %", "4096x1536 1536x1536", "40 %", "not measured",
        "The peak of 23.0 MiB is in backward/model of step/3: weights 8.0 MiB, activations 4.0 MiB, workspace 3.0 MiB, held before 8.0 MiB.",
        "weights 8.0 MiB 35 % before the recording", "activations 4.0 MiB 17 % forward/spatial",
        "Rank 0 needs 6.0 % more than the mean over 3 common steps, the time in which it waits for others left out; most of it lies in forward/spatial",
        "no FLOPs are known of some ops",
    ):  # fmt: skip
        assert said in page, said


def test_hostile_texts_have_no_power(tmp_path: Path) -> None:
    page = Page(written(tmp_path, ATTACK))
    assert page.tags <= TAGS
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href") or pair[0].startswith("on")]
    assert ("content", POLICY) in page.attributes
    assert not {"\u202e", "\x00"} & set(page.source)
    assert page.text.count("<script>alert(1)</script>") >= 12  # as text, in every place that shows one


def test_a_text_is_escaped_cut_and_printable() -> None:
    assert text("<a b='c'>&\x07\u202e") == "&lt;a b=&#x27;c&#x27;&gt;&amp;\ufffd\ufffd"
    assert len(text("x" * 5000)) == MAX_TEXT and text("x" * 5000).endswith("...")
    assert text("x" * MAX_TEXT) == "x" * MAX_TEXT


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    columns = Columns()
    columns.add(Kind.OP, "aten::add", 0, 10, Lane("1", "1", False))
    rank = replace(made_up_rank(), steps=(), ops=(), on_device=False, notes=())
    analysis = Analysis((rank,), None, None, ())
    path = write_report(tmp_path / "r.html", analysis, [columns.finish("t", "torch", None)], [None], title="bare")
    page = Page(path).text
    for said in ("The trace has no steps", "recorded without memory", "Nothing stands out", "It ran without a GPU"):
        assert said in page
    assert "Ranks side by side" not in page and "cannot say" not in page


def test_spans_are_medians_over_steps() -> None:
    rows = {row.name: row for row in span_rows(made_up_rank())}
    assert rows["forward/spatial"].device_us == 1004.0  # of 1003, 1004, 1005
    assert list(rows) == ["backward/spatial", "forward/spatial", "optimizer/step", "forward/model"]
    steps = made_up_rank().steps
    assert middle_step((steps[2], steps[0], steps[1])) is steps[1]


def test_the_timeline_holds_each_span_at_its_place_and_the_classes_below() -> None:
    trace = made_up_trace()
    groups = dict(timeline(trace, find_work(trace), STEP_US, STEP_US))
    rows = groups["spans, thread 7"]
    assert [[bar.label for bar in row] for row in rows] == [
        ["step/4 10.00 ms"],
        ["data/batch 0.80 ms", "forward/model 3.00 ms", "backward/model 4.80 ms", "optimizer/step 1.00 ms"],
        ["forward/spatial 1.40 ms", "forward/temporal 1.30 ms", "recompute/spatial 0.50 ms"],
    ]
    forward = rows[1][1]
    assert (forward.start, forward.end, forward.colour) == (pytest.approx(0.09), pytest.approx(0.39), KINDS["forward"])
    [compute] = groups["GPU: compute by class, white where idle"]
    assert [bar.label for bar in compute] == ["gemm", "attention", "gemm", "elementwise"]
    column = 1 / 360
    for bar, (start, end) in zip(compute, ((0.1, 0.2), (0.2, 0.3), (0.42, 0.7), (0.9, 0.98)), strict=True):
        assert abs(bar.start - start) <= column and abs(bar.end - end) <= column
    [copies] = groups["GPU: copy out"]
    assert [(bar.label, bar.colour) for bar in copies] == [("copy", CLASS_COLOURS["copy"])]


def test_many_small_spans_become_few_bars() -> None:
    columns, main = Columns(), Lane("1", "1", False)
    columns.add(Kind.SPAN, "step/1", 0, 1e6, main)
    for number in range(50_000):
        columns.add(Kind.SPAN, "forward/x" if number < 25_000 else "optimizer/x", 20 * number, 10, main)
    trace = columns.finish("t", "torch", None)
    [_, (_, [compute])] = timeline(trace, find_work(trace), 0.0, 1e6)
    rows = timeline(trace, find_work(trace), 0.0, 1e6)[0][1]
    assert [len(row) for row in rows] == [1, 2]
    assert [bar.label for bar in rows[1]] == ["forward: short spans", "optimizer: short spans"]
    assert len(compute) <= 360


def test_a_bar_stays_in_its_lane() -> None:
    html = lane([Bar(0.25, 0.5, 0x123456, "a<b"), Bar(0.7, 0.7, 0, "tiny")])
    assert 'style="left:25.000%;width:25.000%;background:#123456" title="a&lt;b">a&lt;b</i>' in html
    assert 'left:70.000%;width:0.100%;background:#000000" title="tiny"></i>' in html


def test_the_roofline_has_its_points_where_they_belong() -> None:
    rank, roof = made_up_rank(), made_up_analysis().roof
    picture = roofline(rank.ops, roof)
    places = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', picture)]
    assert len(places) == 3
    intensity = [op.flops / op.num_bytes for op in rank.ops]  # longest first, as drawn
    assert [x for x, _, _ in sorted(places)] == [places[k][0] for k in np.argsort(intensity)]
    assert places[0][2] > places[1][2] > places[2][2]  # area by time
    assert picture.count('class="roof"') == 2 + 2 + 1  # a line and a name a dtype, and memory's slope
    without = roofline(rank.ops, None)
    assert without.count("<circle") == 3 and "roof" not in without.replace("roofline", "")
    assert roofline(rank.ops[:0], roof) == ""


def test_the_picture_of_memory_reaches_the_peak_and_keeps_short_ones() -> None:
    memory = made_up_memory()
    picture = memory_over_time(memory)
    assert picture.count("<polygon") == len(memory.by_owner) == 4
    heights = [float(y) for y in re.findall(r",([\d.]+)", picture)]
    floor, top = 230 - 34.0, 12.0
    assert min(heights) == pytest.approx(floor - (floor - top) / 1.05, abs=0.1)
    assert "23 MiB" in picture


@needs_chromium
def test_in_a_browser_the_page_fits_and_asks_for_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, ATTACK).read_text()
    for width in (400, 1400):
        place = tmp_path / str(width)
        place.mkdir()
        assert browse(page, place, width) == ("0 0 0", [])
    place = tmp_path / "bare"  # also without its content policy, which would only hide an attempt
    place.mkdir()
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert bare != page and browse(bare, place, 400) == ("0 0 0", [])
