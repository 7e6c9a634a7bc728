"""The benchmark's arithmetic, and one small run of it on data made for the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.data.prepare import prepare
from tools.bench_rows import Case, Options, main, render, summarise

SMALL = [
    "model.dim=16",
    "model.moe.hidden=16",
    "model.dense.hidden=16",
    "train.seq_len=16",
    "train.global_batch=4",
]


def test_ratios_are_taken_pair_by_pair() -> None:
    def case(name: str, times: list[float]) -> Case:
        return Case(
            name,
            lambda step, clock: {},
            {"unique_rows": 7},
            [{"step": t, "cpu": t / 2} for t in times],
            [0] * len(times),
        )

    options = Options((1, 2), 4, 0, 1, False, True, False, ())
    result = summarise([case("a", [1.0, 2.0, 4.0, 8.0]), case("b", [1.5, 3.0, 6.0, 12.0])], options)
    assert result["cases"][1]["ratio"]["median"] == pytest.approx(
        1.5
    )  # the machine slowed down eightfold, the ratio did not
    assert result["cases"][1]["seconds"] == {"step": 4.5, "cpu": 2.25}
    assert "| b | 7 | 4500.00 | 2250.00 | 1.50 (1.50-1.50) | 1.50 (1.50-1.50) |" in render(result)


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"all work and no play, time {n}, makes a long tale " * 9}) + "\n"
            for n in range(30)
        )
    )
    prepare([text], tmp_path / "data", vocab_size=300, progress=False)
    sizes = ["--rows", "200", "4000", "--steps", "2", "--warmup", "1"]
    main([f"data.path={tmp_path / 'data'}", *SMALL, *sizes, "--json"])
    whole = json.loads(capsys.readouterr().out)["cases"]
    assert [case["rows"] >= size for case, size in zip(whole, (200, 4000), strict=True)] == [True, True]
    assert set(whole[0]["seconds"]) >= {"step", "plan", "fetch", "forward", "backward", "push", "optimizer"}
    assert whole[1]["unique_rows"] >= whole[0]["unique_rows"] > 0
    main([f"data.path={tmp_path / 'data'}", *SMALL, *sizes, "--dense"])
    assert "nn.Embedding + Adam" in capsys.readouterr().out
    main(
        [
            f"data.path={tmp_path / 'data'}",
            *SMALL,
            "--rows",
            "4000",
            "--steps",
            "2",
            "--fetch",
            "step",
            "overlap",
            "--json",
        ]
    )
    step, overlap = json.loads(capsys.readouterr().out)["cases"]
    assert step["late_rows"] is None
    assert 0 < overlap["late_rows"] <= overlap["unique_rows"]
    main([f"data.path={tmp_path / 'data'}", *SMALL, *sizes, "--model-free", "--nproc", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["nproc"] == 2


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--rows", "900000000000"], "GB are free"),
        (["--dense", "--nproc", "2"], "on one rank"),
        (["--steps", "1"], "at least 2"),
        (["--fetch", "step", "stale", "--dense"], "leave --dense and --model-free out"),
        (["modle.dim=3"], "did you mean model.dim"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        assert message in capsys.readouterr().err
