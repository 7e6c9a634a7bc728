"""The layout of a run: which rank stands where on every axis, and whether the model fits. Pure Python, no
torch.

Dense mesh `pp × dp_replicate × dp_shard × cp × tp`, slowest axis first (tp neighbours are neighbouring
ranks). Experts fold over `dp_shard × cp × tp` as `edp × ep × etp`, with `ep` = `ep_inter × ep_intra` where
tokens are dispatched over nodes first; lookup tables fold over all ranks as `mem_replicate × mem`, or, where
`mem_placement` is strided, as `mem × mem_replicate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from hybridtrain.choices import MemPlacement

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "edp", "ep", "etp")
NODE_AXES = ("pp", "dp_replicate", "edp", "ep_inter", "ep_intra", "etp")
MEM_AXES = ("mem_replicate", "mem")
ALONG = {
    "dp": ("dp_replicate", "dp_shard"),
    "fsdp": ("dp_shard", "cp"),
    # ranks that hold a parameter where dp_shard and cp do not cut it: one that tp cuts, one that tp does not
    # cut, and experts
    "copies": ("dp_replicate", "dp_shard", "cp"),
    "copies_tp": ("dp_replicate", "dp_shard", "cp", "tp"),
    "copies_expert": ("dp_replicate", "edp"),
}


class LayoutError(ValueError):
    """The layout is impossible for this number of ranks or this model; lists every violation, one a line."""

    def __init__(self, world: int, violations: Sequence[str]) -> None:
        self.violations = list(violations)
        ranks = "1 rank" if world == 1 else f"{world} ranks"
        super().__init__("\n".join([f"layout does not fit {ranks}", *(f"  {v}" for v in self.violations)]))


def _none() -> Mapping[str, int]:
    return {}


@dataclass(frozen=True)
class ExpertFacts:
    """The experts of one component, whose section is `of`; `multiple` is what grouped products make `hidden`
    a multiple of, elements of 16 bytes, on every rank of etp."""

    number: int
    hidden: int
    of: str = "model.moe"
    multiple: int = 4


@dataclass(frozen=True)
class ModelFacts:
    """The numbers of the model and of the run that a layout must divide. None: the model has no such part.

    divides: numbers by their keys that tp must divide
    reach: how many tokens left of its own a component looks at, by the key of the part that looks
    whole_sequences: components that see sequences in a way that no exchange under cp serves
    experts: of every component that has some
    sharded: whether data-parallel ranks cut parameters
    """

    global_batch: int
    micro_batches: int
    seq_len: int
    num_layers: int
    dim: int
    table_rows: int | None
    divides: Mapping[str, int] = field(default_factory=_none)
    reach: Mapping[str, int] = field(default_factory=_none)
    whole_sequences: tuple[str, ...] = ()
    experts: tuple[ExpertFacts, ...] = ()
    sharded: bool = True


@dataclass(frozen=True)
class Degrees:
    """What is asked of the axes, before the number of ranks is known.

    dp_shard: -1 takes the ranks that the other axes leave; mem: -1 takes all
    node_size: neighbouring ranks that make a node, over which tokens are dispatched hierarchically if ep
        reaches over several nodes; 0: dispatch is flat
    mem_placement: whether the owners of a table are neighbouring ranks or spread evenly over all ranks
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    mem: int = -1
    etp: int = 1
    node_size: int = 0
    mem_placement: MemPlacement = "contiguous"


_DEFAULTS = Degrees()


@dataclass(frozen=True)
class Layout:
    """Degrees of all axes for `world` ranks, fully resolved (no -1). Build it with `resolve`."""

    world: int
    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    mem: int
    etp: int = 1
    ep_inter: int = 1  # nodes that the ranks of ep are on, where dispatch is hierarchical
    mem_placement: MemPlacement = "contiguous"

    @classmethod
    def resolve(cls, world: int, asked: Degrees = _DEFAULTS) -> Layout:
        """The layout of `world` ranks with these degrees; of dp_shard alone where none are given.

        Raises LayoutError listing every violation of the ranks' arithmetic.
        """
        others = asked.pp * asked.dp_replicate * asked.cp * asked.tp
        ep, etp, node_size = asked.ep, asked.etp, asked.node_size
        layout = cls(
            world,
            asked.pp,
            asked.dp_replicate,
            asked.dp_shard if asked.dp_shard != -1 else max(1, world // others),
            asked.cp,
            asked.tp,
            ep,
            world if asked.mem == -1 else asked.mem,
            etp,
            max(1, ep * etp // node_size) if node_size else 1,
            asked.mem_placement,
        )
        out: list[str] = []
        if others * layout.dp_shard != world:
            named = [f"{a} {getattr(layout, a)}" for a in DENSE_AXES if getattr(layout, a) > 1]
            mend = (
                f"set dp_shard={world // others} or dp_shard=-1"
                if world % others == 0
                else _mend_world(layout, others)
            )
            out.append(
                f"parallel: {' x '.join(named) or 'all axes 1'} = {others * layout.dp_shard} ranks, "
                f"not {world}; {mend}"
            )
        if etp not in (1, asked.tp):
            out.append(f"parallel.etp={etp} is neither 1 nor tp; etp may be {choices(sorted({1, asked.tp}))}")
        elif layout.ep < 1 or layout.expert_ranks % layout.ep:
            out.append(
                f"parallel.ep={ep} does not divide {layout._fold} = {layout.expert_ranks}; "
                f"ep may be {choices(divisors(layout.expert_ranks))}"
            )
        elif node_size and node_size % (ep * etp) and (ep * etp % node_size or node_size % etp):
            legal = choices([d for d in divisors(ep * etp) if d % etp == 0])
            out.append(
                f"parallel.node_size={node_size} (0 takes LOCAL_WORLD_SIZE) cuts through the ep x etp = "
                f"{ep * etp} ranks of a set of experts; node_size may be {legal} or a multiple of "
                f"{ep * etp}, or set parallel.dispatch=flat"
            )
        if layout.mem < 1 or world % layout.mem:
            out.append(
                f"parallel.mem={asked.mem} does not divide the {world} ranks; mem may be -1, "
                f"{choices(divisors(world))}"
            )
        if out:
            raise LayoutError(world, out)
        return layout

    @property
    def expert_ranks(self) -> int:
        """Ranks that whole experts, or under etp groups that share their width, fold over."""
        return self.dp_shard * self.cp * (self.tp if self.etp == 1 else 1)

    @property
    def _fold(self) -> str:
        return "dp_shard x cp x tp" if self.etp == 1 else "dp_shard x cp"

    @property
    def fsdp(self) -> int:
        """Ranks that dense parameters are sharded over: those that see different tokens, but for the
        replicas.
        """
        return self.dp_shard * self.cp

    @property
    def edp(self) -> int:
        """Copies of an expert among the ranks that experts fold over."""
        return self.expert_ranks // self.ep

    @property
    def ep_intra(self) -> int:
        """Ranks of ep that are on one node."""
        return self.ep // self.ep_inter

    @property
    def mem_replicate(self) -> int:
        """Copies of the lookup table."""
        return self.world // self.mem

    @property
    def mem_axes(self) -> tuple[str, ...]:
        """The axes of the tables, slowest first: contiguous, a group is neighbouring ranks; strided, ranks
        spread evenly over all ranks.
        """
        return MEM_AXES if self.mem_placement == "contiguous" else MEM_AXES[::-1]

    @property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    def shape(self, axes: Sequence[str]) -> tuple[int, ...]:
        return tuple(int(getattr(self, axis)) for axis in axes)

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands on `axis` (any of the dense, expert or table axes, or `dp`)."""
        if axis == "dp":
            return self.coordinate(rank, "dp_replicate") * self.dp_shard + self.coordinate(rank, "dp_shard")
        axes = next(axes for axes in (DENSE_AXES, EXPERT_AXES, NODE_AXES, self.mem_axes) if axis in axes)
        sizes = self.shape(axes)
        place = axes.index(axis)
        return rank // prod(sizes[place + 1 :]) % sizes[place]

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of ranks that differ only on `axis`, or on the axes that it has in `ALONG`, each in the
        order of their coordinate.
        """
        along = ALONG.get(axis, (axis,))
        axes = next(a for a in (DENSE_AXES, EXPERT_AXES, NODE_AXES, MEM_AXES) if {*along} <= {*a})
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            found.setdefault(tuple(self.coordinate(rank, a) for a in axes if a not in along), []).append(rank)
        return list(found.values())

    def row_bounds(self, num_rows: int) -> list[int]:
        """Owner i of `mem` owners has rows `bounds[i]` to `bounds[i+1]-1` of the packed table (`Shard(0)`
        chunks).
        """
        chunk = -(-num_rows // self.mem)
        return [min(i * chunk, num_rows) for i in range(self.mem + 1)]

    def check(self, facts: ModelFacts, others: Sequence[str] = ()) -> None:
        """Raise LayoutError listing every way in which the model does not fit this layout, and violations
        found elsewhere.
        """
        out: list[str] = []
        sequences = facts.global_batch // facts.micro_batches
        if sequences % self.dp:
            fitting = _next_multiple(facts.global_batch, self.dp * facts.micro_batches)
            out.append(
                f"parallel: dp_replicate x dp_shard = {self.dp} does not divide the {sequences} sequences of "
                f"a micro-batch (train.global_batch={facts.global_batch} / "
                f"train.micro_batches={facts.micro_batches}); it may be {choices(divisors(sequences))}, or "
                f"set train.global_batch={fitting}"
            )
        out += self._expert_problems(facts)
        tokens = "train.seq_len" if self.cp == 1 else "train.seq_len / cp"
        for key, number in {**facts.divides, tokens: facts.seq_len // self.cp}.items():
            if number % self.tp:
                out.append(
                    f"parallel.tp={self.tp} does not divide {key}={number}; tp may be "
                    f"{choices(divisors(number))}"
                )
        out += self._context_problems(facts)
        # tp cuts one dim of a matrix, so FSDP cuts the other, evenly
        if facts.sharded and self.tp > 1 and facts.dim % self.fsdp:
            out.append(
                f"parallel: dp_shard x cp = {self.fsdp} does not divide model.dim={facts.dim}, as it must "
                f"under tp; it may be {choices(divisors(facts.dim))}"
            )
        if self.pp > facts.num_layers:
            out.append(
                f"parallel.pp={self.pp} exceeds the model's {facts.num_layers} layers; pp may be 1 to "
                f"{facts.num_layers}"
            )
        if facts.table_rows is not None and facts.table_rows < self.mem:
            out.append(
                f"parallel.mem={self.mem} exceeds the table's {facts.table_rows} rows; set "
                "engram.rows_per_head higher or mem=1"
            )
        out += others
        if out:
            raise LayoutError(self.world, out)

    def _expert_problems(self, facts: ModelFacts) -> list[str]:
        """The degrees that do not divide the experts or their widths."""
        if not facts.experts:
            axes = {"ep": self.ep, "etp": self.etp}
            return [
                f"parallel.{axis}={degree} but no layer of model.layers is moe; {axis} may be 1"
                for axis, degree in axes.items()
                if degree > 1
            ][:1]
        out = [
            f"parallel.ep={self.ep} does not divide {experts.of}.num_experts={experts.number}; "
            f"ep may be {choices(divisors(experts.number))}"
            for experts in facts.experts
            if experts.number % self.ep
        ]
        if facts.sharded and not out and (self.ep > 1 or self.tp > 1) and facts.dim % self.edp:
            out.append(
                f"parallel: edp = {self._fold} / ep = {self.edp} does not divide model.dim={facts.dim}; "
                f"edp may be {choices(divisors(facts.dim))}"
            )
        for experts in facts.experts:
            if self.etp > 1 and experts.hidden % (experts.multiple * self.etp):
                fitting = _next_multiple(experts.hidden, experts.multiple * self.etp)
                out.append(
                    f"parallel.etp={self.etp} cuts {experts.of}.hidden={experts.hidden} into parts that are "
                    f"not multiples of {experts.multiple}, as grouped products need; set "
                    f"{experts.of}.hidden={fitting} or etp=1"
                )
        return out

    def _context_problems(self, facts: ModelFacts) -> list[str]:
        """Why the model does not fit sequences that are spread over cp."""
        if self.cp == 1:
            return []
        out = [
            f"parallel.cp={self.cp}: {name} sees a sequence in a way that no exchange serves; cp may be 1"
            for name in facts.whole_sequences
        ]
        if facts.seq_len % (2 * self.cp):
            legal = [d // 2 for d in divisors(facts.seq_len) if d % 2 == 0] or [1]
            out.append(
                f"parallel.cp={self.cp}: 2 x cp does not divide train.seq_len={facts.seq_len}; cp may be "
                f"{choices(legal)}"
            )
            return out
        chunk = facts.seq_len // (2 * self.cp)
        for of, reach in facts.reach.items():
            if reach > chunk:
                without = " or engram.conv=false" if of == "engram.conv" else ""
                out.append(
                    f"parallel.cp={self.cp} leaves chunks of {chunk} tokens, fewer than the {reach} of "
                    f"{of}'s reach; set train.seq_len >= {2 * self.cp * reach}{without}"
                )
        return out

    def describe(self) -> str:
        """The axes above one, in order: `dp_shard 4 · ep 2 · mem 4`."""
        named = [
            f"{axis} {getattr(self, axis)}"
            for axis in (*DENSE_AXES, "ep", "ep_inter", "etp", "edp", "mem", "mem_replicate")
            if getattr(self, axis) > 1
        ]
        if self.mem_placement == "strided" and 1 < self.mem < self.world:
            named.append("mem strided")
        return " · ".join(named) or "one rank"


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def choices(numbers: Sequence[int]) -> str:
    """Numbers in words: `1, 2 or 4`."""
    words = [str(n) for n in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _mend_world(layout: Layout, others: int) -> str:
    world = layout.world
    below = world // others * others
    legal = ([below] if below else []) + [below + others]
    axes = " x ".join(a for a in DENSE_AXES if a != "dp_shard" and getattr(layout, a) > 1)
    return f"{axes} = {others} fits {choices(legal)} ranks"
