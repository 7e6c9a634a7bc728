"""Learning curves and final figures out of run folders made by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.plot_runs import main, read_run

SETTINGS = "[train]\nseq_len = 64\nglobal_batch = 8\n"
SUMMARY = {
    "steps": 200,
    "params_total": 4_700_000,
    "params_active": 510_000,
    "validation_loss": 4.25,
    "validation_bits_per_byte": 1.625,
    "tokens_per_second": 12345.6,
    "layout": "dp_shard 2",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "settings.toml").write_text(SETTINGS)
    lines = [
        {"step": 100, "loss": 5.5, "expert_load": [0.5, 0.5]},
        {"step": 100, "validation_bits_per_byte": 2.5},
        {"step": 200, "loss": 4.5},
        {"step": 200, "validation_bits_per_byte": 1.625},
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 300, "lo'
    )
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in arguments])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_curve_is_over_tokens_and_leaves_out_cut_lines(run: Path) -> None:
    assert read_run(run).curve("loss") == ([100 * 8 * 64, 200 * 8 * 64], [5.5, 4.5])


def test_svg_names_runs_and_repeats_byte_for_byte(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve.svg"
    arguments = [str(out), str(run), str(run), "--label", "with Engram", "--label", "without"]
    main(arguments)
    first = out.read_bytes()
    words = "".join(ElementTree.fromstring(first).itertext())
    assert "with Engram (1.625)" in words
    assert "without (1.625)" in words
    assert "validation bits per byte" in words
    assert len(first) < 60_000
    main(arguments)
    assert out.read_bytes() == first


def test_png(run: Path, tmp_path: Path) -> None:
    main([str(tmp_path / "curve.png"), str(run), "--key", "loss"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_a_finished_and_an_unfinished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table", str(run)])
    row = capsys.readouterr().out.splitlines()[2]
    assert row == "| one | 4.7 M | 510 k | 102 k | 4.2500 | 1.6250 | 12,346 | dp_shard 2 |"
    (run / "summary.json").unlink()
    main(["--table", str(run), "--label", "unfinished"])
    assert capsys.readouterr().out.splitlines()[2] == "| unfinished |  |  | 102 k |  | 1.6250 |  |  |"


def test_refusals_are_one_message(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no is not a run folder" in refused(capsys, tmp_path / "x.svg", tmp_path / "no")
    message = refused(capsys, tmp_path / "x.svg", run, "--key", "los")
    assert 'no "los" in metrics.jsonl; it has loss, validation_bits_per_byte' in message
    assert "must end in .svg or .png" in refused(capsys, tmp_path / "x.pdf", run)
    assert "at least one run folder" in refused(capsys, tmp_path / "x.svg")
    assert "2 --label for 1 run(s)" in refused(
        capsys, tmp_path / "x.svg", run, "--label", "a", "--label", "b"
    )
    assert "cannot be written" in refused(capsys, tmp_path / "nowhere" / "x.svg", run)
    (run / "summary.json").write_text("{")
    assert "is damaged" in refused(capsys, "--table", run)
