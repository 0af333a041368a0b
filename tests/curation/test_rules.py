"""Rules: one text, read once, gives the same verdict on a value here and on a column in DuckDB. pytest tests/curation/test_rules.py"""

from __future__ import annotations

import math
from typing import Any

import pytest

from vchitect_fast.curation.rules import Rule
from vchitect_fast.errors import UserError

VALUES: list[Any] = [
    None,
    math.nan,
    -1.0,
    0.0,
    0.29999999999999999,
    0.3,
    0.30000000000000004,
    1.0,
    5.0,
    1e9,
    math.inf,
    -math.inf,
]


@pytest.mark.parametrize(
    ("text", "sign", "value"),
    [("< 0.3", "<", 0.3), (">=5", ">=", 5), ("== true", "==", True), ("=FALSE", "==", False), ("  != -2.5e-3 ", "!=", -0.0025),
     ("> 1E3", ">", 1000.0), ("<=0", "<=", 0)],
)  # fmt: skip
def test_a_condition_is_read(text: str, sign: str, value: float | bool) -> None:
    rule = Rule.parse("static", "share", text)
    assert (rule.sign, rule.value, type(rule.value) is bool) == (sign, value, type(value) is bool)
    assert Rule.parse("static", "share", str(rule).removeprefix("static.share")) == rule


@pytest.mark.parametrize(
    "text", ["", "0.3", "> five", "> 5 s", "=> 5", "> 5; DROP TABLE clips", "> 0x10", "> nan", "~ 3", "> .5"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"a rule for static\.share is a comparison .* for example \"> 5\""):
        Rule.parse("static", "share", text)


@pytest.mark.parametrize("sign", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("number", ["0.3", "-1", "0", "1e9"])
def test_a_missing_score_satisfies_nothing_and_sql_says_the_same(sign: str, number: str) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb, of the extra [curation]")
    rule = Rule.parse("a", "b", f"{sign} {number}")
    here = [rule.keeps(value) for value in VALUES]
    assert here[:2] == [False, False]
    python = {
        "<": float.__lt__,
        "<=": float.__le__,
        ">": float.__gt__,
        ">=": float.__ge__,
        "==": float.__eq__,
        "!=": float.__ne__,
    }
    assert here[2:] == [python[sign](value, float(number)) for value in VALUES[2:]]
    query = f'SELECT {rule.sql()} FROM (SELECT unnest(?::DOUBLE[]) AS "a.b")'
    assert [row[0] for row in duckdb.execute(query, [VALUES]).fetchall()] == here


@pytest.mark.parametrize("text", ["== true", "!= true", "== false", "!= false"])
def test_true_and_false_alike(text: str) -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb, of the extra [curation]")
    rule, values = Rule.parse("a", "b", text), [None, True, False]
    here = [rule.keeps(value) for value in values]
    assert here == [False, text in ("== true", "!= false"), text in ("!= true", "== false")]
    query = f'SELECT {rule.sql()} FROM (SELECT unnest(?::BOOLEAN[]) AS "a.b")'
    assert [row[0] for row in duckdb.execute(query, [values]).fetchall()] == here


def test_a_name_cannot_leave_its_quotes() -> None:
    duckdb = pytest.importorskip("duckdb", reason="needs duckdb, of the extra [curation]")
    rule = Rule('a"', 'b" OR true --', ">", 5.0)
    assert duckdb.execute(f'SELECT {rule.sql()} FROM (SELECT 3.0 AS "a"".b"" OR true --")').fetchall() == [(False,)]
