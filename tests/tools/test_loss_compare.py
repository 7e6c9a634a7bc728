"""The comparison of two runs' losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.loss_compare import main


def run_folder(path: Path, losses: dict[int, float]) -> str:
    path.mkdir()
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in losses.items())
    )
    return str(path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["loss_compare.py", *arguments])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    a = run_folder(tmp_path / "a", {1: 4.0, 2: 2.0})
    b = run_folder(tmp_path / "b", {1: 4.0, 2: 2.002})
    longer = run_folder(tmp_path / "c", {1: 4.0, 2: 2.0, 3: 1.0})
    assert call(monkeypatch, a, a, "--assert-equal") == 0
    assert call(monkeypatch, a, b) == 0
    assert "1.000e-03 at step 2" in capsys.readouterr().out
    assert call(monkeypatch, a, b, "--rtol", "2e-3") == 0
    assert call(monkeypatch, a, b, "--rtol", "5e-4") == 1
    assert call(monkeypatch, a, b, "--assert-equal") == 1
    assert call(monkeypatch, a, longer) == 2
    assert "2 in common" in capsys.readouterr().err
    assert call(monkeypatch, a, str(tmp_path / "none")) == 2
