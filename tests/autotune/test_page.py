"""The page of a Plan: its pictures against their numbers, hostile texts without power, its fit in a browser.

The last tests need a Chromium and are skipped without one. pytest tests/autotune/test_page.py
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import browse, needs_chromium
from made_up_plan import CONFIG, explained, made_up_cluster, made_up_plan, tight

from vchitect_fast.autotune.page import plan_page, run
from vchitect_fast.autotune.pictures import COLOURS, OVER, Point, front, kind_of, near, pareto, peak, streams
from vchitect_fast.autotune.streams import Done, Timeline
from vchitect_fast.errors import UserError
from vchitect_fast.page import POLICY
from vchitect_fast.plan import OFFLOAD, Policy
from vchitect_fast.shapes import VideoShape

ATTACK = "</title><script>alert(1)</script>\"'><img src=http://example.invalid/a.png onerror=alert(2)>\u202e\x00\n&amp;"
TAGS = set(
    "html head meta title style body main h1 h2 h3 h4 p a ul li div b span i small bdi table tr th td figure figcaption svg line "
    "text circle polygon polyline".split()
)
GIB = 2**30
LIMIT = 10 * GIB
START = [(0.0, 2 * GIB)]


class Page(HTMLParser):
    """A page's tags, attributes and text, as a browser reads them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def bars(source: str) -> list[tuple[float, float, str]]:
    """(left and width in percent, tooltip) of every bar."""
    found = []
    for item in Page(source).all("i"):
        if place := re.search(r"left:([\d.]+)%;width:([\d.]+)%", item.get("style", "")):
            found.append((float(place[1]), float(place[2]), item["title"]))
    return found


def a_step(peak_bytes: int = 8 * GIB) -> Timeline:
    tasks = (
        Done("forward", "compute", 0, 2, 0), Done("copy out", "out", 2, 3, 0), Done("forward", "compute", 2, 4, 1),
        Done("copy in", "in", 4, 5, 0), Done("recompute", "compute", 4, 5, 1), Done("backward", "compute", 5, 8, 1),
        Done("backward", "compute", 8, 10, 0),
    )  # fmt: skip
    return Timeline(tasks, {"in": 0.5}, ((4.0, 6 * GIB), (5.0, peak_bytes), (10.0, 4 * GIB)))


def test_bars_stand_where_the_tasks_ran() -> None:
    found = bars(streams(a_step(), START, LIMIT))
    assert (0, 20, "forward of block 0, 2.00 s") in found
    assert (50, 30, "backward of block 1, 3.00 s") in found
    assert (20, 10, "copy out of block 0, 1.00 s") in found
    assert len(found) == 7
    text = Page(streams(a_step(), START, LIMIT)).text
    assert "copies to host memory · busy 10%, compute waits for it never" in text
    assert "copies back from host memory · busy 10%, compute waits for it 500 ms" in text
    assert "exchanges" not in text  # a stream without tasks has no row
    assert "No" not in text and Page(streams(Timeline(()), (), LIMIT)).text.strip() == "This step has no tasks."


def test_every_task_of_the_model_has_a_colour() -> None:
    _, _, found = tight()
    kinds = {kind_of(task.name) for task in found.outcome.timeline.tasks}
    assert {"forward", "backward", "recompute", "exchange", "gather", "reduce", "ends"} <= kinds <= set(COLOURS)
    assert kind_of("reduce the rest") == "reduce" and kind_of("exchange, forward") == "exchange"
    assert kind_of("novelty") == kind_of("") == "other"


def test_many_small_tasks_become_few_bars() -> None:
    tasks = [Done("forward", "compute", k / 1e4, (k + 1) / 1e4, k) for k in range(10_000)]
    found = bars(streams(Timeline(tuple(tasks)), (), LIMIT))
    assert len(found) < 20
    assert sum(width for _, width, _ in found) == pytest.approx(100, abs=1)
    mixed = [task._replace(name=("forward", "recompute")[k % 2]) for k, task in enumerate(tasks[:1800])]
    assert len(bars(streams(Timeline(tuple(mixed)), (), LIMIT))) == 1800  # another kind is never joined


@pytest.mark.parametrize("peak_bytes", [8 * GIB, 14 * GIB])
def test_the_memory_picture_has_limit_and_peak_in_their_places(peak_bytes: int) -> None:
    source = Page(streams(a_step(peak_bytes), START, LIMIT))
    [polygon], [line] = source.all("polygon"), source.all("line")
    corners = [tuple(map(float, item.split(","))) for item in polygon["points"].split()]
    height = {x: 100 - y for x, y in corners[1:-1]}
    unit = (100 - float(line["y1"])) / LIMIT  # picture units a byte
    assert height[0] == pytest.approx(2 * GIB * unit, abs=0.1)
    assert height[400] == pytest.approx(6 * GIB * unit, abs=0.1)
    assert height[500] == pytest.approx(peak_bytes * unit, abs=0.1) == max(height.values())
    assert max(height.values()) < 100
    assert polygon["fill"] == f"#{OVER if peak_bytes > LIMIT else COLOURS['forward']:06x}"
    assert f"peak {peak_bytes // GIB}.00 GiB" in source.text and "may be used: 10.00 GiB" in source.text


@pytest.mark.parametrize(("limit", "sides"), [(10, "bottom top"), (200, "bottom bottom"), (6, "top bottom")])
def test_the_words_of_limit_and_peak_stay_inside_and_apart(limit: int, sides: str) -> None:
    places = [item["style"] for item in Page(streams(a_step(), START, limit * GIB)).all("small")]
    found = [re.search(r"(top|bottom):([\d.]+)%", place) for place in places]
    assert " ".join(place[1] for place in found if place) == sides
    if sides == "bottom bottom":
        heights = [float(place[2]) for place in found if place]
        assert heights[0] - heights[1] > 20


def test_the_peak_is_drawn_by_part_against_the_limit() -> None:
    found = bars(peak({"states": 2.0, "saved": 4.0, "working": 0.0}, LIMIT))
    assert found == [(0, 20, "states 2.00 GiB"), (20, 40, "saved 4.00 GiB")]
    assert "free 4.00 GiB" in Page(peak({"states": 2.0, "saved": 4.0}, LIMIT)).text
    over = peak({"states": 2.0, "saved": 14.0}, LIMIT)
    assert bars(over)[1][:2] == (12.5, 87.5)
    assert "over the limit by 6.00 GiB" in Page(over).text


def test_the_front_joins_what_nothing_beats() -> None:
    points = [
        Point("keep", 1.0, 12 * GIB, False), Point("again", 1.5, 4 * GIB, True), Point("worse", 1.6, 5 * GIB, True),
        Point("far", 9.0, 3 * GIB, True),
    ]  # fmt: skip
    chosen = Point("chosen", 1.2, 8 * GIB, True)
    assert [point.label for point in pareto([*points, chosen])] == ["far", "again", "chosen", "keep"]
    assert [near(point, chosen, LIMIT) for point in points] == [True, True, True, False]
    source = Page(front(points, chosen, LIMIT))
    *dots, ring = source.all("circle")
    assert len(dots) == 3
    [line] = source.all("polyline")
    corners = [tuple(map(float, corner.split(","))) for corner in line["points"].split()]
    assert corners == [(float(c["cx"]), float(c["cy"])) for c in (dots[1], ring, dots[0])]
    assert float(dots[0]["cx"]) > float(ring["cx"]) > float(dots[1]["cx"])  # more memory to the right
    assert float(dots[0]["cy"]) > float(ring["cy"]) > float(dots[1]["cy"])  # longer steps above
    assert dots[0]["fill"] != dots[1]["fill"]
    assert "keep: 1.00 s, 12.00 GiB, does not fit" in source.text
    [limit] = [item for item in source.all("line") if item["class"] == "roof"]
    assert float(ring["cx"]) < float(limit["x1"]) < float(dots[0]["cx"])
    assert front([points[3]], chosen, LIMIT) == ""


def test_the_front_of_equal_choices_is_drawn() -> None:
    one = Point("one", 1.0, 8 * GIB, True)
    assert "nan" not in front([one], one, LIMIT)
    assert len(Page(front([one], one, 100 * GIB)).all("circle")) == 2


@cache
def whole_page(attack: str = ATTACK) -> str:
    """Two shapes, one of which offloads and one of which does not fit."""
    cluster = made_up_cluster(attack=attack)
    plan = made_up_plan(
        made_up_cluster(64 * GIB, attack=attack), CONFIG, VideoShape(32, 512, 384), VideoShape(8, 256, 256)
    )
    first, second = plan.entries
    other = {"choice": f"another{attack}", "step_s": 2.0, "peak_gib": 0.5, "why": f"slower{attack}"}
    entries = (
        replace(first, policy=(Policy.keep(),) * CONFIG.num_layers, runners_up=(other,)),
        replace(second, policy=(Policy(*[OFFLOAD] * 5),) * CONFIG.num_layers, prefetch_depth=2),
    )
    confidence = replace(first.predicted, confidence=f"a guess{attack}")
    entries = (replace(entries[0], predicted=confidence), entries[1])
    plan = replace(plan, entries=entries, device=cluster.device.fingerprint(), device_name=f"Made-up 1{attack}")
    return plan_page(plan, cluster, explained(cluster, plan))


def test_the_page_says_everything() -> None:
    page = Page(whole_page())
    for said in (
        "Plan for 4 x Made-up 1", "Cluster  made up", "32x512x384", "8x256x256", "visual tokens a second", "does not fit",
        "what would change it".capitalize(), "Why the others lost", "another", "slower", "What it rests on", "a guess",
        "data sheet", "50.0 GB/s, 10 us", "host memory a rank", "then the optimizer", "Choices on the same mesh",
        "All steps on this page are predicted, none was run.", "too much",
    ):  # fmt: skip
        assert said in page.text, said
    assert [item["href"] for item in page.all("a")] == ["#32x512x384", "#8x256x256"]
    assert {item["id"] for item in page.all("h2") if "id" in item} == {"32x512x384", "8x256x256"}
    assert len(page.all("polygon")) == 2


def test_a_step_of_24_layers_stays_small() -> None:
    cluster, _, _ = tight()
    config = replace(CONFIG, num_layers=24)
    plan = made_up_plan(made_up_cluster(64 * GIB), config)
    plan = replace(plan, device=cluster.device.fingerprint())
    roomy = replace(cluster, device=replace(cluster.device, memory_bytes=64 * GIB))
    source = plan_page(plan, roomy, explained(roomy, plan, config))
    assert len(source) < 130_000


def test_hostile_texts_have_no_power() -> None:
    source = whole_page()
    page = Page(source)
    tags = {name for name, _ in page.tags}
    assert tags <= TAGS
    assert page.all("meta")[1]["content"] == POLICY
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcset")]
    assert all(item["href"].startswith("#") for item in page.all("a"))
    assert page.text.count("alert(1)") >= 7  # device twice, cluster, confidence, runner-up twice, sources
    assert not {"\u202e", "\x00"} & set(source)


def arguments(folder: Path, **changed: object) -> argparse.Namespace:
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG)))
    given = {"plan": str(folder / "a.json"), "cluster": None, "model": str(folder), "json": False, "out": "plan.json"}
    return argparse.Namespace(**{**given, **changed})


def test_the_command_writes_beside_the_plan_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = made_up_cluster(64 * GIB)
    made_up_plan(cluster).save(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot read the cluster file"):
        run(arguments(tmp_path))
    cluster.save(tmp_path / "cluster.json")
    assert run(arguments(tmp_path)) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.html'}\n"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert run(arguments(tmp_path, out=str(tmp_path / "b.html"), json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(tmp_path / "b.html")}
    with pytest.raises(UserError, match=r"expected --out to be an HTML file, got .*c\.json"):
        run(arguments(tmp_path, out=str(tmp_path / "c.json")))


@needs_chromium
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_and_asks_for_nothing(tmp_path: Path, width: int) -> None:
    found, asked = browse(whole_page(), tmp_path, width)
    assert found == "0 0 0", found
    assert asked == []
