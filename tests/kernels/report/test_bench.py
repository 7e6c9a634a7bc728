"""The benchmark's judgement, on the CPU with a clock of its own: it times what is right and only that."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from hybridtrain.kernels.ops import TRITON_OPS
from hybridtrain.kernels.report import bench, contests

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_every_op_has_a_contest_and_is_right_on_small_shapes() -> None:
    assert {contest.op for contest in contests.contests("cpu", 17, 24)} == set(TRITON_OPS)
    assert bench.wrong("cpu", 17, 24) == {}


def one(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> contests.Contest:
    """The first contest, changed, as the only one; a compiler that does nothing."""
    contest = dataclasses.replace(next(contests.contests("cpu", 32, 16)), others={}, **changes)
    monkeypatch.setattr(bench, "contests", lambda *_: iter([contest]))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    return contest


def timed(rows: list[bench.Row]) -> list[tuple[str, bool, bool]]:
    return [(row["candidate"], row["right"], "seconds" in row) for row in rows]


def test_what_is_wrong_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = next(contests.contests("cpu", 32, 16)).fused
    wrong = one(monkeypatch, fused=lambda x, w: right(x, w) * 1.1)
    clock = itertools.count(1)
    rows = bench.bench("cpu", (32, 16), seconds=lambda call: float(next(clock)))
    assert timed(rows) == [("torch", True, True), ("triton", False, False), ("torch.compile", True, True)]
    assert rows[0]["seconds"] == 3.0  # the two peaks were measured before
    assert rows[2]["speed_up"] == pytest.approx(3 / 4)
    assert rows[0]["rate"] == wrong.moved / 3
    table = bench.show(rows)
    assert "wrong: error" in table.splitlines()[3]
    assert table.count(" ms |") == 2


def test_one_wrong_shape_takes_the_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    one(monkeypatch)
    monkeypatch.setattr(bench, "wrong", lambda *_: {("rms_norm", "N=257 D=100"): 0.5})
    rows = bench.bench("cpu", (32, 16), seconds=lambda call: 1.0)
    assert timed(rows)[1] == ("triton", False, False)
    assert "| triton | wrong at another shape |" in bench.show(rows)


def test_a_wrong_shape_after_a_right_one_takes_its_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right = one(monkeypatch)
    wrong = dataclasses.replace(right, shape="other", fused=lambda x, w: right.fused(x, w) + 1)
    monkeypatch.setattr(bench, "contests", lambda _, N, D: iter([right, wrong] if N == 32 else []))
    rows = bench.bench("cpu", (32, 16), seconds=lambda call: 1.0)
    assert timed(rows)[1::3] == [("triton", False, False)] * 2
    assert [row["why"][:12] for row in rows[1::3]] == ["wrong at ano", "wrong: error"]


def test_what_is_no_number_and_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        raise TypeError("rms_norm() got an unexpected keyword\nmore")

    contest = one(monkeypatch)
    contest.others["apex"] = broken
    assert bench.errors(contest, lambda x, w: contest.fused(x, w) * torch.nan) == float("inf")
    rows = bench.bench("cpu", (32, 16), seconds=lambda call: 1.0)
    assert rows[2]["why"] == "fails: TypeError: rms_norm() got an unexpected keyword"
    integers = dataclasses.replace(contest, inputs=(torch.arange(5),), reference=lambda n: n)
    assert bench.errors(integers, lambda n: n + (n == 3)) == float("inf")
    assert bench.errors(integers, lambda n: n.clone()) == 0


def test_installed_libraries_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    layernorm = ModuleType("fla.modules.layernorm")
    calls: list[dict[str, Any]] = []

    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, bias: None, residual: Any = None, **named: Any
    ) -> Any:
        calls.append(named)
        total = x if residual is None else x + residual
        out = torch.nn.functional.rms_norm(total, weight.shape, weight, named["eps"])
        return out if residual is None else (out, total)

    layernorm.rms_norm = rms_norm  # type: ignore[attr-defined]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "fla" else real(name))
    for name, module in (
        ("fla", ModuleType("fla")),
        ("fla.modules", ModuleType("fla.modules")),
        (layernorm.__name__, layernorm),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    alone, added = itertools.islice(contests.contests("cpu", 32, 16), 2)
    assert bench.errors(alone, alone.others["fla"]) < alone.error
    assert bench.errors(added, added.others["fla"]) < added.error
    assert {call["eps"] for call in calls} == {1e-6}
    assert "liger" not in alone.others
