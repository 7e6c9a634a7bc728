"""How layers are cut into stages and what each schedule refuses; checked against all cuts and against torch's
own schedules.
"""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest
from torch import nn
from torch.distributed.pipelining import schedules as torch_schedules

from hybridtrain.parallel.stages import SCHEDULES, balance, plan_stages, stage_problems

MULTI = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


def stage_costs(cuts: tuple[int, ...], costs: list[float], first: float, last: float) -> list[float]:
    ends = list(itertools.accumulate(cuts, initial=0))
    out = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    out[0] += first
    out[-1] += last
    return out


def all_cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    places = itertools.combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *place, layers))) for place in places]


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_has_a_cheaper_dearest_stage_nor_a_more_even_rest(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(1, 9)
    stages = draw.randint(1, layers)
    costs = [draw.choice((1.0, 1.0, 2.5, draw.random())) for _ in range(layers)]
    first, last = draw.random() * 2, draw.random() * 4
    found = balance(costs, first, last, stages)
    assert len(found) == stages
    assert sum(found) == layers
    assert min(found) >= 1
    every = [stage_costs(cuts, costs, first, last) for cuts in all_cuts(layers, stages)]
    worst = min(max(c) for c in every)
    ours = stage_costs(found, costs, first, last)
    assert max(ours) == pytest.approx(worst)
    best = min(sum(x * x for x in c) for c in every if max(c) <= worst * (1 + 1e-9))
    assert sum(x * x for x in ours) == pytest.approx(best)


def test_embedding_and_head_count() -> None:
    assert balance([1.0] * 8, 0.0, 0.0, 2) == (4, 4)
    assert balance([1.0] * 8, 0.0, 4.0, 2) == (6, 2)
    assert balance([1.0] * 8, 2.0, 0.0, 2) == (3, 5)


def test_many_layers_are_cut_at_once() -> None:
    assert (
        balance([1.0] * 256, 0.5, 2.0, 64)[-1] == 3
    )  # 3 layers and the head's 2 cost as much as the 5 layers of another


@pytest.mark.parametrize(
    ("schedule", "pp", "per_rank", "ranks"),
    [
        ("1f1b", 3, 0, [0, 1, 2]),
        ("interleaved", 2, 0, [0, 1, 0, 1]),
        ("zero_bubble", 2, 3, [0, 1, 0, 1, 0, 1]),
        ("zbv", 3, 0, [0, 1, 2, 2, 1, 0]),
        ("dualpipev", 2, 2, [0, 1, 1, 0]),
        ("zbv", 1, 0, [0]),
    ],
)
def test_which_rank_has_which_layers(schedule: str, pp: int, per_rank: int, ranks: list[int]) -> None:
    cuts = [i + 1 for i in range(len(ranks))]
    stages = plan_stages(schedule, pp, per_rank, cuts)
    assert [stage.pp_rank for stage in stages] == ranks
    assert [layer for stage in stages for layer in range(stage.low, stage.high)] == list(range(sum(cuts)))
    assert [stage.high - stage.low for stage in stages] == cuts
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(ranks) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(ranks) - 1) + [True]


@pytest.mark.parametrize("schedule", list(MULTI))
def test_our_rules_and_rank_order_are_torchs(schedule: str) -> None:
    """What is refused here and what torch's schedules refuse to build are the same."""
    rule = SCHEDULES[schedule]
    for pp, each, micro_batches in itertools.product((2, 3, 4), (1, 2, 3), range(1, 14)):
        if each < rule.least or (rule.most and each > rule.most):
            continue
        stages = [
            SimpleNamespace(
                num_stages=pp * each, group_size=pp, group_rank=0, stage_index=i, submod=nn.Identity()
            )
            for i in range(each)
        ]
        problems = stage_problems(schedule, pp, each, (), pp * each, micro_batches)
        try:
            built = MULTI[schedule](stages, n_microbatches=micro_batches, loss_fn=lambda loss, _: loss)
        except ValueError:
            assert problems, (pp, each, micro_batches)
        else:
            assert not problems, (pp, each, micro_batches)
            ours = {
                stage.number: stage.pp_rank for stage in plan_stages(schedule, pp, each, [1] * (pp * each))
            }
            assert built.stage_index_to_group_rank == ours


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ("1f1b", 2, 2, (), 8, 4),
            ["parallel.stages_per_rank=2 does not go with parallel.schedule=1f1b; it may be 1"],
        ),
        (
            ("zbv", 2, 3, (), 8, 4),
            ["parallel.stages_per_rank=3 does not go with parallel.schedule=zbv; it may be 2"],
        ),
        (
            ("interleaved", 2, 1, (), 8, 4),
            [
                "parallel.stages_per_rank=1 does not go with parallel.schedule=interleaved; it may be 2 or "
                "more"
            ],
        ),
        (
            ("zbv", 4, 0, (), 4, 8),
            ["parallel.pp=4 x stages_per_rank 2 = 8 stages exceed the model's 4 layers; pp may be 1 or 2"],
        ),
        (
            ("zbv", 2, 0, (), 3, 8),
            ["parallel.pp=2 x stages_per_rank 2 = 4 stages exceed the model's 3 layers; set parallel.pp=1"],
        ),
        (
            ("1f1b", 2, 0, (2, 3), 4, 4),
            [
                "parallel.stage_cuts=[2, 3] has 2 stages with 5 layers, not 2 with 4; e.g. [2, 2], or [] to "
                "balance them"
            ],
        ),
        (
            ("interleaved", 2, 0, (4, 1), 5, 5),
            [
                "parallel.stage_cuts=[4, 1] has 2 stages with 5 layers, not 4 with 5; e.g. [2, 1, 1, 1], "
                "or [] to balance them",
                "train.micro_batches=5 does not divide into the 2 rounds of parallel.schedule=interleaved "
                "with pp=2; near it 4 or 6 do",
            ],
        ),
        (
            ("dualpipev", 2, 0, (), 4, 3),
            [
                "train.micro_batches=3 is below the 4 stages of parallel.schedule=dualpipev; it may be 4 or "
                "more"
            ],
        ),
        (("dualpipev", 1, 5, (7,), 4, 3), []),
        (
            ("1f1b", 4, 0, (1, 1, 1, 1), 4, 1),
            ["train.micro_batches=1 is below the 4 stages of parallel.schedule=1f1b; it may be 4 or more"],
        ),
        (("gpipe", 4, 0, (1, 1, 1, 1), 4, 1), []),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(given: tuple[object, ...], expected: list[str]) -> None:
    assert stage_problems(*given) == expected  # type: ignore[arg-type]
