"""What a user reads when a layout does not fit its ranks or its model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hybridtrain.parallel.layout import Degrees, ExpertFacts, Layout, LayoutError, ModelFacts
from tests.parallel.groups import resolve

FACTS = ModelFacts(
    global_batch=24,
    micro_batches=1,
    seq_len=64,
    num_layers=4,
    dim=48,
    table_rows=8000,
    experts=(ExpertFacts(8, 48),),
)


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
            {"world": 4, "ep": 4},
            {
                "experts": (
                    ExpertFacts(8, 48),
                    ExpertFacts(6, 48, "model.mine"),
                    ExpertFacts(9, 48, "model.odd"),
                )
            },
            [
                "parallel.ep=4 does not divide model.mine.num_experts=6; ep may be 1, 2, 3 or 6",
                "parallel.ep=4 does not divide model.odd.num_experts=9; ep may be 1, 3 or 9",
            ],
        ),
        (
            {"world": 2, "tp": 2, "etp": 2},
            {"experts": (ExpertFacts(8, 48), ExpertFacts(8, 40, "model.mine", 8))},
            [
                "parallel.etp=2 cuts model.mine.hidden=40 into parts that are not multiples of 8, as grouped "
                "products need; set model.mine.hidden=48 or etp=1"
            ],
        ),
        (
            {"world": 2, "ep": 2},
            {"experts": ()},
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
            {"experts": (ExpertFacts(8, 44),)},
            [
                "parallel.etp=2 cuts model.moe.hidden=44 into parts that are not multiples of 4, as "
                "grouped products need; set model.moe.hidden=48 or etp=1"
            ],
        ),
        (
            {"world": 2, "tp": 2, "etp": 2},
            {"experts": ()},
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
@pytest.mark.parametrize("facts", [FACTS, replace(FACTS, experts=()), replace(FACTS, table_rows=None)])
def test_models_that_fit_pass(world: int, facts: ModelFacts) -> None:
    Layout.resolve(world).check(facts)


def test_the_mended_batch_of_the_message_fits() -> None:
    Layout.resolve(4).check(replace(FACTS, micro_batches=4, global_batch=32))
