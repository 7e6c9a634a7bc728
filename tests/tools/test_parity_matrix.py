"""The pages of the parity matrix: they list the runs that the matrix consists of, and a missing or foreign
line is told.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import parity_matrix
from tools.parity_matrix import Row, problems


def test_the_pages_list_the_matrix() -> None:
    assert problems() == []


def test_a_page_that_is_not_the_matrix_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parity.md", "parallelism.md"):
        shutil.copy(parity_matrix.DOCS / name, tmp_path)
    monkeypatch.setattr(parity_matrix, "DOCS", tmp_path)
    page = tmp_path / "parity.md"
    lines = page.read_text().splitlines(keepends=True)
    page.write_text("".join([*lines[:-1], lines[-1].replace("| 4 |", "| 3 |", 1)]))
    lacking, foreign = problems()
    assert lacking.startswith("docs/parity.md lacks 4 ")
    assert "which is not a run of the matrix" in foreign
    changed = Row.read(lines[-1])
    page.write_text("".join([*lines[:-1], str(Row(*changed.key, changed.loss, ("99.0",) * 5))]))
    assert problems() == [
        "the table of docs/parallelism.md is not that of docs/parity.md; run: python -m tools.parity_matrix"
    ]


def test_a_line_reads_back() -> None:
    row = Row("4", "pp 2 · tp 2 · mem 1", "zbv", "", "1.0e-07", ("1.0", "2.0", "0.1", "3.0", "0.0"))
    assert Row.read(str(row)) == row
    assert (row.worst, row.degree("tp"), row.degree("cp")) == ("3.0", 2, 1)
