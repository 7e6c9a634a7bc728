"""Bytes on the wire in a step, by group and rank, against the formulas of docs/parallelism.md: equal to the
byte.

Every rank reports what its ledger counted in a run's second step, and what the formulas need: sizes of its
parameters, where its tokens were routed, which rows its tokens need.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.model.feedforwards.moe import Router
from hybridtrain.model.lm import HybridLM
from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.zero import ReplicaEngine
from hybridtrain.run.assemble import Run
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.settings.tree import Settings
from tests.parallel.formulas import FLOAT, Facts, Formulas
from tests.parity.cases import settings_of
from tests.parity.runs import new_world, start_run, train_steps
from tests.ranks import run_on_ranks
from tests.training import make_data

CASES = {
    2: {
        "dp_shard": ["parallel.dp_shard=2"],
        "dp_shard, zero 0": ["parallel.dp_shard=2", "parallel.zero=0"],
        "dp_shard, zero 3": ["parallel.dp_shard=2", "parallel.zero=3"],
        "dp_shard, resharded": [
            "parallel.dp_shard=2",
            "parallel.zero=3",
            "parallel.reshard_after_forward=true",
        ],
        "dp_replicate": ["parallel.dp_replicate=2", "parallel.mem=1", "parallel.zero=3"],
        "ep": ["parallel.ep=2"],
        "tp": ["parallel.tp=2"],
        "cp": ["parallel.cp=2"],
        "pp": ["parallel.pp=2"],
        "pp, interleaved": ["parallel.pp=2", "parallel.schedule=interleaved", "train.micro_batches=4"],
        "pp, V-shaped": ["parallel.pp=2", "parallel.schedule=zbv", "train.micro_batches=4"],
    },
    4: {
        "dp_shard 4": ["parallel.dp_shard=4", "parallel.mem=1"],
        "dp_shard 2, dp_replicate 2, ep 2": ["parallel.dp_replicate=2", "parallel.ep=2", "parallel.mem=2"],
        "dp_shard 2, dp_replicate 2, ep 2, zero 3": [
            "parallel.dp_replicate=2",
            "parallel.ep=2",
            "parallel.mem=2",
            "parallel.zero=3",
        ],
        "dp_shard 4, ep 2": ["parallel.ep=2", "parallel.mem=2"],
        "ep 4": ["parallel.ep=4"],
        "tp 2, ep 2, etp 2": ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"],
        "tp 2, dp_shard 2, ep 2, zero 3": ["parallel.tp=2", "parallel.ep=2", "parallel.zero=3"],
        "tp 2, dp_shard 2, ep 2": ["parallel.tp=2", "parallel.ep=2"],
        "tp 4": ["parallel.tp=4"],
        "cp 2, tp 2, ep 4": ["parallel.cp=2", "parallel.tp=2", "parallel.ep=4"],
        "cp 4": ["parallel.cp=4"],
        "pp 2, dp_shard 2": ["parallel.pp=2", "parallel.dp_shard=2", "train.micro_batches=4"],
        "pp 2, dp_shard 2, zero 3": [
            "parallel.pp=2",
            "parallel.dp_shard=2",
            "train.micro_batches=4",
            "parallel.zero=3",
        ],
        "pp 4": ["parallel.pp=4", "parallel.mem=2", "train.micro_batches=4"],
    },
}


def second_step(data: str, overrides: list[str], store: str) -> Facts:
    """On a rank: two steps, and what the second sent."""
    settings = settings_of(data, "train.steps=2", *overrides)
    run, load = start_run(settings, dist.get_world_size(), dist.get_rank(), new_world(store))
    facts, layout, mesh = Facts(), run.mesh.layout, run.mesh
    train_steps(run, load, 0, 1)

    def count(router: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        owner_NK = output[0] // (settings.model.moe.num_experts // layout.ep)
        for rank in range(layout.ep):
            facts.asked[rank] += int((owner_NK == rank).any(1).sum())
        facts.calls_of_experts += 1

    for module in (m for stage in run.model_parts for m in stage.modules() if isinstance(m, Router)):
        module.register_forward_hook(count)
    before = mesh.traffic.entries()
    train_steps(run, load, 1, 2)
    for (group, operation), (calls, sent) in mesh.traffic.entries().items():
        old = before.get((group, operation), (0, 0))
        facts.calls[group, operation] = calls - old[0]
        facts.bytes[group] = facts.bytes.get(group, 0) + sent - old[1]

    for stage in run.model_parts:
        for name, parameter in stage.named_parameters():
            _add_parameter(facts, name, parameter, settings, layout)
        facts.columns += range(stage.part.low, stage.part.high)
        facts.modules += sum(isinstance(m, FSDPModule) for m in stage.modules())
    if isinstance(run.engine, ReplicaEngine):
        for bucket in run.engine.replicas.buckets:
            own = bucket.part(bucket.gradients, bucket.group.rank).nbytes
            facts.owned[bucket.group.name] = facts.owned.get(bucket.group.name, 0) + own
    here = getattr(run.schedule, "stages", ())
    facts.stages = [part.stage.number for part in here]
    assert run.table is not None
    facts.needed, facts.num_rows = _needed(run, load(1)[2]), run.table.addressing.num_rows
    return facts


def _add_parameter(facts: Facts, name: str, parameter: Tensor, settings: Settings, layout: Layout) -> None:
    size = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
    if "experts" in name and (layout.ep > 1 or layout.tp > 1):
        facts.experts += size
    elif name.startswith("layers."):
        facts.layers += size
    else:
        facts.root += size
    facts.uncut += size if parameter.ndim == 1 or name.endswith(("router.weight", "engram.conv")) else 0
    facts.embedding += size if name == "embed.weight" else 0


def _needed(run: Run, batch: Batch) -> set[int]:
    """From the tokens alone: the distinct rows that this rank needs."""
    table, tp = run.table, run.mesh.tp
    assert table is not None
    ids = row_ids(table.addressing, batch.tokens, batch.starts)
    if run.positions is not None:
        ids = ids[:, :, run.positions]
    layers = [table.addressing.layers.index(i) for stage in run.model_parts for i in stage.engram_layers]
    slots = ids.shape[-1] // tp.size
    return set(ids[..., layers, tp.rank * slots : (tp.rank + 1) * slots].unique().tolist())


def run_all(data: str, cases: list[list[str]], store: str) -> list[Facts]:
    return [second_step(data, overrides, f"{store}-{number}") for number, overrides in enumerate(cases)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_data(tmp_path_factory.mktemp("traffic") / "data"))


@pytest.fixture(scope="module")
def reports(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """Of every case, each rank's."""
    out: dict[str, list[Facts]] = {}
    for world, cases in CASES.items():
        store = tmp_path_factory.mktemp("stores") / "store"
        ranks = run_on_ranks(
            run_all, world, data, [with_batches(o) for o in cases.values()], str(store), timeout=240
        )
        out |= {name: [rank[i] for rank in ranks] for i, name in enumerate(cases)}
    return out


def with_batches(overrides: list[str]) -> list[str]:
    return (
        overrides
        if any(o.startswith("train.micro") for o in overrides)
        else [*overrides, "train.micro_batches=2"]
    )


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases]
)
def test_bytes_of_a_step_are_those_of_the_formulas(
    reports: dict[str, list[Facts]], world: int, name: str
) -> None:
    settings = settings_of("unused", *with_batches(CASES[world][name]))
    layout = resolve_layout(settings, world)
    ranks = reports[name]
    for rank, facts in enumerate(ranks):
        expected = Formulas(settings, layout, ranks, rank).all()
        assert {k: v for k, v in facts.bytes.items() if v} == {k: v for k, v in expected.items() if v}, (
            f"rank {rank}"
        )


def test_gradients_are_reduced_once_a_step_and_parameters_gathered_for_every_micro_batch(
    reports: dict[str, list[Facts]],
) -> None:
    """By calls: one per layer, and the root. With reshard_after_forward layers are gathered twice."""
    parameters = sum(p.numel() for p in HybridLM(settings_of("unused"), 1024).parameters())
    for name, gathers in (("dp_shard, zero 3", [2, 2]), ("dp_shard, resharded", [4, 2])):
        for facts in reports[name]:
            layers = facts.modules - 1
            assert facts.calls["fsdp", "reduce_scatter"] == layers + 1
            assert facts.calls["fsdp", "all_gather"] == gathers[0] * layers + gathers[1]
            assert (
                2 * (facts.layers + facts.root) == parameters * FLOAT
            )  # each of the two ranks sends the half that it has
    for facts in reports["dp_shard, zero 3"]:
        assert facts.bytes["fsdp"] == (2 + 1) * parameters * FLOAT // 2
