"""A real HTTP server on this machine that answers by a script, a made-up clock, and real clips for the caption client."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_video import bikes_clips

from vchitect_fast.curation import caption as module
from vchitect_fast.curation.caption import Caption
from vchitect_fast.curation.frames import clip_frames
from vchitect_fast.curation.stage import ClipSpan, Sample

KEY = "sk-very/secret+key=="
START = 1_700_000_000.0  # s since 1970, of the made-up clock
Reply = Callable[["Handler"], None]


class MadeUpClock(module.Clock):
    """Time passes only when somebody waits."""

    def __init__(self) -> None:
        self.time = 0.0
        self.waits: list[float] = []  # every wait's end
        self.lock = threading.Lock()

    def now(self) -> float:
        return self.time

    def date(self) -> float:
        return START + self.time

    def wait_until(self, when: float) -> None:
        with self.lock:
            self.waits.append(when)
            self.time = max(self.time, when)


class Handler(BaseHTTPRequestHandler):
    """Notes the request, then does what the server's script says."""

    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(json.loads(body))

    def do_GET(self) -> None:
        self.answer(None)

    def answer(self, asked: Any) -> None:
        self.asked = asked
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), asked, self.server.clock.now()))
        script = self.server.script
        script[min(number, len(script) - 1)](self)

    def say(self, status: int, content: bytes | str, kind: str = "application/json", **headers: str) -> None:
        content = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, clock: MadeUpClock) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.clock, self.lock, self.over = clock, threading.Lock(), threading.Event()
        self.script: list[Reply] = [fine()]  # one a request, the last for all that follow
        self.requests: list[tuple[str, dict[str, str], Any, float]] = []  # path, headers, JSON, made-up time

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args: Any) -> None:
        pass  # clients that left: some tests make them


def fine(text: Any = "a bike.", finish: Any = "stop", **more: Any) -> Reply:
    usage = {"usage": {"prompt_tokens": 4100, "completion_tokens": 3, "total_tokens": 4103}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return said(200, json.dumps({"id": "1", "choices": [choice], **usage, **more}))


def said(status: int, content: bytes | str, kind: str = "application/json", **headers: str) -> Reply:
    return lambda handler: handler.say(status, content, kind, **headers)


def error(status: int, message: str, **headers: str) -> Reply:
    return said(status, json.dumps({"error": {"message": message, "type": "x", "code": status}}), **headers)


def silent(handler: Handler) -> None:
    handler.server.over.wait(30)


def reset(handler: Handler) -> None:
    """Half an answer, then the connection is torn down."""
    half(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def half(handler: Handler) -> None:
    """Half an answer, then the end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()


def trickle(handler: Handler) -> None:
    """A blank a made-up minute, never silent for timeout_s."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(50):
        handler.server.clock.time += 60
        handler.wfile.write(b" ")
        handler.wfile.flush()
        handler.server.over.wait(0.01)


def models(*names: str) -> Reply:
    return said(200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]}))


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server in a thread; the client goes by its clock and has KEY in its environment."""
    clock = MadeUpClock()
    monkeypatch.setattr(module, "CLOCK", clock)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(clock) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def spans() -> list[ClipSpan]:
    return [
        ClipSpan(f"v-{k}", str(c.path), round(c.start * 25), round(c.end * 25) - 1, c.start, c.end, 640, 272, 25.0)
        for k, c in enumerate(bikes_clips())
    ]


def sample(stage: Caption, span: ClipSpan | None = None) -> Sample:
    span = span or spans()[1]
    return Sample(span, clip_frames(span, stage.wants(span)), {})


def small(server: Server, **more: Any) -> Caption:
    """A stage whose requests are small."""
    return Caption(server.url, "m", num_frames=1, short_side=16, **more)


def pictures(asked: Any) -> list[np.ndarray]:
    """The frames in a request, however they were sent."""
    found = []
    for part in asked["messages"][0]["content"][:-1]:
        head, _, data = part[part["type"]]["url"].partition(";base64,")
        assert head == ("data:image/jpeg" if part["type"] == "image_url" else "data:video/jpeg")
        for one in data.split(","):
            image = Image.open(io.BytesIO(base64.b64decode(one, validate=True)))
            assert image.format == "JPEG"
            found.append(np.asarray(image))
    return found
