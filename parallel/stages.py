"""How a model's layers are cut into pipeline stages, and which rank has which stage. Pure Python, no torch.

Stages are numbered in the order in which data passes them. A rank has one stage, or several that are not
neighbours ("loop": rank r has r, r+P, r+2P, …) or two that mirror each other ("V": r and 2P-1-r), with P
ranks along `pp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from hybridtrain.choices import ScheduleName
from hybridtrain.parallel.layout import choices

SLACK = 1e-9  # relative; costs are sums of floats


@dataclass(frozen=True)
class ScheduleRule:
    """What a schedule asks of the stages. `most` 0: no bound."""

    default: int  # stages per rank
    least: int
    most: int
    mirrored: bool = False  # V-shaped instead of looped
    in_rounds: bool = False  # micro-batches run in rounds of equal size, about one per rank
    fills_stages: bool = False  # needs a micro-batch for every stage


SCHEDULES: dict[ScheduleName, ScheduleRule] = {
    "gpipe": ScheduleRule(1, 1, 1),
    "1f1b": ScheduleRule(1, 1, 1, fills_stages=True),
    "interleaved": ScheduleRule(2, 2, 0, in_rounds=True),
    "zero_bubble": ScheduleRule(2, 1, 0, in_rounds=True),
    "zbv": ScheduleRule(2, 2, 2, mirrored=True),
    "dualpipev": ScheduleRule(2, 2, 2, mirrored=True, fills_stages=True),
}


@dataclass(frozen=True)
class Stage:
    """One stage: layers `low` to `high-1` of the model, on rank `pp_rank` of its pipeline."""

    number: int
    num_stages: int
    pp_rank: int
    low: int
    high: int

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.num_stages - 1


def plan_stages(schedule: ScheduleName, pp: int, per_rank: int, cuts: Sequence[int]) -> list[Stage]:
    """All stages in order; `cuts` are the layers of each. `per_rank` 0 is what the schedule needs."""
    count = pp * (per_rank or SCHEDULES[schedule].default) if pp > 1 else 1

    def rank(stage: int) -> int:
        return 2 * pp - 1 - stage if SCHEDULES[schedule].mirrored and stage >= pp else stage % pp

    ends = [sum(cuts[: i + 1]) for i in range(count)]
    return [Stage(i, count, rank(i), ends[i] - cuts[i], ends[i]) for i in range(count)]


def balance(costs: Sequence[float], first: float, last: float, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, one at least, so that the dearest stage costs as little as it can; among those cuts
    the most even one.

    `first` is added to the first stage (embedding), `last` to the last (norm and head).
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def stage_cost(stage: int, low: int, high: int) -> float:
        return (
            sums[high]
            - sums[low]
            + (first if stage == 0 else 0.0)
            + (last if stage == num_stages - 1 else 0.0)
        )

    def best(bound: float, worst_only: bool) -> tuple[float, tuple[int, ...]]:
        """Least worst stage, or least sum of squares with no stage above `bound`, of all cuts."""
        reached: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for stage in range(num_stages):
            after: dict[int, tuple[float, tuple[int, ...]]] = {}
            for low, (value, cuts) in reached.items():
                for high in range(low + 1, len(costs) - (num_stages - 1 - stage) + 1):
                    cost = stage_cost(stage, low, high)
                    if cost > bound:
                        break
                    total = max(value, cost) if worst_only else value + cost * cost
                    if high not in after or total < after[high][0]:
                        after[high] = (total, (*cuts, high - low))
            reached = after
        return reached[len(costs)]

    worst, _ = best(inf, worst_only=True)
    return best(worst * (1 + SLACK), worst_only=False)[1]


def stage_problems(
    schedule: ScheduleName,
    pp: int,
    per_rank: int,
    cuts: Sequence[int],
    num_layers: int,
    micro_batches: int,
) -> list[str]:
    """Every way in which the pipeline's settings do not fit each other, one line each with legal values."""
    if pp == 1:
        return []
    rule, out = SCHEDULES[schedule], []
    each = per_rank or rule.default
    stages = pp * each
    if each < rule.least or (rule.most and each > rule.most):
        legal = str(rule.least) if rule.least == rule.most else f"{rule.least} or more"
        out.append(
            f"parallel.stages_per_rank={each} does not go with parallel.schedule={schedule}; it may be "
            f"{legal}"
        )
    elif pp <= num_layers < stages:  # Layout.check refuses more ranks than layers
        most = num_layers // each
        mend = f"pp may be {choices(range(1, most + 1))}" if most > 1 else "set parallel.pp=1"
        out.append(
            f"parallel.pp={pp} x stages_per_rank {each} = {stages} stages exceed the model's {num_layers} "
            f"layers; {mend}"
        )
    elif stages <= num_layers and cuts and (len(cuts) != stages or sum(cuts) != num_layers):
        even = [num_layers // stages + (i < num_layers % stages) for i in range(stages)]
        out.append(
            f"parallel.stage_cuts={list(cuts)} has {len(cuts)} stages with {sum(cuts)} layers, not {stages} "
            f"with {num_layers}; e.g. {even}, or [] to balance them"
        )
    rounds = max(1, micro_batches // pp)
    if rule.in_rounds and micro_batches % rounds:
        near = [
            m
            for m in range(1, micro_batches + pp)
            if m % max(1, m // pp) == 0 and abs(m - micro_batches) < pp
        ]
        out.append(
            f"train.micro_batches={micro_batches} does not divide into the {rounds} rounds of "
            f"parallel.schedule={schedule} with pp={pp}; near it {choices(near)} do"
        )
    if rule.fills_stages and micro_batches < stages:
        out.append(
            f"train.micro_batches={micro_batches} is below the {stages} stages of "
            f"parallel.schedule={schedule}; it may be {stages} or more"
        )
    return out
