"""Bytes on the wire in a step, by group and rank, against the formulas of docs/parallelism.md: equal to the byte.

Every rank reports what its ledger counted in a run's second step, and what the formulas need: sizes of its parameters, where its
tokens were routed, which rows its tokens need. Legend: M micro-batches of B sequences, T tokens of a sequence here (under cp
a part, under tp the whole of that part), D width, K experts per token, n ranks of the group in question.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.assemble import resolve_layout
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.model.router import Router
from hybridtrain.parallel.layout import Layout
from hybridtrain.settings import Settings, layer_specs
from tests.parity.cases import settings_of
from tests.parity.runs import new_world, start_run, train_steps
from tests.ranks import run_on_ranks
from tests.training import make_data

FLOAT, INT = 4, 8
CASES = {
    2: {
        "dp_shard": ["parallel.dp_shard=2"],
        "dp_shard, resharded": ["parallel.dp_shard=2", "parallel.reshard_after_forward=true"],
        "dp_replicate": ["parallel.dp_replicate=2", "parallel.mem=1"],
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
        "dp_shard 4, ep 2": ["parallel.ep=2", "parallel.mem=2"],
        "ep 4": ["parallel.ep=4"],
        "tp 2, ep 2, etp 2": ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"],
        "tp 4": ["parallel.tp=4"],
        "cp 2, tp 2, ep 4": ["parallel.cp=2", "parallel.tp=2", "parallel.ep=4"],
        "cp 4": ["parallel.cp=4"],
        "pp 2, dp_shard 2": ["parallel.pp=2", "parallel.dp_shard=2", "train.micro_batches=4"],
        "pp 4": ["parallel.pp=4", "train.micro_batches=4"],
    },
}


@dataclass
class Facts:
    """What one rank reports of its second step."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    layers: int = 0  # bytes of this rank's parts: of parameters of layers, without experts that are sharded on their own
    root: int = 0  # of embedding, last norm and head
    experts: int = 0
    uncut: int = 0  # of those that tp does not cut
    embedding: int = 0
    asked: dict[int, int] = field(default_factory=Counter)  # (token, expert rank) pairs of all layers and micro-batches
    calls_of_experts: int = 0
    rows: list[int] = field(default_factory=list)  # distinct rows that its tokens need, by owner
    touched: int = 0  # of its own rows by anyone
    stages: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)  # layers here


def second_step(data: str, overrides: list[str], store: str) -> Facts:
    """On a rank: two steps, and what the second sent."""
    settings = settings_of(data, "train.steps=2", *overrides)
    parts, load = start_run(settings, dist.get_world_size(), dist.get_rank(), new_world(store))
    facts, layout, mesh = Facts(), parts.mesh.layout, parts.mesh
    train_steps(parts, load, 0, 1)

    def count(router: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        owner_NK = output[0] // (settings.model.moe.num_experts // layout.ep)
        for rank in range(layout.ep):
            facts.asked[rank] += int((owner_NK == rank).any(1).sum())
        facts.calls_of_experts += 1

    for module in (m for stage in parts.stages for m in stage.modules() if isinstance(m, Router)):
        module.register_forward_hook(count)
    before = mesh.traffic.entries()
    train_steps(parts, load, 1, 2)
    for (group, operation), (calls, sent) in mesh.traffic.entries().items():
        old = before.get((group, operation), (0, 0))
        facts.calls[group, operation] = calls - old[0]
        facts.bytes[group] = facts.bytes.get(group, 0) + sent - old[1]

    for stage in parts.stages:
        for name, parameter in stage.named_parameters():
            _add_parameter(facts, name, parameter, settings, layout)
        facts.columns += range(stage.part.low, stage.part.high)
    here = getattr(parts.schedule, "stages", ())
    facts.stages = [part.stage.number for part in here]
    facts.rows, facts.touched = _rows(parts, load(1)[2], settings)
    return facts


def _add_parameter(facts: Facts, name: str, parameter: Tensor, settings: Settings, layout: Layout) -> None:
    size = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
    if "experts" in name and (layout.ep > 1 or layout.tp > 1):
        facts.experts += size
    elif name.startswith("layers."):
        facts.layers += size
    else:
        facts.root += size
    facts.uncut += size if parameter.ndim == 1 or name.endswith(("router.weight", "memory.conv")) else 0
    facts.embedding += size if name == "embed.weight" else 0


def _rows(parts: Any, batch: Any, settings: Settings) -> tuple[list[int], int]:
    """From the tokens alone: which distinct rows this rank needs of each owner, and how many of its own are needed by anyone."""
    memory, mesh = parts.memory, parts.mesh
    ids = row_ids(memory.addressing, batch.tokens, batch.starts)
    if parts.positions is not None:
        ids = ids[:, :, parts.positions]
    layers = [memory.addressing.layers.index(i) for stage in parts.stages for i in stage.memory_layers]
    slots = ids.shape[-1] // mesh.tp.size
    needed = ids[..., layers, mesh.tp.rank * slots : (mesh.tp.rank + 1) * slots].unique()
    every: list[Tensor] = [needed] * mesh.world.size
    dist.all_gather_object(every, needed)
    chunk = -(-memory.addressing.num_rows // mesh.layout.mem)
    anyone = torch.cat(every).unique()
    return [int((needed // chunk == owner).sum()) for owner in range(mesh.layout.mem)], int(
        (anyone // chunk == mesh.mem.rank).sum()
    )


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
        ranks = run_on_ranks(run_all, world, data, [with_batches(o) for o in cases.values()], str(store), timeout=240)
        out |= {name: [rank[i] for rank in ranks] for i, name in enumerate(cases)}
    return out


def with_batches(overrides: list[str]) -> list[str]:
    return overrides if any(o.startswith("train.micro") for o in overrides) else [*overrides, "train.micro_batches=2"]


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, cases in CASES.items() for name in cases])
def test_bytes_of_a_step_are_those_of_the_formulas(reports: dict[str, list[Facts]], world: int, name: str) -> None:
    settings = settings_of("unused", *with_batches(CASES[world][name]))
    layout = resolve_layout(settings, world)
    ranks = reports[name]
    for rank, facts in enumerate(ranks):
        expected = Formulas(settings, layout, ranks, rank).all()
        assert {k: v for k, v in facts.bytes.items() if v} == {k: v for k, v in expected.items() if v}, f"rank {rank}"


class Formulas:
    """What rank `rank` sends in a step, in bytes by group."""

    def __init__(self, settings: Settings, layout: Layout, ranks: list[Facts], rank: int) -> None:
        self.s, self.layout, self.ranks, self.rank, self.mine = settings, layout, ranks, rank, ranks[rank]
        train = settings.train
        self.M = train.micro_batches
        self.B, self.T = train.global_batch // self.M // layout.dp, train.seq_len // layout.cp
        self.hidden = self.B * self.T * settings.model.dim * FLOAT  # of a micro-batch, whole along tp
        self.specs = [layer_specs(settings)[i] for i in self.mine.columns]

    def group(self, axis: str) -> list[int]:
        return next(group for group in self.layout.groups(axis) if self.rank in group)

    def all(self) -> dict[str, int]:
        return {
            "fsdp": self.fsdp(),
            "edp": self.edp(),
            "dp_replicate": self.dp_replicate(),
            "ep": self.ep(),
            "tp": self.tp(),
            "cp": self.cp(),
            "pp": self.pp(),
            "mem": self.mem(),
            "mem_plan": self.mem_plan(),
            "mem_replicate": self.mem_replicate(),
            "mem_replicate_plan": self.mem_replicate_plan(),
            "world": self.world(),
        }

    def padded(self, what: str, axis: str) -> int:
        """The largest part of any rank of the group: torch fills up smaller ones."""
        return max(getattr(self.ranks[rank], what) for rank in self.group(axis))

    def gathers(self) -> tuple[int, int]:
        """How often layers and root are gathered: for every micro-batch, in a pipeline once, since backward passes keep them."""
        times = self.M if self.layout.pp == 1 else 1
        return times * (2 if self.s.parallel.reshard_after_forward else 1), times

    def fsdp(self) -> int:
        """Gathers, and one reduce-scatter whatever M: (n-1)/n of the parameters each, so n-1 parts."""
        others, (layers, root) = self.layout.fsdp - 1, self.gathers()
        return others * ((layers + 1) * self.padded("layers", "fsdp") + (root + 1) * self.padded("root", "fsdp"))

    def edp(self) -> int:
        return (self.layout.edp - 1) * (self.gathers()[0] + 1) * self.padded("experts", "edp")

    def dp_replicate(self) -> int:
        """One all-reduce of this rank's part of the gradients."""
        n = self.layout.dp_replicate
        part = self.padded("layers", "fsdp") + self.padded("root", "fsdp") + self.padded("experts", "edp")
        return 2 * (n - 1) * part // n

    def ep(self) -> int:
        """Per token and other rank that has one of its experts: forward the token, its gates and expert numbers there and the sum
        back; backward the sum's gradient there, the token's and gates' back."""
        K, hidden = self.s.model.moe.top_k, self.s.model.dim * FLOAT
        group = self.group("ep")
        there = sum(self.asked(self.rank, i) for i, rank in enumerate(group) if rank != self.rank)
        here = sum(self.asked(rank, group.index(self.rank)) for rank in group if rank != self.rank)
        counts = self.mine.calls_of_experts * (len(group) - 1) * INT
        return there * (2 * hidden + K * (FLOAT + INT)) + here * (2 * hidden + K * FLOAT) + counts

    def asked(self, rank: int, place: int) -> int:
        """Copies of tokens that `rank` asks of the `place`-th rank of its ep: under etp of all tokens of its tp."""
        tp = next(group for group in self.layout.groups("tp") if rank in group)
        return sum(self.ranks[r].asked.get(place, 0) for r in (tp if self.layout.etp > 1 else [rank]))

    def tp(self) -> int:
        """(n-1)/n of a hidden state per gather or reduce-scatter, backward as much again; numbers of tokens; uncut gradients."""
        n, K, out = self.layout.tp, self.s.model.moe.top_k, 0
        if n == 1:
            return 0
        moved = {"attention": 2, "feedforward": 2, "memory": 3}
        moves = sum(moved["attention"] + moved["feedforward"] + (moved["memory"] if spec.memory else 0) for spec in self.specs)
        moves += ("first" in self.ends()) + ("last" in self.ends())
        routed = 0
        if self.layout.etp > 1:
            moe = sum(spec.feedforward == "moe" for spec in self.specs)
            moves += 2 * moe
            routed = moe * self.B * self.T * K * (2 * FLOAT + INT)  # gates both ways, expert numbers
        out += self.M * (n - 1) * (2 * moves * self.hidden + routed) // n
        if "last" in self.ends():
            out += self.M * 2 * (n - 1) * 3 * self.B * self.T * FLOAT // n
        return out + 2 * (n - 1) * self.mine.uncut // n

    def ends(self) -> set[str]:
        low, high = min(self.mine.columns), max(self.mine.columns)
        return ({"first"} if low == 0 else set()) | ({"last"} if high == len(layer_specs(self.s)) - 1 else set())

    def cp(self) -> int:
        """Keys and values of this rank's tokens to the n-1 others, and the edges of its two chunks; backward as much again."""
        attention, memory = self.s.model.attention, self.s.memory
        heads = attention.num_kv_heads // self.layout.tp
        kv = len(self.specs) * 2 * self.B * self.T * heads * attention.head_dim
        reach = (memory.conv_kernel - 1) * memory.orders[-1]
        edges = sum(spec.memory for spec in self.specs) * 2 * self.B * reach * self.s.model.dim
        return 2 * self.M * (self.layout.cp - 1) * (kv + edges) * FLOAT

    def pp(self) -> int:
        """A hidden state for every micro-batch and border to a stage elsewhere, each way; the tied embedding's gradient once."""
        if self.layout.pp == 1:
            return 0
        group = self.group("pp")
        where = {stage: rank for rank in group for stage in self.ranks[rank].stages}
        borders = sum(
            1 for stage in self.mine.stages for other in (stage - 1, stage + 1) if where.get(other, self.rank) != self.rank
        )
        ends = {where[0], where[max(where)]}
        swap = self.mine.embedding if self.rank in ends and len(ends) == 2 else 0
        return self.M * borders * self.hidden // self.layout.tp + swap

    def mem(self) -> int:
        """Asked rows to other ranks, and gradients of the rows had from others."""
        group, width = self.group("mem"), self.s.memory.head_dim * FLOAT
        place = group.index(self.rank)
        given = sum(self.ranks[rank].rows[place] for rank in group if rank != self.rank)
        return (given + self.foreign()) * width

    def foreign(self) -> int:
        """Rows that this rank needs and does not own."""
        return sum(self.mine.rows) - self.mine.rows[self.group("mem").index(self.rank)]

    def mem_plan(self) -> int:
        return (self.layout.mem - 1) * INT + self.foreign() * INT

    def mem_replicate(self) -> int:
        n = self.layout.mem_replicate
        return 2 * (n - 1) * self.mine.touched * self.s.memory.head_dim * FLOAT // n

    def mem_replicate_plan(self) -> int:
        """Every replica's wanted rows to the others, filled up to the longest list, and the lengths."""
        n = self.layout.mem_replicate
        if n == 1:
            return 0
        wanted = self.mine.bytes["mem_replicate_plan"] - 2 * (n - 1) * n * INT // n
        assert 0 < wanted <= (n - 1) * self.mine.touched * INT
        return self.mine.bytes["mem_replicate_plan"]

    def world(self) -> int:
        """float64: loss, stop flag and the layers' statistics; then two squared norms."""
        n, moe = self.layout.world, self.s.model.moe
        statistics = 2 + sum(
            (moe.num_experts + 4 if spec.feedforward == "moe" else 0) + (2 if spec.memory else 0) for spec in layer_specs(self.s)
        )
        return 2 * (n - 1) * statistics * 8 // n + 2 * (n - 1) * 2 * 8 // n
