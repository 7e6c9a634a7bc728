"""When rows are read, and where they lie: rows that come ahead of their step give the same bits, or those of one update ago."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.assemble import Parts, Vocabulary, assemble, make_addressing, resolve_layout, table_device
from hybridtrain.data.batches import BatchLoader
from hybridtrain.data.shards import TokenDataset
from hybridtrain.evaluate import evaluate
from hybridtrain.metrics import Clock
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.parallel.rows import StepPlan
from hybridtrain.settings import Settings
from hybridtrain.train import train_step
from tests.ranks import run_on_ranks
from tests.training import ci_settings

DECAY = "memory.weight_decay=2.0"
CASES = {
    1: {
        "one": [DECAY],
        "two exchanges": [DECAY, "train.micro_batches=2", "memory.exchange_groups=2"],
    },
    2: {
        "two": [DECAY, "parallel.ep=2"],
        "two exchanges": [DECAY, "train.micro_batches=2", "memory.exchange_groups=2", "memory.checksum=true"],
        "adagrad": ["memory.optimizer=rowwise_adagrad", "memory.checksum=true"],
        "replicas": ["parallel.mem=1", DECAY],
    },
    4: {
        "four": [DECAY, "parallel.ep=2"],
        "near": [DECAY, "parallel.mem=2"],
        "far": [DECAY, "parallel.mem=2", "parallel.mem_placement=far"],
        "tp": ["parallel.tp=2", "parallel.mem=2", DECAY],
        "pp": ["parallel.pp=2", "train.micro_batches=4", DECAY],
        "pp near": ["parallel.pp=2", "train.micro_batches=4", "parallel.mem=2", DECAY],
        "pp far": ["parallel.pp=2", "train.micro_batches=4", "parallel.mem=2", "parallel.mem_placement=far", DECAY],
    },
}
STEPS = 6


@dataclass
class Run:
    """What a rank saw of some steps."""

    losses: list[float]
    validation: list[float]
    low: int
    state: dict[str, Tensor]  # this rank's own part of everything that is trained
    sent: list[int]  # bytes by step: of rows and their gradients
    due: list[int]  # the same, by the plans
    late: list[int | None]


class Rig:
    """A run's parts on this rank, stepped by hand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        alone = not dist.is_initialized()
        world, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
        device = torch.device("cpu")
        mesh = make_mesh(resolve_layout(settings, world), rank, device, 60, table_device=table_device(settings, device))
        self.dataset = TokenDataset.open(settings.data.path, verify=False)
        vocabulary = Vocabulary.of(self.dataset)
        self.parts = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
        assert self.parts.memory is not None
        self.memory = self.parts.memory
        train, dp = settings.train, mesh.layout.coordinate(rank, "dp")
        split = self.dataset.split("train")
        self.loader = BatchLoader(split, train.seq_len, train.global_batch, train.micro_batches, dp, mesh.layout.dp, 0)
        self.clock = Clock(device)

    def due(self, plan: StepPlan) -> int:
        """Bytes that a step sends: each unique row once from its owner, its gradient once to it, none to itself."""
        own, width = self.parts.mesh.mem.rank, 4 * self.settings.memory.head_dim
        foreign = [sum(part.receive) - part.receive[own] + sum(part.send) - part.send[own] for part in plan.exchanges]
        return sum(foreign) * width

    def sent(self) -> int:
        entries = self.parts.mesh.traffic.entries()
        return sum(sent for (group, what), (_, sent) in entries.items() if group in ("mem", "mem_ahead") and what == "all_to_all")

    def steps(self, first: int, last: int, validate_after: int = -1, resume: bool = False) -> Run:
        """Steps `first` to `last-1`, the last of which still reads ahead for the one after it."""
        plans = [(batch := self.loader.load(step), self.memory.plan(batch)) for step in range(first, last + 1)]
        if resume:
            self.memory.resume(plans[0][1])
        run = Run([], [], self.memory.low, {}, [], [], [])
        for number, (batch, plan) in enumerate(plans[:-1]):
            before = self.sent()
            following = plans[number + 1][1]
            here = batch.at(self.parts.positions)
            run.losses.append(train_step(self.parts, first + number, here, plan, self.clock, False, following).loss)
            run.sent.append(self.sent() - before)
            run.due.append(self.due(plan))
            run.late.append(plan.late_rows)
            if number == validate_after:
                run.validation.append(evaluate(self.parts, self.dataset.split("validation"), 1)["loss"])
        run.state = own_state(self.parts)
        return run


def own_state(parts: Parts) -> dict[str, Tensor]:
    assert parts.memory is not None
    tensors: dict[str, Any] = {"table": parts.memory.table, **parts.memory.optimizer.state}
    for number, stage in enumerate(parts.stages):
        tensors |= {f"{number}.{name}": value for name, value in stage.state_dict().items()}
    return {name: (v.to_local() if hasattr(v, "to_local") else v).clone() for name, v in tensors.items()}


def run_modes(cases: dict[str, list[Settings]]) -> dict[str, list[Run]]:
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    return {name: [Rig(s).steps(0, STEPS, validate_after=2) for s in kinds] for name, kinds in cases.items()}


MODES = ("step", "overlap", "stale", "stale")


@pytest.fixture(scope="module")
def runs(ci_data: Path) -> dict[int, dict[str, list[list[Run]]]]:
    """By world, case and mode (of MODES, but without stale for several exchanges): what every rank saw."""
    out: dict[int, dict[str, list[list[Run]]]] = {}
    for world, cases in CASES.items():
        settings = {
            name: [
                ci_settings(Path("unused"), ci_data, f"memory.fetch={mode}", *overrides)
                for mode in MODES
                if mode != "stale" or name != "two exchanges"
            ]
            for name, overrides in cases.items()
        }
        ranks = run_on_ranks(run_modes, world, settings)
        out[world] = {name: [[rank[name][mode] for rank in ranks] for mode in range(len(kinds))] for name, kinds in settings.items()}
    return out


def assert_equal_bits(ours: Run, theirs: Run) -> None:
    assert ours.losses == theirs.losses
    assert ours.validation == theirs.validation
    assert ours.state.keys() == theirs.state.keys()
    for name, value in ours.state.items():
        assert torch.equal(value, theirs.state[name]), name


IDS = [(world, name) for world, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(("world", "name"), IDS)
def test_overlap_changes_no_bit(runs: dict[int, Any], world: int, name: str) -> None:
    step, overlap, *_ = runs[world][name]
    for ours, theirs in zip(overlap, step, strict=True):
        assert_equal_bits(ours, theirs)
        assert theirs.late == [None] * STEPS
        assert ours.late[0] is None  # no plan was made before it
        assert sum(late or 0 for late in ours.late) > 0 or not any(ours.due)
