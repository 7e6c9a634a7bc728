"""Recomputation changes no bit, sends nothing twice, counts nothing twice, and keeps less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain.settings import Settings
from tests.ranks import run_on_ranks
from tests.training import Trace, ci_settings, make_data, trace, traces

MODES = ("none", "selective", "full")
LOSSES = ("model.moe.aux_weight=0.01", "model.moe.z_weight=0.001", "model.moe.num_shared=1")
LAYOUTS = {
    2: {
        "ep": ["parallel.ep=2"],
        "ep, reshard": ["parallel.ep=2", "parallel.reshard_after_forward=true"],
        "tp": ["parallel.tp=2", "parallel.ep=2"],
        "tp, etp": ["parallel.tp=2", "parallel.etp=2"],
        "cp": ["parallel.cp=2"],
        "pp": ["parallel.pp=2"],
        "pp interleaved": ["parallel.pp=2", "parallel.schedule=interleaved"],
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("recompute") / "data")


def settings_of(data: Path, *overrides: str) -> Settings:
    return ci_settings(Path("unused"), data, "train.micro_batches=2", "train.global_batch=8", *LOSSES, *overrides)


def assert_bitwise(ours: Trace, theirs: Trace) -> None:
    assert ours.losses == theirs.losses
    for mine, other in zip(
        [*ours.statistics, *ours.gradients, ours.state], [*theirs.statistics, *theirs.gradients, theirs.state], strict=True
    ):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert torch.equal(value, other[name]), name


def test_one_rank_is_bitwise_equal(data: Path) -> None:
    plain, selective, full = (trace(settings_of(data, f"train.recompute={mode}")) for mode in MODES)
    assert len(plain.gradients[0]) > 30
    assert plain.losses[-1] < plain.losses[0]
    assert_bitwise(selective, plain)
    assert_bitwise(full, plain)


@pytest.mark.parametrize("nproc", list(LAYOUTS))
def test_layouts_are_bitwise_equal_and_send_the_same(data: Path, nproc: int) -> None:
    runs = [settings_of(data, *overrides, f"train.recompute={m}") for overrides in LAYOUTS[nproc].values() for m in MODES]
    for rank in run_on_ranks(traces, nproc, runs, 2):
        for number, name in enumerate(LAYOUTS[nproc]):
            plain, selective, full = rank[3 * number : 3 * number + 3]
            for run in (selective, full):
                assert_bitwise(run, plain)
                assert run.traffic == plain.traffic, name
            exchanged = {group for group, _ in plain.traffic}
            assert exchanged >= {group for group in ("ep", "tp", "cp") if f"parallel.{group}=2" in LAYOUTS[nproc][name]}
