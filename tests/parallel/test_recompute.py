"""Recomputation changes no bit, sends nothing twice, counts nothing twice, and keeps less."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.errors import SettingsError
from hybridtrain.monitor.clock import Clock
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import assert_bitwise, build_here, ci_settings, make_data, trace, traces
from tools.bench_layers import PeakBytes

MODES = ("none", "selective", "full")
LOSSES = ("model.moe.aux_weight=0.01", "model.moe.z_weight=0.001", "model.moe.num_shared=1")
LAYOUTS = {
    "ep": ["parallel.ep=2"],
    "tp": ["parallel.tp=2", "parallel.ep=2"],
    "cp": ["parallel.cp=2"],
    "pp": ["parallel.pp=2"],
}
MORE = {
    "ep, reshard": ["parallel.ep=2", "parallel.zero=3", "parallel.reshard_after_forward=true"],
    "tp, etp": ["parallel.tp=2", "parallel.etp=2"],
    "pp interleaved": ["parallel.pp=2", "parallel.schedule=interleaved"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("recompute") / "data")


def settings_of(data: Path, *overrides: str) -> Settings:
    return ci_settings(
        Path("unused"), data, "train.micro_batches=2", "train.global_batch=8", *LOSSES, *overrides
    )


def test_one_rank_is_bitwise_equal(data: Path) -> None:
    plain, selective, full = (trace(settings_of(data, f"train.recompute={mode}")) for mode in MODES)
    assert len(plain.gradients[0]) > 30
    assert plain.losses[-1] < plain.losses[0]
    assert_bitwise(selective, plain)
    assert_bitwise(full, plain)


@pytest.mark.parametrize(
    "layouts", [LAYOUTS, pytest.param(MORE, marks=pytest.mark.parity)], ids=["few", "more"]
)
def test_layouts_are_bitwise_equal_and_send_the_same(data: Path, layouts: dict[str, list[str]]) -> None:
    runs = [
        settings_of(data, *overrides, f"train.recompute={m}") for overrides in layouts.values() for m in MODES
    ]
    for rank in run_on_ranks(traces, 2, runs, 2):
        for number, name in enumerate(layouts):
            plain, selective, full = rank[3 * number : 3 * number + 3]
            for run in (selective, full):
                assert_bitwise(run, plain)
                assert run.traffic == plain.traffic, name
            exchanged = {group for group, _ in plain.traffic}
            assert exchanged >= {
                group for group in ("ep", "tp", "cp") if f"parallel.{group}=2" in layouts[name]
            }


def test_less_is_kept(data: Path) -> None:
    """At most so many bytes of tensors at a time in a step, forward to optimizer."""
    model = (
        "model.layers=['4*attention+dense','2*engram+attention+moe']",
        "train.micro_batches=1",
        "engram.rows_per_head=100",
    )
    peaks = []
    for mode in MODES:
        run, loader = build_here(
            settings_of(data, *model, "train.global_batch=16", f"train.recompute={mode}")
        )
        assert run.table is not None
        for step in range(2):  # optimizers make their state in the first
            batch = loader.load(step)
            plan = run.table.plan(batch)
            with PeakBytes() as peak:
                train_step(run, step, StepInput(batch, plan), Hooks(Clock(run.mesh.device).phase))
        peaks.append(peak.peak)
    none, selective, full = peaks
    assert none > 5e6
    assert selective < 0.7 * none
    assert full < 0.35 * none


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv", "dualpipev"])
def test_schedules_that_go_back_in_parts_are_refused(data: Path, schedule: str) -> None:
    overrides = ["parallel.pp=2", f"parallel.schedule={schedule}", "train.micro_batches=4"]
    settings_of(data, *overrides)
    with pytest.raises(SettingsError) as error:
        settings_of(data, *overrides, "train.recompute=full")
    assert error.value.problems == [
        f"train.recompute=full: parallel.schedule={schedule} goes back through a layer in parts and would "
        "run it again for each; it may be none, or parallel.schedule one of gpipe, 1f1b, interleaved"
    ]
