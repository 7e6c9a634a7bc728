"""A whole run on Triton's kernels, interpreted, against one on torch: every op that settings may choose."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.run import loop
from hybridtrain.settings.tree import KernelSettings
from tests.training import ci_settings, make_data

SMALL = [
    "train.steps=3",
    "train.seq_len=8",
    "train.global_batch=2",
    "checkpoint.every=0",
    "data.vocab_size=1024",
    'model.layers=["engram+attention+moe", "engram+attention+dense"]',
    "model.moe.num_experts=4",
]
RUNS = {
    "groups and losses": [
        "model.moe.score=sigmoid",
        "model.moe.num_groups=2",
        "model.moe.aux_weight=0.01",
        "model.moe.z_weight=0.001",
        "model.moe.num_shared=1",
        "engram.weight_decay=0.1",
        "engram.optimizer=rowwise_adagrad",
        "engram.fetch=overlap",
    ],
    "narrow rows": [
        "engram.dtype=bfloat16",
        "engram.wire=float8",
        "engram.wire_gradients=float8",
        "train.micro_batches=2",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("texts") / "data")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_triton_alone_equals_one_on_torch(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda parts, split, *_: evaluate(parts, split, 1)
    )  # not all of it, interpreted

    def curve(how: str) -> list[tuple[float, float, float]]:
        kernels = [f"kernels.{op}={how}" for op in KernelSettings.model_fields]
        loop.train(ci_settings(tmp_path / how, data, *SMALL, *RUNS[name], *kernels))
        lines = [line for line in read_metrics(tmp_path / how) if "loss" in line]
        return [(line["loss"], line["grad_norm"], line["grad_norm_table"]) for line in lines]

    plain = curve("torch")
    capsys.readouterr()
    fused = curve("triton")
    header = dict(re.findall(r"op (\S+)\s+│ (.*?)\s+│", capsys.readouterr().out))
    assert {op for op in KernelSettings.model_fields if header.get(op) != "triton"} == {
        "cross_entropy"
    }  # head and loss
    assert len(plain) == 3
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
