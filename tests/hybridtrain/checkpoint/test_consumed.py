"""What a checkpoint says that its run has read, also where it says nonsense."""

from __future__ import annotations

from typing import Any

import pytest

from hybridtrain.checkpoint import Consumed
from hybridtrain.data.position import Position
from hybridtrain.errors import UserError
from hybridtrain.settings.tree import Settings

GOOD = {
    "sequences": 9,
    "tokens": 90,
    "seed": 0,
    "train": "a",
    "validation": "",
    "epoch": 2,
    "window": 10,
    "read": 30,
}
OLD = {"step": 4, "sequences": 5 * 32, "settings": Settings().model_dump(mode="json")}


def test_it_is_read_as_it_was_written() -> None:
    assert Consumed.of({"data": GOOD}).model_dump() == GOOD
    assert Consumed.of({"data": GOOD}).position(101) == Position(2, 10, 30)


def test_older_checkpoints_had_one_batch_and_length_throughout() -> None:
    consumed = Consumed.of(OLD)
    assert (consumed.sequences, consumed.tokens, consumed.train) == (160, 4 * 32 * 128, None)
    assert consumed.position(100 * 128 + 5) == Position(
        1, 128, 60 * 128
    )  # sample 160 of epochs of 100 windows


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epoch": -1}, "epoch"),
        ({"window": 0}, "window"),
        ({"read": "3"}, "read"),
        ({"tokens": 10**30}, "tokens"),
        ({"train": 3}, "train"),
        ({"more": 1}, "more"),
    ],
)
def test_nonsense_is_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(
        UserError, match=f"the entry data of checkpoint.json: is not what it should be\n  {named}: "
    ):
        Consumed.of({"data": GOOD | changed})


@pytest.mark.parametrize("changed", [{"read": 100}, {"read": 5000}, {"window": 1000}, {"epoch": 1 << 60}])
def test_a_place_that_the_split_has_not_is_none(changed: dict[str, Any]) -> None:
    assert Consumed.of({"data": GOOD | changed}).position(101) is None
    assert Consumed.of({"data": GOOD | changed}).position(-1) is None
