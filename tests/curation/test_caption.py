"""The caption client against a real HTTP server on this machine: what it sends, what it scores, order, rate, its key.

Frames are real (bikes, big buck bunny); the client's clock is a made-up one, so that no test waits.
pytest tests/curation/test_caption.py
"""

from __future__ import annotations

import io
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from caption_server import KEY, Handler, Reply, Server, error, fine, pictures, said, sample, serving, small, spans
from PIL import Image
from real_video import bikes

from vchitect_fast.curation import caption as module
from vchitect_fast.curation.caption import PROMPT, Caption, NoCaption
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import Sample
from vchitect_fast.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as found:
        yield found


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def jpeg_by_default(frame: np.ndarray) -> np.ndarray:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG")  # Pillow's quality 75
    return np.asarray(Image.open(content))


# What is asked


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize(("name", "size"), [("bikes.mp4", (272, 640)), ("bigbuckbunny.mp4", (336, 597))])
def test_the_request_carries_the_frames_and_the_prompt(
    server: Server, video: bool, name: str, size: tuple[int, int]
) -> None:
    stage = Caption(server.url, "Qwen/Qwen2.5-VL-7B-Instruct", video=video, seed=7)
    span = replace(spans()[2], path=str(bikes().with_name(name)))  # frames 77..135; the bunny has 132
    if name == "bigbuckbunny.mp4":
        span = replace(span, first=20, last=119, start=0.8, end=4.8)
    expected = clip_frames(span, stage.wants(span))
    stage.score([Sample(span, expected, {})])
    [(path, headers, asked, _)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    messages = asked.pop("messages")
    media = asked.pop("media_io_kwargs", None)
    assert asked == {"model": stage.model, "max_tokens": 256, "temperature": 0, "seed": 7}
    assert [m["role"] for m in messages] == ["user"]
    assert messages[0]["content"][-1] == {"type": "text", "text": PROMPT}
    assert len(messages[0]["content"]) == (2 if video else 17)
    sent = pictures({"messages": messages})
    assert [picture.shape for picture in sent] == [(*size, 3)] * 16
    for k, picture in enumerate(sent):
        ratios = [psnr(picture, frame) for frame in expected]
        assert int(np.argmax(ratios)) == k
        assert ratios[k] > psnr(jpeg_by_default(expected[k]), expected[k])
    if video:
        assert media["video"]["fps"] == 25.0
        assert (media["video"]["total_num_frames"], media["video"]["duration"]) == (span.num_frames, span.seconds)
        assert media["video"]["do_sample_frames"] is False
        shown = [int((want.time - span.start) * 25 + 1e-6) for want in stage.wants(span)]
        assert media["video"]["frames_indices"] == shown
    else:
        assert media is None


def test_the_prompt_is_the_papers() -> None:
    assert PROMPT == (
        "Please provide a detailed description of the video, focusing on the main subjects, their actions, and the "
        "background scenes."
    )


def test_a_short_clip_shows_each_frame_once(server: Server) -> None:
    stage = Caption(server.url, "m")
    span = spans()[5]  # 7 frames
    stage.score([sample(stage, span)])
    sent = pictures(server.requests[0][2])
    assert len(sent) == 7
    every = clip_frames(span, [replace(stage.wants(span)[0], time=9.72 + k / 25 + 0.001) for k in range(7)])
    assert [int(np.argmax([psnr(picture, frame) for frame in every])) for picture in sent] == list(range(7))


# What is answered


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (fine(" A bike \n turns. "), ("A bike \n turns.", 3, False, "stop", 4100, 3)),
        (fine("A bike tur", finish="length"), ("A bike tur", 3, True, "length", 4100, 3)),
        (fine("A bike.", finish=None), ("A bike.", 2, None, None, 4100, 3)),
        (fine("A bike.", usage=None), ("A bike.", 2, False, "stop", None, None)),
        (fine("A bike.", usage={"prompt_tokens": "9", "completion_tokens": 2**63}), ("A bike.", 2, False, "stop", None, None)),
        (fine("A bike.", usage={"completion_tokens": 0, "prompt_tokens": True}), ("A bike.", 2, False, "stop", None, 0)),
        (said(200, '\n\n {"choices":[{"message":{"content":"v\u00e9lo"}}]}', kind="text/plain"), ("v\u00e9lo", 1, None, None, None, None)),
    ],
)  # fmt: skip
def test_scores(server: Server, reply: Reply, expected: tuple[Any, ...]) -> None:
    server.script = [reply]
    stage = small(server)
    [scores] = stage.score([sample(stage)])
    assert scores == dict(zip(Caption.columns, expected, strict=True))


def test_no_clips_no_request(server: Server) -> None:
    assert small(server).score([]) == []
    assert server.requests == []


# Many clips


def test_requests_run_at_once_and_answers_keep_their_order(server: Server) -> None:
    """The first three answers go out in reverse order, and only once all three requests are here."""
    arrived, done = threading.Barrier(3), [threading.Event() for _ in range(4)]
    state = {"now": 0, "most": 0}
    done[3].set()

    def reply(handler: Handler) -> None:
        with handler.server.lock:
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        mean = pictures(handler.asked)[0].mean((0, 1))
        if len(handler.server.requests) <= 3:
            place = arrived.wait(10)
            done[place + 1].wait(10)
            done[place].set()
        with handler.server.lock:
            state["now"] -= 1
        fine(json.dumps(mean.tolist()))(handler)

    server.script = [reply]
    stage = replace(small(server), concurrency=3, short_side=64)
    samples = [sample(stage, span) for span in spans()]
    found = [json.loads(scores["caption"]) for scores in stage.score(samples)]
    means = np.array([s.frames[0].mean((0, 1)) for s in samples])
    nearest = [int(np.abs(means - mean).sum(1).argmin()) for mean in found]
    assert nearest == list(range(6))
    assert state["most"] == 3


def test_one_clip_without_a_caption_costs_the_others_nothing(server: Server) -> None:
    server.script = [fine("first"), error(400, "who are you"), fine("third")]
    stage = small(server, concurrency=1)
    first, second, *rest = stage.results([sample(stage, span) for span in spans()])
    assert isinstance(first, dict) and first["caption"] == "first"
    assert isinstance(second, NoCaption) and "400: who are you" in str(second)
    assert [isinstance(scores, dict) and scores["caption"] for scores in rest] == ["third"] * 4
    assert len(server.requests) == 6
    server.requests.clear()  # the script begins anew
    with pytest.raises(NoCaption, match="400: who are you"):
        stage.score([sample(stage, span) for span in spans()])


def test_the_rate_holds_for_attempts_too(server: Server) -> None:
    server.script = [error(500, "no"), fine()]
    stage = small(server, requests_per_minute=6, concurrency=1)
    samples = [sample(stage, span) for span in spans()[:3]]
    stage.score(samples)
    stage.score(samples[:1])  # the next batch of the same process
    assert [time for *_, time in server.requests] == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_the_rate_holds_for_requests_at_once(server: Server) -> None:
    stage = small(server, requests_per_minute=30, concurrency=6)
    stage.score([sample(stage, span) for span in spans()])
    assert sorted(server.clock.waits) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]


def test_a_long_wait_of_one_clip_holds_up_no_other(server: Server) -> None:
    server.script = [error(429, "later", Retry_After="300"), fine()]
    pace = module._pace(server.url, 60.0)
    stage = small(server, requests_per_minute=60.0)
    waited = server.clock.wait_until

    def wait_until(when: float) -> None:
        if when == 300 and server.clock.time == 0:  # while the first clip waits, another asks for its place
            others.append(pace.next(1.0))
        waited(when)

    others: list[float] = []
    server.clock.wait_until = wait_until  # type: ignore[method-assign]
    stage.score([sample(stage)])
    assert others == [1.0]
    assert [time for *_, time in server.requests] == [0.0, 300.0]


# The key


def test_the_key_is_never_shown(
    server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = small(server)
    for around in (0, 275):  # the second would be cut in the middle of the key
        for reply in (
            error(401, "x" * around + f" wrong key {KEY}!"),
            said(400, f"Bearer {KEY}"),
            error(500, KEY),
            said(200, KEY),
        ):
            server.script = [reply]
            with pytest.raises(NoCaption) as caught:
                stage.score([sample(stage)])
            assert KEY[:8] not in str(caught.value)
            with pytest.raises(UserError) as refused:
                stage.check()
            assert KEY[:8] not in str(refused.value)
    server.script = [fine()]
    assert KEY not in repr(stage.score([sample(stage)])) + repr(stage) + caplog.text + "".join(capsys.readouterr())
    assert KEY.encode() not in pickle.dumps(stage)
    assert pickle.loads(pickle.dumps(stage)) == stage


def test_the_key_comes_from_the_variable_that_is_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = small(server, api_key_env="OTHER_KEY")
    stage.score([sample(stage)])
    monkeypatch.setenv("OTHER_KEY", "other\n")  # as from a file
    stage.score([sample(stage)])
    assert [headers.get("Authorization") for _, headers, *_ in server.requests] == [None, "Bearer other"]
    for bad in ("pass\u00e9", "two\nlines"):
        monkeypatch.setenv("OTHER_KEY", bad)
        with pytest.raises(UserError, match="the API key in OTHER_KEY must be printable ASCII") as caught:
            stage.score([sample(stage)])
        assert "pass" not in str(caught.value) and "lines" not in str(caught.value)
    assert len(server.requests) == 2


def test_what_decides_a_caption_is_in_the_key_of_the_scores(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Caption(server.url, "m")
    same = [
        replace(stage, url="http://elsewhere/v1"), replace(stage, api_key_env="X"), replace(stage, concurrency=2),
        replace(stage, requests_per_minute=3.0), replace(stage, timeout_s=1.0), replace(stage, deadline_s=2.0), replace(stage, retries=0),
    ]  # fmt: skip
    other = [
        replace(stage, model="n"), replace(stage, prompt="?"), replace(stage, num_frames=8), replace(stage, short_side=448),
        replace(stage, max_tokens=512), replace(stage, seed=1), replace(stage, video=True),
    ]  # fmt: skip
    assert {s.key() for s in same} == {stage.key()}
    assert len({s.key() for s in [stage, *other]}) == 8
    before = stage.key()
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert stage.key() == before


def test_the_true_clock_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    monkeypatch.setattr(module.time, "monotonic", lambda: 5.0)
    module.Clock().wait_until(7.5)
    module.Clock().wait_until(1.0)
    assert slept == [2.5, 0.0]
