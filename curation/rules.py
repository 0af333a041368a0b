"""Rules: what a score must be for a clip to stay, as text like "< 0.3", ">= 5", "== true". Conditions only, no scores.

A rule names a stage's score as `stage.score`. A missing score (null) satisfies no condition. The same rule is evaluated
here on one value and written as SQL for DuckDB; both read the text by the one parser below.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vchitect_fast.errors import UserError

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_RULE = re.compile(r"\s*(<=|>=|==|!=|<|>|=)\s*(true|false|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """A clip stays when its score `score` of stage `stage` compares to `value` by `sign`."""

    stage: str
    score: str
    sign: str
    value: float | bool

    @classmethod
    def parse(cls, stage: str, score: str, text: str) -> Rule:
        """Read a condition; UserError names the rule and shows an example."""
        found = _RULE.fullmatch(text)
        if not found:
            raise UserError(
                f'a rule for {stage}.{score} is a comparison with a number, true or false, got {text!r}; for example "> 5".'
            )
        sign, value = found.groups()
        return cls(stage, score, "==" if sign == "=" else sign, json.loads(value.lower()))

    def __str__(self) -> str:
        return f"{self.stage}.{self.score} {self.sign} {json.dumps(self.value)}"

    def keeps(self, value: Any) -> bool:
        """Whether a clip with this score stays; a missing score or NaN never does."""
        return value is not None and value == value and _COMPARE[self.sign](value, self.value)

    def sql(self) -> str:
        """The condition on a column named "stage.score"; NULL and NaN give false."""
        column = '"' + f"{self.stage}.{self.score}".replace('"', '""') + '"'
        sign, value = {"==": "=", "!=": "<>"}.get(self.sign, self.sign), json.dumps(self.value)
        # DuckDB orders NaN above every number; comparing with itself cannot find it there.
        finite = "" if isinstance(self.value, bool) else f" AND NOT isnan({column}::DOUBLE)"
        return f"coalesce({column} {sign} {value}{finite}, false)"
