"""The benchmark's judgement, on the CPU with a clock of its own: it times what is right and only that."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools

import pytest
import torch

from hybridtrain.kernels.report import bench

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_every_contest_is_right_on_small_shapes() -> None:
    ops = []
    for contest in bench.contests("cpu", scale=64):
        ops.append(contest.op)
        assert bench.errors(contest, contest.fused) < bench.BFLOAT16_ERROR, contest.op
    assert ops == ["rms_norm", "swiglu", "rope", "engram_gate", "cross_entropy", "grouped_mlp"]


def test_what_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = next(bench.contests("cpu", scale=64))
    wrong = dataclasses.replace(contest, fused=lambda x, w: contest.fused(x, w) * 1.1, others={})
    monkeypatch.setattr(bench, "contests", lambda *_: iter([wrong]))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    clock = itertools.count(1)
    rows = bench.bench("cpu", 64, seconds=lambda call: float(next(clock)))
    assert [(row["candidate"], row["right"], "seconds" in row) for row in rows] == [
        ("torch", True, True),
        ("triton", False, False),
        ("torch.compile", True, True),
    ]
    assert rows[0]["seconds"] == 3.0  # the two peaks were measured before
    assert rows[2]["speed_up"] == pytest.approx(3 / 4)
    assert rows[0]["rate"] == wrong.moved / 3
    table = bench.show(rows)
    assert "wrong: error" in table.splitlines()[3]
    assert table.count(" ms |") == 2
