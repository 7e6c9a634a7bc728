"""What a rank sends in a step by the formulas of docs/parallelism.md, for test_traffic.py.

Legend: M micro-batches of B sequences, T tokens of a sequence here (under cp a part, under tp the whole of
that part), D width, K experts per token, n ranks of the group in question.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hybridtrain.parallel.layout import Layout
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings

FLOAT, INT = 4, 8


@dataclass
class Facts:
    """What one rank reports of its second step."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    modules: int = 0  # that FSDP gathers on their own
    # bytes of this rank's parts: of parameters of layers, without experts that are sharded on their own
    layers: int = 0
    root: int = 0  # of embedding, last norm and head
    experts: int = 0
    uncut: int = 0  # of those that tp does not cut
    owned: dict[str, int] = field(default_factory=dict)  # bytes by group
    embedding: int = 0
    asked: dict[int, int] = field(
        default_factory=Counter
    )  # (token, expert rank) pairs of all layers and micro-batches
    calls_of_experts: int = 0
    needed: set[int] = field(default_factory=set)  # distinct rows that its tokens need
    num_rows: int = 0  # of the whole table
    stages: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)  # layers here


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
            **(self.sharded() if self.s.parallel.zero == 3 else self.replicated()),
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

    def sharded(self) -> dict[str, int]:
        return {"fsdp": self.fsdp(), "edp": self.edp(), "dp_replicate": self.dp_replicate()}

    def replicated(self) -> dict[str, int]:
        """Each owner gets the others' gradients of its parameters, and sends what it made of them to all."""
        dense, tp = self.mine.layers + self.mine.root, self.layout.tp > 1
        held = {
            "copies": dense - self.mine.uncut if tp else dense,
            "copies_tp": self.mine.uncut if tp else 0,
            "copies_expert": self.mine.experts,
        }
        out = {}
        for group, size in held.items():
            ranks = self.group(group)
            if len(ranks) > 1 and size:
                assert sum(self.ranks[rank].owned[group] for rank in ranks) == size
                owned = self.mine.owned[group]
                out[group] = size - owned + (len(ranks) - 1) * owned
        return out

    def padded(self, what: str, axis: str) -> int:
        """The largest part of any rank of the group: torch fills up smaller ones."""
        return max(getattr(self.ranks[rank], what) for rank in self.group(axis))

    def gathers(self) -> tuple[int, int]:
        """How often layers and root are gathered: for every micro-batch, in a pipeline once, since backward
        passes keep them.
        """
        times = self.M if self.layout.pp == 1 else 1
        return times * (2 if self.s.parallel.reshard_after_forward else 1), times

    def fsdp(self) -> int:
        """Gathers, and one reduce-scatter whatever M: (n-1)/n of the parameters each, so n-1 parts."""
        others, (layers, root) = self.layout.fsdp - 1, self.gathers()
        return others * (
            (layers + 1) * self.padded("layers", "fsdp") + (root + 1) * self.padded("root", "fsdp")
        )

    def edp(self) -> int:
        return (self.layout.edp - 1) * (self.gathers()[0] + 1) * self.padded("experts", "edp")

    def dp_replicate(self) -> int:
        """One all-reduce of this rank's part of the gradients."""
        n = self.layout.dp_replicate
        part = self.padded("layers", "fsdp") + self.padded("root", "fsdp") + self.padded("experts", "edp")
        return 2 * (n - 1) * part // n

    def ep(self) -> int:
        """Per token and other rank that has one of its experts: forward the token, its gates and expert
        numbers there and the sum back; backward the sum's gradient there, the token's and gates' back."""
        K, hidden = self.s.model.moe.top_k, self.s.model.dim * FLOAT
        group = self.group("ep")
        there = sum(self.asked(self.rank, i) for i, rank in enumerate(group) if rank != self.rank)
        here = sum(self.asked(rank, group.index(self.rank)) for rank in group if rank != self.rank)
        counts = self.mine.calls_of_experts * (len(group) - 1) * 2 * INT  # of tokens, and of pairs
        return (there + here) * (2 * hidden + 2 * K * FLOAT) + counts

    def asked(self, rank: int, place: int) -> int:
        """Copies of tokens that `rank` asks of the `place`-th rank of its ep: under etp of all tokens of its
        tp.
        """
        tp = next(group for group in self.layout.groups("tp") if rank in group)
        return sum(self.ranks[r].asked.get(place, 0) for r in (tp if self.layout.etp > 1 else [rank]))

    def tp(self) -> int:
        """(n-1)/n of a hidden state per gather or reduce-scatter, backward as much again; numbers of tokens;
        uncut gradients.
        """
        n, K, out = self.layout.tp, self.s.model.moe.top_k, 0
        if n == 1:
            return 0
        moved = {"attention": 2, "feedforward": 2, "engram": 3}
        moves = sum(
            moved["attention"] + moved["feedforward"] + (moved["engram"] if spec.engram else 0)
            for spec in self.specs
        )
        moves += ("first" in self.ends()) + ("last" in self.ends())
        routed = 0
        if self.layout.etp > 1:
            moe = sum(spec.feedforward == "moe" for spec in self.specs)
            moves += 2 * moe
            routed = moe * self.B * self.T * K * 4 * FLOAT  # gates and expert numbers, and back
        out += self.M * (n - 1) * (2 * moves * self.hidden + routed) // n
        if "last" in self.ends():
            out += self.M * 2 * (n - 1) * 3 * self.B * self.T * FLOAT // n
        return out + (2 * (n - 1) * self.mine.uncut // n if self.s.parallel.zero == 3 else 0)

    def ends(self) -> set[str]:
        low, high = min(self.mine.columns), max(self.mine.columns)
        return ({"first"} if low == 0 else set()) | (
            {"last"} if high == len(layer_specs(self.s)) - 1 else set()
        )

    def cp(self) -> int:
        """Keys and values of this rank's tokens to the n-1 others, and the edges of its two chunks; backward
        as much again.
        """
        attention, engram = self.s.model.attention, self.s.engram
        heads = attention.num_kv_heads // self.layout.tp
        kv = len(self.specs) * 2 * self.B * self.T * heads * attention.head_dim
        reach = (engram.conv_kernel - 1) * engram.orders[-1]
        edges = sum(spec.engram for spec in self.specs) * 2 * self.B * reach * self.s.model.dim
        return 2 * self.M * (self.layout.cp - 1) * (kv + edges) * FLOAT

    def pp(self) -> int:
        """A hidden state for every micro-batch and border to a stage elsewhere, each way; the tied
        embedding's gradient once.
        """
        if self.layout.pp == 1:
            return 0
        group = self.group("pp")
        where = {stage: rank for rank in group for stage in self.ranks[rank].stages}
        borders = sum(
            1
            for stage in self.mine.stages
            for other in (stage - 1, stage + 1)
            if where.get(other, self.rank) != self.rank
        )
        ends = {where[0], where[max(where)]}
        swap = self.mine.embedding if self.rank in ends and len(ends) == 2 else 0
        return self.M * borders * self.hidden // self.layout.tp + swap

    def owned(self, rank: int, owner: int) -> set[int]:
        """The rows that `rank` needs of the `owner`-th of its mem."""
        chunk = -(-self.mine.num_rows // self.layout.mem)
        return {row for row in self.ranks[rank].needed if row // chunk == owner}

    def foreign(self, rank: int) -> int:
        """Distinct rows that this rank has of others."""
        return sum(
            len(self.owned(rank, self.layout.coordinate(other, "mem")))
            for other in self.group("mem")
            if other != rank
        )

    def mem(self) -> int:
        """Asked rows to other ranks, and gradients of the rows had from others."""
        place = self.layout.coordinate(self.rank, "mem")
        given = sum(len(self.owned(rank, place)) for rank in self.group("mem") if rank != self.rank)
        return (given + self.foreign(self.rank)) * self.s.engram.head_dim * FLOAT

    def mem_plan(self) -> int:
        return (self.layout.mem - 1) * INT + self.foreign(self.rank) * INT

    def wanted(self) -> list[set[int]]:
        """Of every copy of this rank's rows, those that its ranks need."""
        place, groups = self.layout.coordinate(self.rank, "mem"), self.layout.groups("mem")
        return [set[int]().union(*(self.owned(rank, place) for rank in group)) for group in groups]

    def mem_replicate(self) -> int:
        """One all-reduce of the gradients of the rows that anyone needs."""
        n, touched = self.layout.mem_replicate, set[int]().union(*self.wanted())
        return 2 * (n - 1) * len(touched) * self.s.engram.head_dim * FLOAT // n

    def mem_replicate_plan(self) -> int:
        """The wanted rows to the other copies, filled up to the longest list; before that all lists'
        lengths.
        """
        n = self.layout.mem_replicate
        return (n - 1) * max(len(rows) for rows in self.wanted()) * INT + 2 * (n - 1) * INT

    def world(self) -> int:
        """float64: loss, the flags to stop and to save, and the layers' statistics; then two squared
        norms.
        """
        n, moe = self.layout.world, self.s.model.moe
        statistics = 3 + sum(
            (moe.num_experts + 4 if spec.feedforward == "moe" else 0) + (2 if spec.engram else 0)
            for spec in layer_specs(self.s)
        )
        return 2 * (n - 1) * statistics * 8 // n + 2 * (n - 1) * 2 * 8 // n
