"""The caption client when its server misbehaves in every way that is written down here, and what check() refuses.

The clock is a made-up one, so that no test waits for an attempt. pytest tests/curation/test_caption_trouble.py
"""

from __future__ import annotations

import email.utils
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from caption_server import (
    KEY,
    START,
    Reply,
    Server,
    error,
    fine,
    half,
    models,
    reset,
    said,
    sample,
    serving,
    silent,
    small,
    trickle,
)  # fmt: skip

from vchitect_fast.curation.caption import Caption, NoCaption, retry_after_s
from vchitect_fast.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as found:
        yield found


# What goes wrong, and goes well the next time


@pytest.mark.parametrize(
    "trouble",
    [
        error(500, "out of memory"), error(502, "bad gateway"), error(503, "loading"), error(529, "overloaded"),
        error(408, "timeout"), error(409, "conflict"), error(429, "slow down"),
        said(500, ""), said(503, b"\xff\xfe", kind="text/html"),
        silent, reset, half, trickle,
        said(200, ""), said(200, "{"), said(200, "<html>hello</html>", kind="text/html"), said(200, "null"), said(200, "[]"),
        said(200, "{}"), said(200, '{"choices": []}'), said(200, '{"choices": [{}]}'), said(200, '{"choices": [{"message": null}]}'),
        said(200, '{"choices": [{"message": {}}]}'), said(200, "[" * 100_000), said(200, b" " * (5 << 20)),
        fine(None), fine(""), fine(" \n"), fine(["a"]), fine(7), fine("\ud800"), fine(finish=3), fine(finish="\ud800"),
    ],
)  # fmt: skip
def test_one_failure_is_tried_again(server: Server, trouble: Reply) -> None:
    server.script = [trouble, fine("well")]
    stage = small(server, timeout_s=0.25, deadline_s=6000)
    [scores] = stage.score([sample(stage)])
    assert scores["caption"] == "well"
    assert len(server.requests) == 2
    assert server.requests[0][2] == server.requests[1][2]


def test_waits_double_up_to_a_minute_with_chance(server: Server) -> None:
    server.script = [error(500, "no")]
    stage = small(server, retries=9)
    with pytest.raises(NoCaption, match=r"in 10 attempts, the last got HTTP 500: no$"):
        stage.score([sample(stage)])
    waits = np.diff([time for *_, time in server.requests])
    whole = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert all(w / 2 <= found <= w for w, found in zip(whole, waits, strict=True)), waits
    assert len({round(found / w, 9) for w, found in zip(whole, waits, strict=True)}) > 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0), ("0", 0.0), ("-5", 0.0), ("1.5", 1.5), ("", None), ("soon", None), ("nan", None), ("inf", None),
        (email.utils.formatdate(START + 90, usegmt=True), 90.0), (email.utils.formatdate(START - 90, usegmt=True), 0.0),
        ("Fri, 99 Foo 2023 00:00:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert retry_after_s({"Retry-After": value}, START) == seconds
    assert retry_after_s({}, START) is None


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["100", email.utils.formatdate(START + 100, usegmt=True)])
def test_the_server_says_how_long_to_wait(server: Server, status: int, value: str) -> None:
    server.script = [error(status, "later", Retry_After=value), fine()]
    stage = small(server)
    stage.score([sample(stage)])
    assert [time for *_, time in server.requests] == [0.0, 100.0]


def test_a_wait_past_the_deadline_is_not_begun(server: Server) -> None:
    server.script = [error(429, "tomorrow", Retry_After="86400")]
    stage = small(server)
    with pytest.raises(NoCaption, match="in 1 attempts and deadline_s=600, the last got HTTP 429: tomorrow"):
        stage.score([sample(stage)])
    assert len(server.requests) == 1
    assert server.clock.time == 0


def test_a_place_past_the_deadline_is_not_used(server: Server) -> None:
    server.script = [error(500, "no")]
    stage = small(server, requests_per_minute=0.1)
    with pytest.raises(NoCaption, match="in 1 attempts and deadline_s=600, the last got HTTP 500: no"):
        stage.score([sample(stage)])
    assert len(server.requests) == 1


def test_the_deadline_counts_everything(server: Server) -> None:
    server.script = [trickle]
    stage = small(server, deadline_s=150, retries=50)
    with pytest.raises(
        NoCaption, match="in 1 attempts and deadline_s=150, the last got an answer that did not end in time"
    ):
        stage.score([sample(stage)])
    server.script = [error(500, "no")]
    server.requests.clear()
    with pytest.raises(NoCaption, match="deadline_s=150, the last got HTTP 500"):
        stage.score([sample(stage)])
    assert 8 <= len(server.requests) <= 10  # waits of 1, 2, 4, .. 32, 60, 60 s, each by half to all, fill 150 s


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (silent, r"nothing for 0\.05 s"),
        (half, "an answer that breaks off 987 bytes before its end"),
        (said(200, b" " * (5 << 20)), "an answer of more than 4 MiB"),
        (said(200, "<html>\n Welcome\x1b[31m </html>", kind="text/html"), r"without a caption: <html> Welcome \[31m </html>"),
        (said(200, '{"choices": []}'), r'without a caption: {"choices": \[\]}'),
        (fine(""), "an empty caption"),
        (said(200, '{"choices":[{"message":{"content":null,"refusal":"I cannot."}}]}'), "a refusal: I cannot."),
        (error(500, "\ud800 word " * 1000), "HTTP 500: word word"),
        (said(500, ""), r"HTTP 500: \(nothing\)"),
        (said(500, '{"error": "plain"}'), "HTTP 500: plain"),
    ],
)  # fmt: skip
def test_what_never_goes_well_ends_with_the_reason(server: Server, reply: Reply, message: str) -> None:
    server.script = [reply]
    stage = small(server, timeout_s=0.05, retries=2)
    with pytest.raises(
        NoCaption, match=f"no caption from the server in 3 attempts, the last got .*{message}"
    ) as caught:
        stage.score([sample(stage)])
    assert len(server.requests) == 3
    assert len(str(caught.value)) < 400
    str(caught.value).encode()


def test_a_server_that_is_gone_is_tried_again_and_named(server: Server) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        stage = replace(small(server, retries=3), url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
    with pytest.raises(NoCaption, match="in 4 attempts, the last got ConnectionRefusedError"):
        stage.score([sample(stage)])


@pytest.mark.parametrize("status", [301, 302, 307, 400, 401, 403, 404, 413, 422])
def test_a_refusal_is_final_and_a_redirect_is_not_followed(server: Server, status: int) -> None:
    server.script = [error(status, "the model does not see pictures", Location="/v1/elsewhere"), fine()]
    stage = small(server)
    with pytest.raises(
        NoCaption, match=f"^the caption server refuses with HTTP {status}: the model does not see pictures$"
    ):
        stage.score([sample(stage)])
    assert [path for path, *_ in server.requests] == ["/v1/chat/completions"]


# check()


def test_check_asks_once_and_takes_a_served_model(server: Server) -> None:
    server.script = [models("other", "m")]
    Caption(f"{server.url}/", "m").check()
    [(path, headers, _, _)] = server.requests
    assert path == "/v1/models"
    assert headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (models("a", "b"), "must serve 'm', it serves a, b; correct caption.model"),
        (models(*"abcdefgh"), "must serve 'm', it serves a, b, c, d, e and 3 more; correct"),
        (models(), "must serve 'm', it serves nothing; correct"),
        (
            error(401, "no such key"),
            r"must list its models, got HTTP 401: no such key; correct caption.url .*OPENAI_API_KEY",
        ),
        (error(404, "nothing here"), r"must list its models, got HTTP 404: nothing here; .*ends in /v1"),
        (said(200, "<html>hello</html>"), "must list its models, got HTTP 200: <html>hello</html>"),
        (said(200, '{"data": [7]}'), "must list its models"),
        (half, "must answer, got an answer that breaks off"),
        (silent, r"must answer, got nothing for 0\.2 s; start it"),
    ],
)
def test_check_refuses(server: Server, reply: Reply, message: str) -> None:
    server.script = [reply]
    with pytest.raises(UserError, match=f"the caption server http://127.0.0.1:.*/v1 {message}"):
        small(server, timeout_s=0.2).check()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "field",
    [
        {"num_frames": 0}, {"short_side": 0}, {"max_tokens": 0}, {"concurrency": 0}, {"retries": -1},
        {"timeout_s": 0.0}, {"deadline_s": float("nan")}, {"requests_per_minute": 0.0},
    ],
)  # fmt: skip
def test_check_refuses_parameters(server: Server, field: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(field))} of the caption stage must be .*, got"):
        replace(small(server), **field).check()
    assert server.requests == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:8000/v1", "localhost:8000/v1"), ("ftp://host/v1", "ftp://host/v1"), ("http://", "http://"), ("", ""),
        ("http://me:hush@host/v1", "http://***@host/v1"), ("http://host/v1?key=hush", "http://host/v1"),
        ("http://host/v1#hush", "http://host/v1"), ("http://[::1/v1", "http://[::1/v1"), ("http://ho st/v1", "http://ho st/v1"),
        ("file:///etc/passwd", "file:///etc/passwd"),
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_refused_without_its_secrets(server: Server, url: str, shown: str) -> None:
    stage = replace(small(server), url=url)
    for work in (stage.check, lambda: stage.score([sample(stage)])):
        with pytest.raises(UserError, match=r"caption.url must be http\(s\)://HOST:PORT/v1") as caught:
            work()
        assert repr(shown) in str(caught.value)
        assert "hush" not in str(caught.value)
