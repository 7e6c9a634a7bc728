"""Which runs the parity matrix consists of: every layout that the code calls legal, and a few that cover all
pairs of axes.

Nothing is listed by hand: degrees are tried by brute force, `resolve_layout` says what is legal, schedules
are drawn.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

from hybridtrain.errors import SettingsError
from hybridtrain.parallel.layout import Degrees, Layout, LayoutError, divisors
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings

CI = Path(__file__).parents[2] / "configs" / "ci.toml"
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp", "mem")
DENSE = AXES[:5]
SAMPLE = 24  # layouts of 8 ranks, drawn from all

# ci.toml with everything on, and eight heads and experts, so that every axis may be 8
MODEL = (
    "model.dim=32",
    "model.tie_embeddings=true",
    "model.attention.num_heads=8",
    "model.attention.num_kv_heads=8",
    "model.attention.head_dim=4",
    "model.dense.hidden=64",
    "model.moe.hidden=32",
    "model.moe.num_shared=1",
    "model.moe.aux_weight=0.01",
    "model.moe.z_weight=0.001",
    "engram.head_dim=8",
    "engram.rows_per_head=200",
    "engram.conv_kernel=2",
    "engram.weight_decay=0.1",
    "optim.lr=0.003",
    "optim.clip_norm=0.3",  # below the norm, so that clipping takes part
    "optim.warmup_steps=2",
    "train.steps=5",
    "train.seq_len=48",
    "train.global_batch=16",
)
DEEP = (  # two stages a rank at pp 4, one at pp 8
    'model.layers=["engram+attention+moe", "attention+dense", "attention+moe", "engram+attention+dense", '
    '"attention+moe", "attention+dense", "engram+attention+moe", "attention+dense"]',
    # seed 0 draws a token whose gate's sign hangs on rounding: 12 times the noise of seeds 1 to 3, and over
    # matrix.CEILING
    "run.seed=1",
)

UNEVEN = (  # sizes that 2 divides and 4 does not, fewer heads of keys and values, a table whose parts differ
    "model.dim=36",
    "model.attention.num_heads=6",
    "model.attention.num_kv_heads=2",
    "model.attention.head_dim=6",
    "model.dense.hidden=90",
    "model.moe.num_experts=6",
    "model.moe.hidden=40",
    "engram.heads=3",
    "engram.rows_per_head=101",
    "train.seq_len=52",
)


@dataclass(frozen=True)
class Variant:
    """Settings that a layout may be combined with. With `other_numbers` they change what is computed and not
    only where.

    It runs at those layouts of 4 ranks that `where` holds of, or else at the few that cover all pairs of
    axes.
    """

    overrides: tuple[str, ...] = ()
    other_numbers: bool = False
    where: Callable[[Case], bool] | None = None


# "" runs at all layouts. To compare one more way of running, add it here.
VARIANTS = {
    "": Variant(),
    "zero 0": Variant(("parallel.zero=0",)),
    "zero 3": Variant(("parallel.zero=3",)),
    "reshard": Variant(("parallel.zero=3", "parallel.reshard_after_forward=true")),
    "muon, untied": Variant(("optim.backbone=muon", "model.tie_embeddings=false"), other_numbers=True),
    "uneven": Variant(UNEVEN, other_numbers=True),
    "capacity": Variant(("model.moe.capacity=1.0",), other_numbers=True),
    "recompute": Variant(("train.recompute=full",)),
    "strided, overlap": Variant(("parallel.mem_placement=strided", "engram.fetch=overlap")),
    "stale": Variant(("engram.fetch=stale",), other_numbers=True),
    "hierarchical": Variant(
        ("parallel.dispatch=hierarchical", "parallel.node_size=2"),
        where=lambda case: case["ep"] == 4 and case["mem"] == 2,
    ),
}


@dataclass(frozen=True)
class Case:
    """One run of the matrix; `degrees` are those of AXES."""

    world: int
    degrees: tuple[int, ...]
    schedule: str = ""  # of a pipeline
    variant: str = ""

    def __getitem__(self, axis: str) -> int:
        return self.degrees[AXES.index(axis)]

    @property
    def numbers(self) -> tuple[str, ...]:
        """What decides the numbers: cases that share it share the one-rank run that they are compared
        with.
        """
        variant = VARIANTS[self.variant]
        return (DEEP if self["pp"] > 2 else ()) + (variant.overrides if variant.other_numbers else ())

    @property
    def overrides(self) -> tuple[str, ...]:
        out = [f"parallel.{axis}={degree}" for axis, degree in zip(AXES, self.degrees, strict=True)]
        out += [f"parallel.schedule={self.schedule}"] if self.schedule else []
        return (
            *out,
            f"train.micro_batches={micro_batches(self['pp'])}",
            *self.numbers,
            *VARIANTS[self.variant].overrides,
        )

    @property
    def layout(self) -> str:
        """The degrees above one; `mem` always, since 1 means a table on every rank."""
        named = [f"{a} {d}" for a, d in zip(AXES, self.degrees, strict=True) if d > 1 and a != "mem"]
        return " · ".join([*named, f"mem {self['mem']}"])

    def __str__(self) -> str:
        return ", ".join(
            part for part in (f"{self.world} ranks: {self.layout}", self.schedule, self.variant) if part
        )


def micro_batches(pp: int) -> int:
    """As many as the hungriest schedule needs, and no more: a micro-batch costs time."""
    return min(2 * pp, 8)


def settings_of(data: Path | str, *overrides: str) -> Settings:
    return load_settings(CI, [f"data.path={data}", "data.source=[]", *MODEL, *overrides])


def is_legal(case: Case) -> bool:
    try:
        resolve_layout(settings_of("unused", *case.overrides), case.world)
    except (LayoutError, SettingsError):
        return False
    return True


@cache
def layouts(world: int) -> tuple[Case, ...]:
    """Every legal layout of so many ranks, without schedules."""
    out = []
    for degrees in itertools.product(divisors(world), repeat=len(AXES)):
        if prod(degrees[: len(DENSE)]) != world:  # the rest would be refused one by one, slowly
            continue
        try:
            Layout.resolve(world, Degrees(**dict(zip(AXES, degrees, strict=True))))
        except LayoutError:
            continue
        if is_legal(case := Case(world, degrees)):
            out.append(case)
    return tuple(out)


def with_schedules(cases: Sequence[Case]) -> list[Case]:
    """Each pipeline with one of the schedules that it may have, drawn among those that its `pp` was given
    least; what a `pp` was not given at all comes at the end."""
    out, given, draw = [], Counter[tuple[int, str]](), random.Random(0)
    for case in cases:
        if case["pp"] > 1:
            choices = [c for schedule in SCHEDULES if is_legal(c := replace(case, schedule=schedule))]
            case = min(choices, key=lambda c: (given[c["pp"], c.schedule], draw.random()))
            given[case["pp"], case.schedule] += 1
        out.append(case)
    for case in cases:
        for schedule in SCHEDULES:
            if (
                case["pp"] > 1
                and not given[case["pp"], schedule]
                and is_legal(c := replace(case, schedule=schedule))
            ):
                given[case["pp"], schedule] += 1
                out.append(c)
    return out


@cache
def matrix() -> tuple[Case, ...]:
    """All layouts of 2 and 4 ranks and a sample of those of 8; the variants at the layouts that cover 4
    ranks.
    """
    two, four, eight = (layouts(world) for world in (2, 4, 8))
    sample = sorted(random.Random(0).sample(eight, SAMPLE), key=eight.index)
    base = [*with_schedules(two), *with_schedules(four), *with_schedules(sample)]
    others = []
    for name, variant in VARIANTS.items():
        chosen = (
            covering()
            if variant.where is None
            else [case for case in with_schedules(four) if variant.where(case)]
        )
        others += [other for case in chosen if name and is_legal(other := replace(case, variant=name))]
    return (*base, *others)


@cache
def covering() -> tuple[Case, ...]:
    """A few layouts of 4 ranks in which every pair of axes, and every schedule, occurs: the one with most new
    pairs first.
    """
    cases = with_schedules(layouts(4))
    left = set[object]().union(*(_pairs(case) for case in cases))
    out: list[Case] = []
    while left:
        best = max(cases, key=lambda case: len(_pairs(case) & left))
        out.append(best)
        left -= _pairs(best)
    return tuple(out)


def _pairs(case: Case) -> set[object]:
    spread = [axis for axis in AXES if case[axis] > 1] + (
        ["mem_replicate"] if case["mem"] < case.world else []
    )
    return set[object](itertools.combinations(spread, 2)) | ({case.schedule} if case.schedule else set())
