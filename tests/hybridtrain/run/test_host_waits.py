"""How often the host waits for the device in a step: a constant, and with ranks of experts once per exchange
of tokens.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from hybridtrain.kernels.moe_swiglu import op
from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.metrics import MetricsLog
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.run.report import Report
from hybridtrain.run.resume import Reading
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import build_here, ci_settings, make_data
from tests.waits import HostWaits

SIZES = [(1, 1), (2, 1), (2, 2)]  # MoE layers, micro-batches
Waits = list[Counter[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("waits") / "data")


def run_of(folder: Path, data: Path, layers: int, micro_batches: int, *overrides: str) -> Settings:
    kinds = ["engram+attention+dense", *["attention+moe"] * layers]
    sizes = [
        f"model.layers={kinds}",
        f"train.micro_batches={micro_batches}",
        "train.global_batch=8",
        "train.seq_len=16",
    ]
    return ci_settings(folder, data, *sizes, "train.steps=4", "train.log_every=2", *overrides)


def waits_of(runs: list[Settings]) -> list[Waits]:
    """On a rank, or alone: what the main thread waits for in a step that is logged and in one that is not, by
    run.
    """
    out = []
    # the experts on the CPU read their counts, which lie there; other devices' grouped products do not
    with patch.object(op, "_one_by_one", lambda *_: False):
        for settings in runs:
            run, loader = build_here(settings)
            folder = Path(settings.run.dir)
            folder.mkdir(exist_ok=True)
            clock, log = Clock(run.mesh.device), MetricsLog(folder, run.mesh.rank, 0, settings.train.steps)
            reading = Reading(loader, run.guard, settings.run.seed, {"train": "", "validation": ""})
            report, seen = Report(run, log, folder, clock, 0, reading), []
            for step in range(3):
                batch = loader.load(step)
                plan = run.table.plan(batch) if run.table is not None else None
                with HostWaits() as waits:
                    report.step(
                        step + 1,
                        train_step(run, step, StepInput(batch.at(run.positions), plan), Hooks(clock.phase)),
                        plan,
                    )
                seen.append(waits.counts)
            log.close()
            out.append(seen[1:])  # the first step makes what later ones find
    return out


def test_one_rank_waits_once_however_many_layers_and_micro_batches(tmp_path: Path, data: Path) -> None:
    also = ("model.moe.capacity=1.1", "model.moe.aux_weight=0.01", "model.moe.num_shared=1")
    try:
        logged, plain = zip(*waits_of([run_of(tmp_path, data, *size, *also) for size in SIZES]), strict=True)
    finally:
        close_mesh()
    assert list(plain) == [{"tolist": 1}] * len(SIZES)
    assert [waits["tolist"] for waits in logged] == [2] * len(SIZES)  # and every rank's pace
    assert len({waits.total() for waits in logged}) == 1


def test_ranks_of_experts_wait_once_per_layer_and_micro_batch(tmp_path: Path, data: Path) -> None:
    runs = [run_of(tmp_path, data, *size, "parallel.ep=2") for size in (SIZES[0], SIZES[2])]
    runs.append(run_of(tmp_path, data, *SIZES[2], "parallel.ep=2", "train.recompute=full"))
    runs.append(
        run_of(
            tmp_path,
            data,
            *SIZES[2],
            "parallel.ep=2",
            "parallel.dispatch=hierarchical",
            "parallel.node_size=1",
        )
    )
    for rank in run_on_ranks(waits_of, 2, runs):
        assert [plain for _, plain in rank] == [
            {"tolist": 1 + exchanges} for exchanges in (1, 4, 4, 8)
        ]  # two hops of the last
