"""The tables of what crosses between stages."""

from __future__ import annotations

import pytest

from hybridtrain.parallel.stages import SCHEDULES, Stage, plan_stages
from hybridtrain.parallel.streams import plan_streams


def dense(before: int) -> dict[str, int]:
    """Every layer reads all before it."""
    return {f"x{j}": 8 for j in (before, *range(before))}


def plain(before: int) -> dict[str, int]:
    return {"h": 8}


def blocks(before: int) -> dict[str, int]:
    """A carry, and a source after every second layer."""
    return {"h": 8, **{f"b{j}": 4 for j in range(2, before + 1, 2)}}


def nearest(before: int) -> dict[str, int]:
    """A layer reads the two before it only."""
    return {f"x{j}": 8 for j in (before, *range(max(0, before - 2), before))}


def stages_of(schedule: str, pp: int, cuts: list[int]) -> list[Stage]:
    return plan_stages(schedule, pp, len(cuts) // pp, cuts)


def test_a_hop_sends_what_the_next_rank_does_not_have() -> None:
    first, second = plan_streams(stages_of("1f1b", 2, [2, 2]), dense).stages
    assert first.made == first.sent == second.enters == second.received == ("x2", "x0", "x1")
    assert first.enters == second.made == second.sent == first.kept == second.kept == ()

    looped = plan_streams(stages_of("interleaved", 2, [1, 1, 1, 1]), dense)
    assert [stage.sent for stage in looped.stages] == [("x1", "x0"), ("x2",), ("x3",), ()]
    assert looped.stages[0].kept == ("x1", "x0")
    assert looped.stages[1].kept == ("x1", "x0", "x2")  # received and made

    mirrored = plan_streams(stages_of("zbv", 2, [1, 1, 1, 1]), dense)
    assert [stage.sent for stage in mirrored.stages] == [("x1", "x0"), ("x2",), ("x3", "x2"), ()]
    assert [mirrored.sent_width(stage) for stage in range(4)] == [16, 0, 16, 0]  # x2 stays on its rank


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
def test_a_hop_of_a_loop_is_bounded_by_a_round(schedule: str) -> None:
    plan = plan_streams(stages_of(schedule, 4, [1] * 16), dense)
    sent = [plan.sent_width(stage) // 8 for stage in range(16)]
    # in the first round all before it; then what the other ranks made since the rank's last stage
    assert sent == [2, 3, 4, *[3] * 12, 0]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("carries", [dense, plain, blocks, nearest])
@pytest.mark.parametrize("pp", [2, 4])
def test_every_rank_has_what_its_stages_read_once(schedule: str, carries: object, pp: int) -> None:
    """The tables, followed tensor by tensor over both passes."""
    assert callable(carries)
    each = SCHEDULES[schedule].default
    cuts = [1 + i % 3 for i in range(pp * each)]
    stages = stages_of(schedule, pp, cuts)
    plan = plan_streams(stages, carries)
    kept: dict[int, set[str]] = {rank: set() for rank in range(pp)}
    for stage, names in zip(stages, plan.stages, strict=True):
        wanted = tuple(carries(stage.low)) if stage.number else ()
        assert names.enters == wanted
        assert set(wanted) == {*names.received} | (kept[stage.pp_rank] & set(wanted))
        assert not {*names.received[1:]} & kept[stage.pp_rank]  # a source comes once
        assert set(names.sent) <= {*names.made, *names.enters}
        assert not set(names.kept) & kept[stage.pp_rank]
        kept[stage.pp_rank].update(names.kept)
    waiting: set[tuple[int, str]] = set()  # gradients for the stage with which a source came to its rank
    for stage, names in reversed([*zip(stages, plan.stages, strict=True)]):
        for name in set(names.enters) - set(names.received):
            waiting.add((stage.pp_rank, name))
        for name in names.kept:
            waiting.remove((stage.pp_rank, name))  # a later stage has read it, and it is freed here
    assert not waiting


def test_a_plain_residual_sends_one_tensor() -> None:
    for schedule, rule in SCHEDULES.items():
        plan = plan_streams(stages_of(schedule, 4, [1] * 4 * rule.default), plain)
        for stage in plan.stages[:-1]:
            assert stage.sent == ("h",)
            assert stage.kept == ()


def test_schemes_that_contradict_themselves_are_refused() -> None:
    stages = stages_of("1f1b", 4, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"carries h of width 2 and of width 3"):
        plan_streams(stages, lambda before: {"h": before + 1})
    with pytest.raises(ValueError, match=r"carries \['a'\] behind stage 2 and not before it"):
        plan_streams(stages, lambda before: {"h": 8, "a": 8} if before != 2 else {"h": 8})
