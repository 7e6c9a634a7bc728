"""Pipelines of every schedule against one rank: gradients, whole runs, checkpoints, validation."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.assemble import Parts, Vocabulary, assemble, make_addressing, resolve_layout
from hybridtrain.data.batches import Batch, BatchLoader
from hybridtrain.data.shards import TokenDataset
from hybridtrain.memory import by_exchange
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.settings import Settings
from tests.ranks import run_on_ranks
from tests.training import ci_settings, make_data

AUX = ("model.moe.aux_weight=0.01", "model.moe.z_weight=0.001")  # losses that arise inside stages


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("pipeline") / "data")


def settings_of(data: Path, *overrides: str) -> Settings:
    return ci_settings(Path("unused"), data, "train.micro_batches=4", *overrides)


def build(settings: Settings) -> tuple[Parts, Batch]:
    """This rank's parts of the run, and its part of the first batch."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mesh = make_mesh(resolve_layout(settings, world), rank, torch.device("cpu"), 60)
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    parts = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, layout = settings.train, mesh.layout
    place = layout.coordinate(rank, "dp")
    loader = BatchLoader(dataset.split("train"), train.seq_len, train.global_batch, train.micro_batches, place, layout.dp, 0)
    return parts, loader.load(0)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def first_step(settings: Settings) -> dict[str, Tensor]:
    """Loss, gradients by name, and the touched rows' numbers and gradients, as this rank has them."""
    parts, batch = build(settings)
    memory = parts.memory
    assert memory is not None
    plan = memory.plan(batch)
    ((exchange, micro_batches),) = by_exchange(batch, plan, torch.device("cpu"))
    assert exchange is not None
    memory.fetch(plan, exchange)
    parts.set_mode(training=True)
    loss = parts.schedule.step(micro_batches, True, lambda _: nullcontext())
    rows = memory.new_gradient(plan)
    memory.push(exchange, rows)
    memory.exchange.reduce_replicas(rows)
    out = {"loss": loss}
    for number, stage in enumerate(parts.stages):
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            out[f"{name}@{number}" if name in out else name] = whole(parameter.grad)
    return out | {"touched": plan.touched_N + memory.low, "rows": rows}


def first_steps(settings: list[Settings]) -> list[dict[str, Tensor]]:
    return [first_step(s) for s in settings]


def assert_same_gradients(ranks: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> None:
    """Every gradient of the one-rank step is on some rank, and equal wherever it is."""
    found = set()
    for rank in ranks:
        for full, value in rank.items():
            name = full.split("@")[0]
            found.add(name)
            if name not in ("loss", "rows", "touched"):
                torch.testing.assert_close(value, reference[name], rtol=2e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    assert found == reference.keys()
    touched, order = torch.cat([rank["touched"] for rank in ranks]).sort()
    assert torch.equal(touched, reference["touched"])
    torch.testing.assert_close(torch.cat([rank["rows"] for rank in ranks])[order], reference["rows"], rtol=2e-4, atol=1e-8)
    assert sum(float(rank["loss"]) for rank in ranks) == pytest.approx(float(reference["loss"]), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied embeddings"])
def test_gradients_of_every_schedule(data: Path, tied: bool) -> None:
    model = (*AUX, f"model.tie_embeddings={str(tied).lower()}")
    reference = first_step(settings_of(data, *model))
    schedules = list(SCHEDULES)
    runs = run_on_ranks(first_steps, 2, [settings_of(data, *model, "parallel.pp=2", f"parallel.schedule={s}") for s in schedules])
    for number, schedule in enumerate(schedules):
        ranks = [rank[number] for rank in runs]
        print(schedule)
        assert_same_gradients(ranks, reference)
