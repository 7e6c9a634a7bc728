"""The layout: where each rank stands, which ranks form a group, what a user reads when it does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridtrain.parallel.layout import (
    DENSE_AXES,
    EXPERT_AXES,
    MEM_AXES,
    NODE_AXES,
    Degrees,
    Layout,
    LayoutError,
    ModelFacts,
)

FACTS = ModelFacts(
    global_batch=24,
    micro_batches=1,
    seq_len=64,
    num_layers=4,
    dim=48,
    num_experts=8,
    table_rows=8000,
)
AXES = (*DENSE_AXES, "edp", "ep", *MEM_AXES)


def resolve(world: int, **degrees: Any) -> Layout:
    return Layout.resolve(world, Degrees(**degrees))


def coordinates(layout: Layout, rank: int, axes: tuple[str, ...]) -> dict[str, int]:
    return {axis: layout.coordinate(rank, axis) for axis in axes}


@pytest.mark.parametrize(
    ("degrees", "rank", "expected"),
    [
        ({"world": 1}, 0, dict.fromkeys((*AXES, "dp"), 0)),
        (
            {"world": 4, "ep": 2, "mem": 2},
            3,
            {"dp_shard": 3, "dp": 3, "edp": 1, "ep": 1, "mem_replicate": 1, "mem": 1},
        ),
        (
            {"world": 4, "ep": 2, "mem": 2},
            1,
            {"dp_shard": 1, "dp": 1, "edp": 0, "ep": 1, "mem_replicate": 0, "mem": 1},
        ),
        (
            {"world": 4, "ep": 4, "mem": 1},
            2,
            {"dp_shard": 2, "edp": 0, "ep": 2, "mem_replicate": 2, "mem": 0},
        ),
        # tp is innermost: neighbours on tp are neighbouring ranks
        (
            {"world": 8, "tp": 2, "cp": 2},
            5,
            {"dp_shard": 1, "cp": 0, "tp": 1, "dp": 1, "edp": 5, "ep": 0, "mem": 5},
        ),
        # ep folds over dp_shard x cp x tp, tp first
        ({"world": 8, "tp": 2, "cp": 2, "ep": 4}, 6, {"dp_shard": 1, "cp": 1, "tp": 0, "edp": 1, "ep": 2}),
        (
            {"world": 16, "pp": 2, "dp_replicate": 2, "ep": 4, "mem": 8},
            13,
            {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "ep": 1},
        ),
        (
            {"world": 16, "pp": 2, "dp_replicate": 2, "ep": 2, "mem": 8},
            14,
            {"dp": 6, "edp": 1, "ep": 0, "mem_replicate": 1},
        ),
    ],
)
def test_coordinates(degrees: dict[str, int], rank: int, expected: dict[str, int]) -> None:
    assert coordinates(resolve(**degrees), rank, tuple(expected)) == expected


@pytest.mark.parametrize(
    ("degrees", "axis", "expected"),
    [
        ({"world": 4, "ep": 2}, "ep", [[0, 1], [2, 3]]),
        ({"world": 4, "ep": 2}, "edp", [[0, 2], [1, 3]]),
        ({"world": 4, "mem": 2}, "mem", [[0, 1], [2, 3]]),
        ({"world": 4, "mem": 2}, "mem_replicate", [[0, 2], [1, 3]]),
        ({"world": 4, "mem": 1}, "mem", [[0], [1], [2], [3]]),
        ({"world": 4, "mem": 1}, "mem_replicate", [[0, 1, 2, 3]]),
        ({"world": 8, "tp": 2}, "tp", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"world": 8, "tp": 2}, "dp_shard", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"world": 8, "tp": 2, "dp_replicate": 2}, "dp", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"world": 8, "tp": 2, "dp_replicate": 2}, "dp_replicate", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"world": 8, "pp": 2, "tp": 2, "ep": 4}, "ep", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"world": 8, "pp": 2, "tp": 2, "ep": 2}, "edp", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        # under etp the ranks of tp share the width of experts, which fold over the rest
        ({"world": 8, "tp": 2, "ep": 2, "etp": 2}, "ep", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ({"world": 8, "tp": 2, "ep": 2, "etp": 2}, "edp", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"world": 8, "tp": 2, "ep": 2, "etp": 2}, "etp", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"world": 8, "pp": 2, "cp": 2, "mem": 4}, "mem", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # over nodes first: the same-index ranks of the nodes that ep reaches over, then the ranks of ep on
        # one node
        ({"world": 8, "ep": 8, "node_size": 4}, "ep_inter", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ({"world": 8, "ep": 8, "node_size": 4}, "ep_intra", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"world": 8, "ep": 4, "node_size": 2}, "ep_inter", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ({"world": 8, "ep": 4, "node_size": 1}, "ep_inter", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (
            {"world": 8, "tp": 2, "etp": 2, "ep": 4, "node_size": 4},
            "ep_inter",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        (
            {"world": 8, "tp": 2, "etp": 2, "ep": 4, "node_size": 4},
            "ep_intra",
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
        # far: spread evenly over the world, so over the stages too
        ({"world": 8, "pp": 2, "mem": 4, "mem_placement": "strided"}, "mem", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            {"world": 8, "pp": 2, "mem": 4, "mem_placement": "strided"},
            "mem_replicate",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ({"world": 4, "mem": 4, "mem_placement": "strided"}, "mem", [[0, 1, 2, 3]]),
    ],
)
def test_groups(degrees: dict[str, int], axis: str, expected: list[list[int]]) -> None:
    assert resolve(**degrees).groups(axis) == expected


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dense = {
        axis: draw(st.sampled_from([1, 2, 4] if axis == "dp_shard" else [1, 1, 2])) for axis in DENSE_AXES
    } | {draw(st.sampled_from(["pp", "tp"])): 3}
    world = prod(dense.values())
    folded = dense["dp_shard"] * dense["cp"] * dense["tp"]
    ep = draw(st.sampled_from([d for d in range(1, folded + 1) if folded % d == 0]))
    mem = draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    node_size = draw(st.sampled_from([0, 2 * ep, *(d for d in range(1, ep + 1) if ep % d == 0)]))
    placement = draw(st.sampled_from(["contiguous", "strided"]))
    return Layout.resolve(
        world, Degrees(**dense, ep=ep, mem=mem, node_size=node_size, mem_placement=placement)
    )


@settings(deadline=None)  # 243 ranks on a busy machine
@given(layouts())
def test_groups_partition_the_ranks_and_agree_with_coordinates(layout: Layout) -> None:
    for axes in (DENSE_AXES, EXPERT_AXES, NODE_AXES, layout.mem_axes):
        assert prod(layout.shape(axes)) == layout.world
        places = [tuple(coordinates(layout, rank, axes).values()) for rank in range(layout.world)]
        assert places == sorted(set(places))  # distinct, and slowest axis first
        for axis in axes:
            groups = layout.groups(axis)
            assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
            for group in groups:
                assert [layout.coordinate(rank, axis) for rank in group] == list(range(getattr(layout, axis)))
                others = {tuple(layout.coordinate(rank, a) for a in axes if a != axis) for rank in group}
                assert len(others) == 1
    for group in layout.groups("dp"):
        assert [layout.coordinate(rank, "dp") for rank in group] == list(range(layout.dp))


@given(layouts())
def test_an_expert_group_lies_inside_one_stage_and_one_replica(layout: Layout) -> None:
    for group in layout.groups("ep"):
        assert len({(layout.coordinate(r, "pp"), layout.coordinate(r, "dp_replicate")) for r in group}) == 1
        assert group == list(
            range(group[0], group[0] + layout.ep)
        )  # neighbours: the narrowest part of the network


@pytest.mark.parametrize("node_size", [0, 4, 8, 12])
def test_experts_on_one_node_need_no_second_hop(node_size: int) -> None:
    layout = Layout.resolve(8, Degrees(ep=4, node_size=node_size))
    assert (layout.ep_inter, layout.ep_intra) == (1, 4)


@given(layouts(), st.integers(0, 40))
def test_row_bounds_cover_every_row_once(layout: Layout, num_rows: int) -> None:
    bounds = layout.row_bounds(num_rows)
    assert len(bounds) == layout.mem + 1
    assert bounds[0] == 0
    assert bounds[-1] == num_rows
    sizes = [high - low for low, high in pairwise(bounds)]
    assert min(sizes) >= 0
    assert max(sizes) <= -(-num_rows // layout.mem)


@pytest.mark.parametrize(
    ("mem", "num_rows", "bounds"),
    [
        (4, 10, [0, 3, 6, 9, 10]),
        (4, 3, [0, 1, 2, 3, 3]),
        (4, 5, [0, 2, 4, 5, 5]),
        (1, 7, [0, 7]),
        (2, 0, [0, 0, 0]),
    ],
)
def test_row_bounds_are_the_chunks_of_shard_0(mem: int, num_rows: int, bounds: list[int]) -> None:
    assert Layout.resolve(4, Degrees(mem=mem)).row_bounds(num_rows) == bounds


def test_minus_one_takes_what_is_left() -> None:
    layout = Layout.resolve(8, Degrees(tp=2))
    assert (layout.dp_shard, layout.mem, layout.mem_replicate, layout.edp) == (4, 8, 1, 8)
    layout = Layout.resolve(8, Degrees(tp=2, dp_shard=4, ep=4, mem=2))
    assert (layout.expert_ranks, layout.edp, layout.mem_replicate, layout.dp) == (8, 2, 4, 4)
    assert layout.describe() == "dp_shard 4 · tp 2 · ep 4 · edp 2 · mem 2 · mem_replicate 4"
    assert (
        Layout.resolve(8, Degrees(ep=4, node_size=2)).describe()
        == "dp_shard 8 · ep 4 · ep_inter 2 · edp 2 · mem 8"
    )
    assert Layout.resolve(1).describe() == "one rank"
    far = {"mem_placement": "strided"}
    assert (
        Layout.resolve(4, Degrees(mem=2, **far)).describe()
        == "dp_shard 4 · edp 4 · mem 2 · mem_replicate 2 · mem strided"
    )
    assert (
        Layout.resolve(4, Degrees(**far)).describe() == Layout.resolve(4).describe()
    )  # all ranks: near and far are the same


@pytest.mark.parametrize(
    ("degrees", "violations"),
    [
        (
            {"world": 16, "dp_shard": 3, "tp": 4},
            ["parallel: dp_shard 3 x tp 4 = 12 ranks, not 16; set dp_shard=4 or dp_shard=-1"],
        ),
        (
            {"world": 4, "dp_shard": 8},
            ["parallel: dp_shard 8 = 8 ranks, not 4; set dp_shard=4 or dp_shard=-1"],
        ),
        (
            {"world": 4, "dp_shard": 1},
            ["parallel: all axes 1 = 1 ranks, not 4; set dp_shard=4 or dp_shard=-1"],
        ),
        ({"world": 4, "tp": 3}, ["parallel: tp 3 = 3 ranks, not 4; tp = 3 fits 3 or 6 ranks"]),
        (
            {"world": 2, "tp": 2, "pp": 2},
            ["parallel: pp 2 x tp 2 = 4 ranks, not 2; pp x tp = 4 fits 4 ranks"],
        ),
        (
            {"world": 4, "ep": 3},
            ["parallel.ep=3 does not divide dp_shard x cp x tp = 4; ep may be 1, 2 or 4"],
        ),
        ({"world": 2, "ep": 0}, ["parallel.ep=0 does not divide dp_shard x cp x tp = 2; ep may be 1 or 2"]),
        (
            {"world": 4, "ep": 8},
            ["parallel.ep=8 does not divide dp_shard x cp x tp = 4; ep may be 1, 2 or 4"],
        ),
        (
            {"world": 4, "dp_replicate": 2, "ep": 4},
            ["parallel.ep=4 does not divide dp_shard x cp x tp = 2; ep may be 1 or 2"],
        ),
        (
            {"world": 8, "tp": 4, "etp": 2, "ep": 8},
            ["parallel.etp=2 is neither 1 nor tp; etp may be 1 or 4"],
        ),
        ({"world": 2, "etp": 2}, ["parallel.etp=2 is neither 1 nor tp; etp may be 1"]),
        (
            {"world": 8, "tp": 4, "etp": 4, "ep": 4},
            ["parallel.ep=4 does not divide dp_shard x cp = 2; ep may be 1 or 2"],
        ),
        (
            {"world": 4, "ep": 4, "node_size": 3},
            [
                "parallel.node_size=3 (0 takes LOCAL_WORLD_SIZE) cuts through the ep x etp = 4 ranks of a "
                "set of experts; node_size may be 1, 2 or 4 or a multiple of 4, or set "
                "parallel.dispatch=flat"
            ],
        ),
        (
            {"world": 12, "ep": 4, "node_size": 6},  # divides neither: ranks 4 to 7 are on two nodes
            [
                "parallel.node_size=6 (0 takes LOCAL_WORLD_SIZE) cuts through the ep x etp = 4 ranks of a "
                "set of experts; node_size may be 1, 2 or 4 or a multiple of 4, or set "
                "parallel.dispatch=flat"
            ],
        ),
        (
            {"world": 8, "tp": 4, "etp": 4, "ep": 2, "node_size": 2},  # an expert's width stays on a node
            [
                "parallel.node_size=2 (0 takes LOCAL_WORLD_SIZE) cuts through the ep x etp = 8 ranks of a "
                "set of experts; node_size may be 4 or 8 or a multiple of 8, or set parallel.dispatch=flat"
            ],
        ),
        ({"world": 4, "mem": 3}, ["parallel.mem=3 does not divide the 4 ranks; mem may be -1, 1, 2 or 4"]),
        ({"world": 2, "mem": 4}, ["parallel.mem=4 does not divide the 2 ranks; mem may be -1, 1 or 2"]),
        ({"world": 2, "mem": 0}, ["parallel.mem=0 does not divide the 2 ranks; mem may be -1, 1 or 2"]),
        (
            {"world": 4, "dp_shard": 3, "ep": 2, "mem": 3},
            [
                "parallel: dp_shard 3 = 3 ranks, not 4; set dp_shard=4 or dp_shard=-1",
                "parallel.ep=2 does not divide dp_shard x cp x tp = 3; ep may be 1 or 3",
                "parallel.mem=3 does not divide the 4 ranks; mem may be -1, 1, 2 or 4",
            ],
        ),
    ],
)
def test_impossible_arithmetic_is_refused_with_every_violation(
    degrees: dict[str, int], violations: list[str]
) -> None:
    with pytest.raises(LayoutError) as caught:
        resolve(**degrees)
    assert caught.value.violations == violations
    assert str(caught.value) == "\n".join(
        [f"layout does not fit {degrees['world']} ranks", *(f"  {v}" for v in violations)]
    )


@pytest.mark.parametrize(
    ("degrees", "facts", "violations"),
    [
        (
            {"world": 5},
            {},
            [
                "parallel: dp_replicate x dp_shard = 5 does not divide the 24 sequences of a micro-batch "
                "(train.global_batch=24 / train.micro_batches=1); it may be 1, 2, 3, 4, 6, 8, 12 or 24, or "
                "set train.global_batch=25"
            ],
        ),
        (
            {"world": 4},
            {"micro_batches": 4},
            [
                "parallel: dp_replicate x dp_shard = 4 does not divide the 6 sequences of a micro-batch "
                "(train.global_batch=24 / train.micro_batches=4); it may be 1, 2, 3 or 6, or set "
                "train.global_batch=32"
            ],
        ),
        (
            {"world": 3, "ep": 3},
            {},
            ["parallel.ep=3 does not divide model.moe.num_experts=8; ep may be 1, 2, 4 or 8"],
        ),
        (
            {"world": 2, "ep": 2},
            {"num_experts": None},
            ["parallel.ep=2 but no layer of model.layers is moe; ep may be 1"],
        ),
        (
            {"world": 6, "ep": 2},
            {"dim": 44},
            [
                "parallel: edp = dp_shard x cp x tp / ep = 3 does not divide model.dim=44; edp may be 1, 2, "
                "4, 11, 22 or 44"
            ],
        ),
        (
            {"world": 4},
            {"table_rows": 3},
            ["parallel.mem=4 exceeds the table's 3 rows; set engram.rows_per_head higher or mem=1"],
        ),
        (
            {"world": 4, "cp": 4},
            {"reach": {"engram.conv": 9}},
            [
                "parallel.cp=4 leaves chunks of 8 tokens, fewer than the 9 of engram.conv's reach; "
                "set train.seq_len >= 72 or engram.conv=false"
            ],
        ),
        (
            {"world": 3, "tp": 3},
            {
                "divides": {
                    "model.attention.num_kv_heads": 2,
                    "model.attention.num_heads": 6,
                    "model.dense.hidden": 96,
                    "model.moe.num_shared x hidden": 40,
                    "len(engram.orders) x engram.heads": 8,
                }
            },
            [
                "parallel.tp=3 does not divide model.attention.num_kv_heads=2; tp may be 1 or 2",
                "parallel.tp=3 does not divide model.moe.num_shared x hidden=40; tp may be 1, 2, 4, 5, 8, "
                "10, 20 or 40",
                "parallel.tp=3 does not divide len(engram.orders) x engram.heads=8; tp may be 1, 2, 4 or 8",
                "parallel.tp=3 does not divide train.seq_len=64; tp may be 1, 2, 4, 8, 16, 32 or 64",
            ],
        ),
        (
            {"world": 4, "tp": 4},
            {"divides": {"model.attention.num_heads": 6, "model.dense.hidden": 98}, "seq_len": 66},
            [
                "parallel.tp=4 does not divide model.attention.num_heads=6; tp may be 1, 2, 3 or 6",
                "parallel.tp=4 does not divide model.dense.hidden=98; tp may be 1, 2, 7, 14, 49 or 98",
                "parallel.tp=4 does not divide train.seq_len=66; tp may be 1, 2, 3, 6, 11, 22, 33 or 66",
            ],
        ),
        (
            {"world": 2, "tp": 2, "etp": 2},
            {"expert_hidden": 44},
            [
                "parallel.etp=2 cuts model.moe.hidden=44 into parts that are not multiples of 4, as "
                "grouped products need; set model.moe.hidden=48 or etp=1"
            ],
        ),
        (
            {"world": 2, "tp": 2, "etp": 2},
            {"num_experts": None},
            ["parallel.etp=2 but no layer of model.layers is moe; etp may be 1"],
        ),
        (
            {"world": 6, "tp": 2, "etp": 2},
            {"dim": 44},
            [
                "parallel: edp = dp_shard x cp / ep = 3 does not divide model.dim=44; edp may be 1, 2, 4, "
                "11, 22 or 44",
                "parallel: dp_shard x cp = 3 does not divide model.dim=44, as it must under tp; it may be "
                "1, 2, 4, 11, 22 or 44",
            ],
        ),
        (
            {"world": 6, "tp": 2},
            {"dim": 44},  # without ep, experts lie on all ranks as well
            [
                "parallel: edp = dp_shard x cp x tp / ep = 6 does not divide model.dim=44; edp may be 1, "
                "2, 4, 11, 22 or 44",
                "parallel: dp_shard x cp = 3 does not divide model.dim=44, as it must under tp; it may be "
                "1, 2, 4, 11, 22 or 44",
            ],
        ),
        (
            {"world": 30, "pp": 5, "tp": 3, "ep": 3, "mem": 15},
            {"divides": {"model.attention.num_kv_heads": 2, "model.attention.num_heads": 6}},
            [
                "parallel.ep=3 does not divide model.moe.num_experts=8; ep may be 1, 2, 4 or 8",
                "parallel.tp=3 does not divide model.attention.num_kv_heads=2; tp may be 1 or 2",
                "parallel.tp=3 does not divide train.seq_len=64; tp may be 1, 2, 4, 8, 16, 32 or 64",
                "parallel.pp=5 exceeds the model's 4 layers; pp may be 1 to 4",
            ],
        ),
        (
            {"world": 8, "cp": 2, "tp": 4},  # tp cuts the part of a sequence that cp leaves
            {"seq_len": 76},
            ["parallel.tp=4 does not divide train.seq_len / cp=38; tp may be 1, 2, 19 or 38"],
        ),
        (
            {"world": 3, "cp": 3},
            {"seq_len": 64},
            ["parallel.cp=3: 2 x cp does not divide train.seq_len=64; cp may be 1, 2, 4, 8, 16 or 32"],
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_with_every_violation(
    degrees: dict[str, int], facts: dict[str, Any], violations: list[str]
) -> None:
    layout = resolve(**degrees)
    with pytest.raises(LayoutError) as caught:
        layout.check(replace(FACTS, **facts))
    assert caught.value.violations == violations
    assert str(caught.value).startswith(f"layout does not fit {degrees['world']} ranks\n  parallel")


def test_what_no_exchange_serves_is_refused_by_name_under_cp() -> None:
    facts = replace(FACTS, whole_sequences=("bidirectional",), reach={"model.wide": 20})
    Layout.resolve(2).check(facts)
    with pytest.raises(LayoutError) as caught:
        Layout.resolve(2, Degrees(cp=2)).check(facts)
    assert caught.value.violations == [
        "parallel.cp=2: bidirectional sees a sequence in a way that no exchange serves; cp may be 1",
        "parallel.cp=2 leaves chunks of 16 tokens, fewer than the 20 of model.wide's reach; set "
        "train.seq_len >= 80",
    ]


def test_what_others_found_is_told_with_the_layouts_own() -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.resolve(10, Degrees(pp=5, dp_shard=2)).check(FACTS, ["of the schedule", "of the stages"])
    expected = [
        "parallel.pp=5 exceeds the model's 4 layers; pp may be 1 to 4",
        "of the schedule",
        "of the stages",
    ]
    assert caught.value.violations == expected
    with pytest.raises(LayoutError, match="of the schedule"):
        Layout.resolve(2).check(FACTS, ["of the schedule"])


@pytest.mark.parametrize(
    "degrees", [{"world": 2, "tp": 2}, {"world": 4, "tp": 4}, {"world": 8, "tp": 4, "ep": 8, "mem": 2}]
)
def test_models_that_fit_pass_under_tp(degrees: dict[str, int]) -> None:
    resolve(**degrees).check(
        replace(
            FACTS,
            divides={
                "model.dense.hidden": 96,
                "model.moe.num_shared x hidden": 48,
                "len(engram.orders) x engram.heads": 8,
            },
        )
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("facts", [FACTS, replace(FACTS, num_experts=None), replace(FACTS, table_rows=None)])
def test_models_that_fit_pass(world: int, facts: ModelFacts) -> None:
    Layout.resolve(world).check(facts)


def test_the_mended_batch_of_the_message_fits() -> None:
    Layout.resolve(4).check(replace(FACTS, micro_batches=4, global_batch=32))


def test_needs_no_torch() -> None:
    code = "import sys, hybridtrain.parallel.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
