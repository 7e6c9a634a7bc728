"""The exchange's benchmark: its arithmetic, and one small run on two ranks, which compares the two ways'
tables by itself.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.data.prepare import prepare
from tools.bench_exchange import Options, Way, main, render, summarise

SMALL = [
    "model.dim=16",
    "train.seq_len=16",
    "train.global_batch=8",
    "train.micro_batches=2",
    "engram.rows_per_head=300",
]


def test_ratios_are_taken_step_by_step() -> None:
    def way(name: str, times: list[float], sent: int) -> Way:
        seconds = [{"all": t, "without plan": t / 2} for t in times]
        return Way(name, lambda step: {}, seconds, {"mem": [2, sent], "mem_plan": [1, 500]})

    facts = {"lookups": 100, "unique": 60, "rows": 1000, "dim": 32}
    result = summarise(
        [way("planned", [1.0, 2.0, 4.0], 1500), way("other", [3.0, 6.0, 12.0], 3500)],
        Options(3, 0, 2, ()),
        facts,
    )
    assert result["ways"][1]["ratio"]["all"] == [
        3.0,
        3.0,
        3.0,
    ]  # the machine slowed down fourfold, the ratio did not
    assert "| other | 6000.0 | 3.00 (3.00-3.00) | 3000.0 | 3.00 (3.00-3.00) | 3 | 4 |" in render(result)


def test_small_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"text": f"all work and no play, time {n}, makes a long tale " * 9}) for n in range(30)
    ]
    text.write_text("\n".join(lines) + "\n")
    prepare([text], tmp_path / "data", vocab_size=300, progress=False)
    main(["--json", "--steps", "3", "--warmup", "1", *SMALL, f"data.path={tmp_path / 'data'}"])
    ours, other = json.loads(capfd.readouterr().out)["ways"]
    assert sum(calls for calls, _ in ours["traffic"].values()) == 4  # counts, ids, rows, gradients
    assert sum(calls for calls, _ in other["traffic"].values()) == 2 * 4  # of each of two micro-batches
    sent_ours, sent_other = (sum(sent for _, sent in way["traffic"].values()) for way in (ours, other))
    assert 0 < sent_ours < sent_other
