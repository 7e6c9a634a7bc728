"""The layout: where each rank stands and which ranks form a group."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from math import prod

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
)
from tests.parallel.groups import resolve

AXES = (*DENSE_AXES, "edp", "ep", *MEM_AXES)


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


def test_needs_no_torch() -> None:
    code = "import sys, hybridtrain.parallel.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
