"""The training loop around its steps, and every kind of model and optimizer on one rank and on two."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybridtrain.launch.local import RENDEZVOUS
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.run import loop as module
from hybridtrain.run.process_setup import join_world
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import ci_settings, loss_curve, train_here

# Each also has to shard, exchange, clip, update and validate alike on one rank and two.
KINDS = {
    "muon": ["optim.backbone=muon", "optim.schedule=wsd"],
    "no engram": ["engram.enabled=false"],
    "no experts": ['model.layers=["attention+dense", "engram+attention+dense"]', "parallel.ep=1"],
    "router": [
        "model.moe.num_shared=1",
        "model.moe.score=sigmoid",
        "model.moe.num_groups=4",
        "model.moe.top_groups=2",
        "model.moe.aux_weight=0.01",
        "model.moe.z_weight=0.001",
    ],
    "decay": [
        "engram.optimizer=rowwise_adagrad",
        "engram.weight_decay=0.1",
        "engram.boundary=stream",
        "engram.conv=false",
    ],
    "dense table": [
        "engram.optimizer=adam",
        "model.tie_embeddings=true",
        "optim.clip_norm=0.1",
        "train.micro_batches=3",
    ],
}


def train_kinds(kinds: list[Settings], folder: str) -> None:
    """On a rank: one run after the other, each with groups of its own."""
    world = dist.get_world_size()
    dist.destroy_process_group()
    for number, settings in enumerate(kinds):
        os.environ[RENDEZVOUS] = f"file://{folder}/rendezvous-{world}-{number}"
        module.train(settings)


@pytest.fixture(scope="module")
def curves(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("kinds")
    common = ["train.steps=4", "train.eval_batches=1", "optim.warmup_steps=1", "checkpoint.every=0"]
    runs: dict[int, dict[str, Path]] = {}
    for world in (1, 2):
        runs[world] = {kind: folder / f"{kind} {world}" for kind in KINDS}
        overrides = {kind: [*common, f"parallel.ep={world}", *KINDS[kind]] for kind in KINDS}
        run_on_ranks(
            train_kinds,
            world,
            [ci_settings(runs[world][k], ci_data, *overrides[k]) for k in KINDS],
            str(folder),
        )
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_alike_on_one_rank_and_two(curves: dict[int, dict[str, Path]], kind: str) -> None:
    one, two = (loss_curve(curves[world][kind]) for world in (1, 2))
    assert len(one) == 4
    assert one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-5)
    last = [read_metrics(curves[world][kind])[-1]["validation_loss"] for world in (1, 2)]
    assert last[1] == pytest.approx(last[0], rel=1e-5)


def test_no_two_kinds_are_the_same_run(curves: dict[int, dict[str, Path]]) -> None:
    ends = [loss_curve(path)[-1] for path in curves[1].values()]
    assert len({round(end, 6) for end in ends}) == len(KINDS)


def record(settings: Settings) -> list[tuple[str, int]]:
    """On a rank: which steps were loaded and trained, in order."""
    events: list[tuple[str, int]] = []
    real_load, real_step = module.BatchLoader.load, module.train_step

    def load(self: Any, step: int) -> Any:
        events.append(("load", step))
        return real_load(self, step)

    def train_step(parts: Any, step: int, *rest: Any, **named: Any) -> Any:
        events.append(("train", step))
        return real_step(parts, step, *rest, **named)

    module.BatchLoader.load = load  # type: ignore[method-assign]
    module.train_step = train_step  # type: ignore[assignment]
    train_here(settings, False)
    return events


def test_batches_are_loaded_a_few_steps_ahead_and_never_past_the_end(ci_data: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=8", "train.eval_batches=1", "train.global_batch=4", "checkpoint.every=0"]
    (events,) = run_on_ranks(record, 1, ci_settings(tmp_path / "run", ci_data, *overrides))
    assert sorted(events) == [(what, step) for what in ("load", "train") for step in range(8)]
    trained = 0
    for what, step in events:
        if what == "train":
            trained = step
        else:
            assert step <= trained + 4  # one being trained, one handed over, two waiting, one being loaded


def products_of_denormals(settings: Settings) -> list[float]:
    """On a rank: the largest of what 200,000 denormal numbers times one are, in a world of a run and before
    it.
    """
    tiny = torch.full((200_000,), 1e-40)
    before = float(tiny.mul(1.0).max())
    dist.destroy_process_group()
    join_world(settings)
    return [before, float(tiny.mul(1.0).max())]


def test_ranks_on_the_cpu_flush_denormal_numbers(ci_data: Path, tmp_path: Path) -> None:
    ((before, after),) = run_on_ranks(products_of_denormals, 1, ci_settings(tmp_path / "run", ci_data))
    assert before > 0
    assert after == 0


def test_metrics_hold_every_step_and_validation(trained: Callable[..., Path]) -> None:
    lines = read_metrics(trained(1))
    assert [(line["step"], "validation_loss" in line) for line in lines] == [
        (step, validation)
        for step in range(1, 21)
        for validation in ((False, True) if step in (10, 20) else (False,))
    ]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    assert rates[:5] == pytest.approx([0.001 * n / 5 for n in range(1, 6)])
    assert rates[-1] < rates[10] < 0.001
