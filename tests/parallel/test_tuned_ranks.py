"""The tuned table is one table on all ranks, or no rank starts.

pytest tests/parallel/test_tuned_ranks.py; two gloo ranks on a GPU of a made-up name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import ranks
from tuned_tables import flash_choice, make_row, make_table

from vchitect_fast.errors import UserError
from vchitect_fast.kernels import tuned
from vchitect_fast.parallel.apply import check_tuned
from vchitect_fast.parallel.mesh import ALONE


def test_ranks_that_read_other_tables_do_not_start(tmp_path: Path) -> None:
    paths = []
    for number, block in enumerate((32, 64)):
        paths.append(str(tmp_path / f"{number}.json"))
        make_table(make_row("spatial", "dq", flash_choice(block), S=1296, N=333, C=64)).save(paths[-1])

    def said(first: str, second: str) -> list[str]:
        return ranks(2).run("tuned_tables:check_on_ranks", [first, second])

    assert said(paths[0], paths[0]) == said("none", "none") == ["", ""]
    for pair, known in (
        ((paths[0], paths[1]), "has [0-9a-f]{16} and rank 1 has [0-9a-f]{16}"),
        ((paths[0], "none"), "none"),
    ):
        errors = said(*pair)
        assert errors[0] == errors[1]
        with pytest.raises(UserError, match=f"expected one tuned table on all ranks, rank 0 .*{known}"):
            raise UserError(errors[0])
    for pair in ((paths[0], str(tmp_path / "absent.json")), (str(tmp_path / "absent.json"), paths[0])):
        errors = said(*pair)
        assert errors[0] == errors[1] and "cannot read the tuned table" in errors[0]


def test_one_process_too_refuses_a_table_that_it_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "gpu_name", lambda: "Made-up GPU 80GB")
    monkeypatch.setenv(tuned.ENVIRONMENT, str(tmp_path / "absent.json"))
    tuned.forget()
    with pytest.raises(UserError, match="cannot read the tuned table"):
        check_tuned(ALONE)
    monkeypatch.setenv(tuned.ENVIRONMENT, "none")
    tuned.forget()
    check_tuned(ALONE)
    tuned.forget()
