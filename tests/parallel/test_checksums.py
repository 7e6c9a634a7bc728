"""What a rank refuses of what it computes or receives: row ids outside the table, damaged payloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hybridtrain.parallel import row_exchange as module
from hybridtrain.parallel.checksums import checksums
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.row_exchange import RowPlanner, exchange_rows
from tests.parallel.groups import mesh_here
from tests.parallel.rows import SHAPE, flip_a_bit, message, table
from tests.ranks import run_on_ranks


def ask_outside(ids: list[int]) -> list[str | None]:
    mesh = mesh_here(mem=2)
    planner = RowPlanner(mesh.layout.row_bounds(10), mesh.planning_groups("plan"), mesh.device)
    return [message(lambda i=i: planner.plan(torch.full(SHAPE, i))) for i in ids]  # type: ignore[misc]


def test_an_id_outside_the_table_is_refused() -> None:
    texts = "row ids computed here reach from {0} to {0}, outside 0 to 9 (group mem_plan, rank {1})"
    for rank, found in enumerate(run_on_ranks(ask_outside, 2, [10, -1, 9])):
        assert found == [texts.format(10, rank), texts.format(-1, rank), None]


@contextmanager
def damaged(receiver: int, harm: Callable[[Tensor], None]) -> Iterator[None]:
    """While entered, whatever reaches rank `receiver` in an exchange of rows is harmed on the way; counts are
    not.
    """
    real = module.all_to_all

    def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        out = real(x, send, receive, group)
        if group.ranks[group.rank] == receiver:
            harm(out)
        return out

    module.all_to_all = all_to_all
    try:
        yield
    finally:
        module.all_to_all = real


def swap_rows(x: Tensor) -> None:
    x[:2] = x[:2].flip(0)


def shift_id(x: Tensor) -> None:
    x[0] += 5


def exchange_damaged(checksum: bool) -> dict[str, str | None]:
    mesh = mesh_here(mem=2)
    send = [3, 3]
    found: dict[str, str | None] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = table(6).to(dtype) + mesh.rank
        found[f"sound {name}"] = message(lambda x=x: exchange_rows(x, send, send, mesh.mem, "rows", checksum))  # type: ignore[misc]
        for harm in (flip_a_bit, swap_rows):
            with damaged(1, harm):
                found[f"{harm.__name__} {name}"] = message(
                    lambda x=x: exchange_rows(x, send, send, mesh.mem, "rows", checksum)  # type: ignore[misc]
                )
    planner = RowPlanner([0, 5, 10], mesh.planning_groups("plan"), mesh.device, checksum=checksum)
    with damaged(1, shift_id):
        found["row ids"] = message(lambda: planner._exchange(torch.arange(10).view(1, 10)))
    return found


def test_a_damaged_payload_is_found() -> None:
    sound, harmed = run_on_ranks(exchange_damaged, 2, True)
    assert set(sound.values()) == {None}
    rows = "rows from rank 0 arrived damaged at rank 1 (group mem)"
    expected = {
        f"{harm} {dtype}": rows for harm in ("flip_a_bit", "swap_rows") for dtype in ("float32", "bfloat16")
    }
    expected |= {"row ids": "row ids from rank 0 arrived damaged at rank 1 (group mem_plan)"}
    assert {what: text for what, text in harmed.items() if text is not None} == expected


def test_without_checksum_only_ids_outside_an_owner_are_found() -> None:
    sound, harmed = run_on_ranks(exchange_damaged, 2, False)
    assert set(sound.values()) == {None}
    text = "row ids received by owner 1 reach from 5 to 10, outside 5 to 9 (group mem_plan, rank 1)"
    assert {what: text for what, text in harmed.items() if text is not None} == {"row ids": text}


def test_checksums_tell_place_and_value() -> None:
    x = torch.randint(-5, 5, (7, 4), generator=torch.Generator().manual_seed(0))
    before = checksums(x, [3, 0, 4])
    assert before.shape == (3,)
    assert before[1] == 0
    for row in range(7):
        for column in range(4):
            harmed = x.clone()
            harmed[row, column] += 1
            differs = checksums(harmed, [3, 0, 4]) != before
            assert differs.tolist() == [row < 3, False, row >= 3]


@pytest.mark.parametrize("shape", [(0,), (0, 4)])
def test_checksums_of_nothing(shape: tuple[int, ...]) -> None:
    assert checksums(torch.empty(shape), [0, 0]).tolist() == [0, 0]
