"""The benchmark's arithmetic, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.data.prepare import prepare
from tools.bench_checkpoint import STEPS, Options, main, render, summarise

SMALL = [
    "model.dim=16",
    "model.moe.hidden=16",
    "model.dense.hidden=16",
    "train.seq_len=16",
    "train.global_batch=4",
]


def test_ratios_are_taken_round_by_round() -> None:
    times = {**dict.fromkeys(STEPS, 2.0), "dd": 1.0, "blocked": 0.1}
    rounds = [
        {**{name: t * slower for name, t in times.items()}, "bytes": 1e9, "steps": 3.0}
        for slower in (1.0, 4.0, 9.0)
    ]
    result = summarise(rounds, Options(1, 3, 1, "", "", ()))
    assert result["times_dd"] == {
        **dict.fromkeys(STEPS, 0.5),
        "dd": 1.0,
    }  # the machine slowed down ninefold, the ratio did not
    assert result["blocked_share"] == pytest.approx(0.05)
    assert "| save | 8.00 | 0.12 | 0.50 |" in render(result)
    assert "beside 3 training steps, blocked 400 ms = 5.0% of it" in render(result)


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"all work and no play, time {n}, makes a long tale " * 9}) + "\n"
            for n in range(30)
        )
    )
    prepare([text], tmp_path / "data", vocab_size=300, progress=False)
    main(
        [
            f"data.path={tmp_path / 'data'}",
            *SMALL,
            "--rows",
            "4000",
            "--rounds",
            "2",
            "--dir",
            str(tmp_path),
            "--json",
        ]
    )
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] > 4000 * 136
    assert set(result["seconds"]) == {*STEPS, "blocked"}
    assert 0 < result["seconds"]["blocked"] < result["seconds"]["background save"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("bench")] == []
