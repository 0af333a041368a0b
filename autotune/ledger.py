"""The ledger: what was predicted, written down before it was measured, and what was measured; JSON lines, append only.

    ledger = Ledger(beside("plan.json"))
    name = ledger.predict(expectation)          on the disk before this returns
    ledger.measure(name, steps)                 once for each prediction
    ledger.pairs()                              (prediction, measurement), in order of time
    drift(ledger.pairs())                       sentences, where predictions are no longer as good as they were

A prediction's name is the hash of what it says, so one that was edited after the fact is refused. A line that a kill or a
full disk cut short is passed over and told of in `damaged`. Nothing is measured, averaged or fitted here. Layer 0 only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from vchitect_fast.architecture import TransformerConfig
from vchitect_fast.errors import UserError
from vchitect_fast.plan import Comparison, Plan, PlanEntry, Policy, Prediction, ShardSpec
from vchitect_fast.workload import DTYPE_BYTES, Workload

SCHEMA_VERSION = 1
PREDICTION, MEASUREMENT = "prediction", "measurement"
RECENT = 5  # measurements that are compared, the first and the last
# Of the range of the first errors, added on either side. Simulated: of 5 errors like the 5 before, a false alarm in 2 to 4
# of 100 for normal and heavier tails; a shift by 5 standard deviations is found in 98 of 100.
MARGIN = 0.5
DRIFTING = ("step_s", "peak_gib")


@dataclass(frozen=True)
class Expectation:
    """One entry of a Plan with what was predicted for it, and the state of things when it was."""

    plan: str  # Plan.digest()
    model: str  # fingerprints, as in the Plan
    device: str
    device_name: str
    dtype: str
    num_text_tokens: int
    mesh: dict[str, int]
    shape: str
    shard: ShardSpec
    microbatch: int
    accumulation: int
    num_chunks: int
    prefetch_depth: int
    parked: tuple[str, ...]
    policy: tuple[Policy, ...]  # one a block
    row_bytes: int  # of one [rows, D] in the compute dtype, on the fullest rank
    predicted: Prediction
    stated_error: float | None = None  # of step_s, relative, as the prediction states it; None: it states none
    commit: str | None = None  # of this package when it predicted
    time: str = ""  # UTC; set when written

    @property
    def point(self) -> str:
        """What makes two predictions the same: all that was decided and predicted, not when and by which commit."""
        return _hash(asdict(replace(self, commit=None, time="")))


@dataclass(frozen=True)
class Measurement:
    """The steps that answered a prediction."""

    num_steps: int
    measured: dict[str, float]  # medians: step_s, forward_s, backward_s, optimizer_s; peak_gib, standing_gib
    spread: dict[str, float] = field(default_factory=dict)  # (p90 - p10) / median of the seconds
    commit: str | None = None
    time: str = ""


@dataclass(frozen=True)
class Pair:
    """A prediction and its measurement."""

    expected: Expectation
    found: Measurement

    def errors(self) -> list[Comparison]:
        """Predicted beside measured, by name."""
        return self.expected.predicted.against(self.found.measured)

    def error(self, name: str) -> float | None:
        """Predicted / measured - 1 of one figure; None where it was not measured or not predicted."""
        return next((item.error for item in self.errors() if item.name == name), None)


def expect(
    plan: Plan, entry: PlanEntry, config: TransformerConfig, *, stated_error: float | None = None,
    commit: str | None = None,
) -> Expectation:  # fmt: skip
    """What the Plan says of one of its entries."""
    axis = "tokens" if entry.shard.axis == "tokens" else "frames"
    work = Workload(config, entry.video_shape, entry.microbatch, plan.num_text_tokens, plan.mesh["sp"], axis)
    return Expectation(
        plan.digest(), plan.model, plan.device, plan.device_name, plan.compute_dtype, plan.num_text_tokens,
        dict(plan.mesh), entry.shape, entry.shard, entry.microbatch, entry.accumulation, entry.num_chunks,
        entry.prefetch_depth, plan.parked, entry.policy, work.block_input_bytes(DTYPE_BYTES[plan.compute_dtype]),
        entry.predicted, stated_error, commit,
    )  # fmt: skip


def beside(plan: str | Path) -> Path:
    """plan.json -> plan.ledger.jsonl."""
    return Path(plan).with_suffix(".ledger.jsonl")


class Ledger:
    """One file; several processes may append to it. It is made with the first line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged: list[str] = []  # of the last reading: a sentence for each line passed over

    def predict(self, expected: Expectation) -> str:
        """Write the prediction and wait for the disk; its name, for `measure`. UserError when the disk refuses."""
        content = asdict(replace(expected, time=_now()))
        name = _hash(content)
        self._append({"kind": PREDICTION, "schema_version": SCHEMA_VERSION, "name": name, **content})
        return name

    def measure(self, name: str, found: Measurement) -> None:
        """Write what was measured; UserError for a prediction that is not there or was measured before."""
        expected, answers = self._read()
        if name not in expected:
            raise UserError(
                f"{self.path} has no prediction {name}; predict with this ledger first, measurements come after."
            )
        if name in answers:
            raise UserError(
                f"prediction {name} of {self.path} was measured on {answers[name].time}; predict again to measure again."
            )
        content = asdict(replace(found, time=_now()))
        self._append({"kind": MEASUREMENT, "schema_version": SCHEMA_VERSION, "name": name, **content})

    def pairs(self) -> list[Pair]:
        """Every measured prediction, in the order of the measurements; none where the file is not there yet.

        Raises UserError for a file that cannot be read, a line of another kind or schema, a prediction that was edited, or
        a measurement without its prediction.
        """
        expected, answers = self._read()
        return [Pair(expected[name], found) for name, found in answers.items()]

    def open(self) -> list[Expectation]:
        """Predictions that nobody has measured: a run was killed, or is under way."""
        expected, answers = self._read()
        return [item for name, item in expected.items() if name not in answers]

    def _read(self) -> tuple[dict[str, Expectation], dict[str, Measurement]]:
        self.damaged = []
        expected: dict[str, Expectation] = {}
        answers: dict[str, Measurement] = {}
        try:
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise UserError(f"cannot read the ledger {self.path} ({error.strerror}); name another --ledger.") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError:  # neither JSON nor UTF-8: only what was cut short
                self.damaged.append(f"line {number} of {self.path} was cut short and is passed over")
                continue
            self._take(content, f"line {number} of {self.path}", expected, answers)
        return expected, answers

    def _take(
        self, content: Any, place: str, expected: dict[str, Expectation], answers: dict[str, Measurement]
    ) -> None:
        remedy = "name a file that `vchitect-fast autotune verify` wrote as --ledger"
        if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{place} is not of a ledger of schema {SCHEMA_VERSION}; {remedy}.")
        kind, name = content.pop("kind", None), content.pop("name", None)
        content.pop("schema_version")
        try:
            if kind == PREDICTION:
                if _hash(content) != name:
                    raise UserError(
                        f"{place} is a prediction that was changed after it was made; restore the line, or begin a new ledger."
                    )
                expected[name] = _expectation(content)
            elif kind == MEASUREMENT:
                if name not in expected or name in answers:
                    why = "measured twice" if name in answers else "not there before it"
                    raise UserError(
                        f"{place} is a measurement of prediction {name}, which is {why}; {remedy}, as it was written."
                    )
                answers[name] = Measurement(**content)
            else:
                raise UserError(f"{place} is neither a prediction nor a measurement; {remedy}.")
        except (KeyError, TypeError) as error:
            raise UserError(f"{place} is not of a ledger ({error}); {remedy}.") from None

    def _append(self, content: dict[str, Any]) -> None:
        """One write, so that processes do not mix, then the disk; after a line that was cut short, on a new one."""
        line = json.dumps(content).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"could not write the ledger {self.path} ({error.strerror}); free some space or name another --ledger."
            ) from None


def drift(pairs: Sequence[Pair], recent: int = RECENT) -> list[str]:
    """Sentences for a person, none while predictions are as good as they were and as they say.

    Moved: the same point, predicted alike and measured at least 2 x `recent` times, where the median of the last errors
    lies outside the range of the first, widened by MARGIN on either side. Since the prediction did not change, the machine
    did. Worse than stated: the median of the last `recent` absolute errors of the step time, of all points of a device that
    state an error, is above the median of what they state.
    """
    found = [sentence for point in _by_point(pairs) for sentence in _moved(point, recent)]
    for device in dict.fromkeys(pair.expected.device for pair in pairs):
        found += _worse(
            [pair for pair in pairs if pair.expected.device == device and pair.expected.stated_error], recent
        )
    return found


def _by_point(pairs: Iterable[Pair]) -> list[list[Pair]]:
    ordered = sorted(pairs, key=lambda pair: pair.expected.point)  # stable: in order of time within a point
    return [list(items) for _, items in groupby(ordered, key=lambda pair: pair.expected.point)]


def has_moved(errors: Sequence[float], recent: int = RECENT) -> bool:
    """The median of the last errors lies outside the range of the first, widened by MARGIN; False where there are too few."""
    if len(errors) < 2 * recent:
        return False
    low, high = min(errors[:recent]), max(errors[:recent])
    margin = MARGIN * (high - low)
    return not low - margin <= median(errors[-recent:]) <= high + margin


def _moved(point: Sequence[Pair], recent: int) -> list[str]:
    found = []
    for name in DRIFTING:
        errors = [error for pair in point if (error := pair.error(name)) is not None]
        if not has_moved(errors, recent):
            continue
        low, high, now = min(errors[:recent]), max(errors[:recent]), median(errors[-recent:])
        expected = point[-1].expected
        found.append(
            f"{name} of {expected.shape} on {expected.device_name}: the same prediction was off by {low:+.1%} to {high:+.1%} in "
            f"the first {recent} measurements and is off by {now:+.1%} in the last {recent} (median), so the machine or its "
            "software has changed; run `vchitect-fast autotune probe` again, then plan."
        )
    return found


def _worse(pairs: Sequence[Pair], recent: int) -> list[str]:
    known = [(abs(error), pair) for pair in pairs if (error := pair.error("step_s")) is not None][-recent:]
    if len(known) < recent:
        return []
    off = median(error for error, _ in known)
    stated = median(pair.expected.stated_error or 0.0 for _, pair in known)
    if off <= stated:
        return []
    return [
        f"step_s on {known[-1][1].expected.device_name}: the last {recent} predictions are off by {off:.1%} (median) and state "
        f"{stated:.1%}; run `vchitect-fast autotune probe` again when nobody else uses the machine, or plan with --calibrate."
    ]


def _expectation(content: dict[str, Any]) -> Expectation:
    parsed = {
        "shard": ShardSpec(**content["shard"]),
        "policy": tuple(Policy(**policy) for policy in content["policy"]),
        "parked": tuple(content["parked"]),
        "predicted": Prediction(**content["predicted"]),
    }
    return Expectation(**{**content, **parsed})


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
