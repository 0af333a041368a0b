"""Captions from a server: 16 frames of a clip and the paper's prompt to any OpenAI-compatible chat API, vLLM's for instance.

What may pass is tried again (no connection, no answer in time, HTTP 408, 409, 429 and 5xx, an answer without a caption),
waiting as long as the server asks or ever longer; anything else it refuses is an error at once, in its own words. Nothing
is made up: a clip without a caption is NoCaption, and a caption that max_tokens cut off says `truncated`. Which weights
answer is the server's word, so scores rest on the model's name. The API key is read from the environment for each request
and is in no key, table or message; redirects are not followed, so no other host gets it.

API: platform.openai.com/docs/api-reference/chat; frames as one video: docs.vllm.ai, Multimodal Inputs.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any

import numpy as np

from vchitect_fast.curation.stage import ClipSpan, Sample, Scores, Stage, Want
from vchitect_fast.errors import UserError

# The paper's, to the letter.
PROMPT = (
    "Please provide a detailed description of the video, focusing on the main subjects, their actions, "
    "and the background scenes."
)
NUM_FRAMES = 16  # the paper's
# LLaVA's 336-pixel tower; 24 patches of 14 and 12 of Qwen2-VL's 28, so that neither resizes this side again. 16 frames of
# 16:9 are about 4,000 tokens there and 0.7 MB as JPEG.
SHORT_SIDE = 336
# The paper's captions have about 200 tokens; a quarter more, so that a usual one ends by itself.
MAX_TOKENS = 256
COLUMNS: dict[str, type] = {
    "caption": str, "num_words": int, "truncated": bool, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int
}  # fmt: skip

JPEG_QUALITY = 90
AGAIN = (408, 409, 429)  # and 5xx
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts, doubled each time
MAX_ANSWER_BYTES = 4 << 20  # a caption has kilobytes
CHECK_S = 30.0
QUOTED = 300  # characters of what the server says that a message shows
NO_KEY = {"key": False}
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d+)?(/[\w./~%+-]*)?", re.ASCII)


class NoCaption(Exception):
    """A clip that the server gave no caption; the message says why, for quarantine."""


class _Again(Exception):
    """What may go well another time; `wait_s` is how long the server wants to be left alone."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class Clock:
    """The time, which tests replace."""

    def now(self) -> float:
        """Seconds from some start; never goes back."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970, UTC."""
        return time.time()

    def wait_until(self, when: float) -> None:
        """Sleeps until now() is `when`."""
        time.sleep(max(0.0, when - self.now()))


CLOCK = Clock()


@dataclass(frozen=True)
class Caption(Stage):
    """A caption by a model behind a chat API.

    url                  of the API, up to its version: http://localhost:8000/v1
    model                name under which the server knows it
    prompt               what it is asked
    num_frames           frames spread over the clip; a shorter clip shows each of its frames once
    short_side           pixels that frames are shrunk to
    max_tokens           longest answer
    seed                 sent along with temperature 0; a server need not obey
    video                send the frames as one video, with their times, as vLLM documents it; else as pictures
    api_key_env          environment variable with the API key; where it is not set, none is sent
    concurrency          most requests in flight of a process; a batch's clips are the most there can be
    requests_per_minute  of a process, attempts counted, at even distances; None: no limit
    timeout_s            of silence, after which a request is given up
    deadline_s           of a clip, from its first request, all attempts and waits counted
    retries              attempts after the first

    num_words are what blanks separate. Token counts are the server's, null where it gives none.
    """

    url: str = field(metadata=NO_KEY)
    model: str
    prompt: str = PROMPT
    num_frames: int = NUM_FRAMES
    short_side: int = SHORT_SIDE
    max_tokens: int = MAX_TOKENS
    seed: int = 0
    video: bool = False
    api_key_env: str = field(default="OPENAI_API_KEY", metadata=NO_KEY)
    concurrency: int = field(default=16, metadata=NO_KEY)
    requests_per_minute: float | None = field(default=None, metadata=NO_KEY)
    timeout_s: float = field(default=120.0, metadata=NO_KEY)
    deadline_s: float = field(default=600.0, metadata=NO_KEY)
    retries: int = field(default=6, metadata=NO_KEY)

    name = "caption"
    backend = "openai"
    version = 1
    cost = 20000
    columns = COLUMNS
    main = "num_words"

    def wants(self, span: ClipSpan) -> list[Want]:
        """`num_frames` at the middles of equal parts of the clip; never a frame twice."""
        return [Want(time_s, self.short_side) for time_s in span.spread(min(self.num_frames, span.num_frames))]

    def score(self, samples: Sequence[Sample]) -> list[Scores]:
        """Captions in the order of the samples; NoCaption for the first clip without."""
        found = self.results(samples)
        if error := next((result for result in found if isinstance(result, Exception)), None):
            raise error
        return [result for result in found if not isinstance(result, Exception)]

    def results(self, samples: Sequence[Sample]) -> list[Scores | Exception]:
        """Captions in the order of the samples, NoCaption in the place of a clip without."""
        pace = _pace(self.url, self.requests_per_minute)

        def caption(sample: Sample) -> Scores | Exception:
            try:
                return self._caption(sample, pace)
            except NoCaption as error:
                return error

        with ThreadPoolExecutor(max(1, min(self.concurrency, len(samples))), thread_name_prefix="caption") as threads:
            return list(threads.map(caption, samples))

    def check(self) -> None:
        """Asks the server once which models it serves; UserError where it does not answer or does not serve this one."""
        for name in ("num_frames", "short_side", "max_tokens", "concurrency", "retries"):
            least = 0 if name == "retries" else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} of the caption stage must be {least} or more, got {getattr(self, name)}.")
        for name in ("timeout_s", "deadline_s", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{name} of the caption stage must be more than 0, got {value}.")
        try:
            status, _, raw = self._request("models", None, CLOCK.now() + CHECK_S)
        except _Again as problem:
            raise UserError(
                f"the caption server {self.url} must answer, got {problem}; start it, or correct caption.url."
            ) from None
        served = _model_names(raw) if 200 <= status < 300 else None
        if served is None:
            raise UserError(
                f"the caption server {self.url} must list its models, got HTTP {status}: {self._quoted(raw)}; "
                f"correct caption.url (it usually ends in /v1) or the API key in {self.api_key_env}."
            )
        if self.model not in served:
            rest = f" and {len(served) - 5} more" if len(served) > 5 else ""
            raise UserError(
                f"the caption server {self.url} must serve {self.model!r}, it serves "
                f"{self._shown(', '.join(served[:5])) or 'nothing'}{rest}; correct caption.model."
            )

    def _caption(self, sample: Sample, pace: _Pace) -> Scores:
        """All attempts for one clip."""
        body = json.dumps(self._question(sample)).encode()
        CLOCK.wait_until(pace.next(CLOCK.now()))
        deadline = CLOCK.now() + self.deadline_s
        for attempt in range(1, self.retries + 2):
            try:
                status, headers, raw = self._request("chat/completions", body, deadline)
                if status in AGAIN or status >= 500:
                    raise _Again(f"HTTP {status}: {self._quoted(raw)}", retry_after_s(headers, CLOCK.date()))
                if not 200 <= status < 300:
                    raise NoCaption(f"the caption server refuses with HTTP {status}: {self._quoted(raw)}")
                return self._scores(raw)
            except _Again as problem:
                last = problem
            pause_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            again = CLOCK.now() + max(last.wait_s or 0.0, pause_s)
            if attempt > self.retries or again >= deadline:
                break
            CLOCK.wait_until(again)
            # A place is taken only when it can be used: one far ahead would hold up the other clips.
            CLOCK.wait_until(pace.next(CLOCK.now()))
            if CLOCK.now() >= deadline:
                break
        ended = "" if attempt > self.retries else f" and deadline_s={self.deadline_s:g}"
        raise NoCaption(f"no caption from the server in {attempt} attempts{ended}, the last got {last}")

    def _question(self, sample: Sample) -> dict[str, Any]:
        """The request's JSON."""
        pictures = [base64.b64encode(_jpeg(frame)).decode() for frame in sample.frames]
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "seed": self.seed,
        }
        if self.video:
            span, num = sample.span, len(pictures)
            shown = [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(pictures)}"}}]
            asked["media_io_kwargs"] = {
                "video": {
                    "fps": span.fps, "total_num_frames": span.num_frames, "duration": span.seconds,
                    "frames_indices": [int((k + 0.5) * span.num_frames / num) for k in range(num)],
                    "do_sample_frames": False,
                }
            }  # fmt: skip
        else:
            shown = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{p}"}} for p in pictures]
        asked["messages"] = [{"role": "user", "content": [*shown, {"type": "text", "text": self.prompt}]}]
        return asked

    def _scores(self, raw: bytes) -> Scores:
        """The scores in an answer; _Again where there is no caption in it."""
        try:
            answer = json.loads(raw)
            choice = answer["choices"][0]
            message = choice["message"]
            caption, refusal = message["content"], message.get("refusal")
            if caption is not None:
                caption = caption.strip()
                caption.encode()  # half a surrogate is legal JSON and no text: no table could hold it
            finish, usage = choice.get("finish_reason"), answer.get("usage")
            (finish or "").encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Again(f"an answer without a caption: {self._quoted(raw)}") from None
        if not caption:
            raise _Again(f"a refusal: {self._shown(str(refusal))}" if refusal else "an empty caption")
        return {
            "caption": caption,
            "num_words": len(caption.split()),
            "truncated": None if finish is None else finish == "length",
            "finish_reason": finish,
            "prompt_tokens": _count(usage, "prompt_tokens"),
            "completion_tokens": _count(usage, "completion_tokens"),
        }

    def _request(self, path: str, body: bytes | None, deadline: float) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, content) of one request, whatever the status; _Again where none came whole or in time."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._base()}/{path}", data=body, headers=headers)
        content, limit_s = io.BytesIO(), min(self.timeout_s, max(deadline - CLOCK.now(), 0.01))
        try:
            with _opener().open(request, timeout=limit_s) as answer:
                # Piece by piece: a server that trickles would never be silent for timeout_s.
                while piece := answer.read1(1 << 16):
                    content.write(piece)
                    if content.tell() > MAX_ANSWER_BYTES:
                        raise _Again(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
                    if CLOCK.now() > deadline:
                        raise _Again("an answer that did not end in time")
                if answer.length:
                    raise _Again(f"an answer that breaks off {answer.length} bytes before its end")
                return answer.status, answer.headers, content.getvalue()
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error  # urllib wraps what the system says
            if isinstance(cause, TimeoutError):
                raise _Again(f"nothing for {limit_s:g} s") from None
            raise _Again(self._shown(f"{type(cause).__name__}: {cause}")) from None

    def _base(self) -> str:
        if not URL.fullmatch(self.url):
            # A password or a token in it would be in every message that names it.
            shown = re.sub(r"//.*@", "//***@", re.split(r"[?#]", self.url)[0])
            raise UserError(
                f"caption.url must be http(s)://HOST:PORT/v1 without name, password or query, got {shown!r}; "
                f"the API key goes into the environment variable {self.api_key_env}."
            )
        return self.url.rstrip("/")

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()  # a key from a file ends in a new line
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"the API key in {self.api_key_env} must be printable ASCII, got other characters; set it again."
            )
        return key

    def _quoted(self, raw: bytes) -> str:
        """What an answer says, in one short line: the error's message if it has one."""
        text = raw.decode("utf-8", "replace")
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, TypeError, RecursionError):
            pass  # not in OpenAI's form: as it is
        return self._shown(text) or "(nothing)"

    def _shown(self, text: str) -> str:
        """Foreign text in one short printable line. Servers repeat what they were sent: the key is hidden, before the cut."""
        key = self._key()
        text = (text.replace(key, "***") if key else text)[: 4 * QUOTED]
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:QUOTED]


class _Pace:
    """Even distances between the requests of a process to a server."""

    def __init__(self, distance_s: float) -> None:
        self._distance_s = distance_s
        self._free = -math.inf
        self._lock = threading.Lock()

    def next(self, earliest: float) -> float:
        """When a request that wants to start at `earliest` may; the place is then taken."""
        with self._lock:
            when = max(earliest, self._free)
            self._free = when + self._distance_s
            return when


@lru_cache(maxsize=16)
def _pace(url: str, requests_per_minute: float | None) -> _Pace:
    return _Pace(60.0 / requests_per_minute if requests_per_minute else 0.0)


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Gives every answer back as it is: 4xx and 5xx with their text, 3xx without going there."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_AnyStatus)


def retry_after_s(headers: Mapping[str, str], date: float) -> float | None:
    """Seconds that the header Retry-After asks for, as a number or as a date; None where it says nothing that is one.

    date: now, in seconds since 1970.
    """
    text = headers.get("Retry-After") or ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - date
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _model_names(raw: bytes) -> list[str] | None:
    try:
        return [str(model["id"]) for model in json.loads(raw)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _count(usage: Any, name: str) -> int | None:
    found = usage.get(name) if isinstance(usage, dict) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63 else None


def _jpeg(frame: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()
