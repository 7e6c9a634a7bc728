"""Collectives: what arrives, the gradient's way back, and bytes against the formula."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.parallel import collectives as c
from hybridtrain.parallel.async_all_to_all import all_to_all_autograd
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks


def rows(rank: int, count: int) -> Tensor:
    """`count` rows of width 3 that say where they come from."""
    return torch.arange(count * 3, dtype=torch.float64).view(count, 3) + 1000 * rank


# SPLITS[i][j]: rows that rank i sends to rank j. Uneven; a rank that sends nothing, one that receives
# nothing, and nothing at all.
SPLITS = {
    2: [[[1, 2], [3, 4]], [[0, 0], [5, 1]], [[2, 0], [3, 0]], [[0, 0], [0, 0]]],
    4: [
        [[1, 2, 3, 4], [4, 0, 1, 0], [0, 0, 0, 0], [2, 2, 2, 2]],
        [[0, 0, 7, 0], [0, 0, 5, 0], [0, 0, 1, 0], [0, 0, 2, 0]],
        [[0] * 4] * 4,
    ],
}


def check_collectives() -> None:
    mesh = mesh_here()
    group, rank, size = mesh.world, mesh.rank, mesh.layout.world
    sent = 0
    for splits in SPLITS[size]:
        send, receive = splits[rank], [splits[i][rank] for i in range(size)]
        expected = torch.cat([rows(i, sum(splits[i])).split(splits[i])[rank] for i in range(size)])
        x = rows(rank, sum(send)).requires_grad_()
        assert torch.equal(c.all_to_all(x.detach(), send, receive, group), expected)
        out = all_to_all_autograd(x, send, receive, group)
        assert torch.equal(out, expected)
        (out * out.detach()).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, x.detach())  # every row's gradient came back to where the row came from
        assert c.exchange_counts(torch.tensor(send), group).tolist() == receive
        pairs = torch.tensor(send)[:, None] * torch.tensor([1, 10])
        assert torch.equal(
            c.exchange_counts(pairs, group), torch.tensor(receive)[:, None] * torch.tensor([1, 10])
        )
        away, back = sum(send) - send[rank], sum(receive) - receive[rank]
        sent += (2 * away + back) * 3 * 8 + (size - 1) * (1 + 2) * 8
    not_contiguous = torch.arange(2.0 * size).view(2, size).T
    expected = torch.stack([torch.tensor([float(rank), float(rank + size)])] * size)
    assert torch.equal(c.all_to_all(not_contiguous, [1] * size, [1] * size, group), expected)
    sent += (size - 1) * 2 * 4
    assert mesh.traffic.entries() == {("world", "all_to_all"): (5 * len(SPLITS[size]) + 1, sent)}

    value = torch.tensor([1.5, rank], dtype=torch.float32)
    assert c.all_reduce_(value, group).tolist() == [1.5 * size, size * (size - 1) / 2]
    assert int(c.all_reduce_(torch.tensor(rank), group, dist.ReduceOp.MAX)) == size - 1
    reduced = sum(2 * (size - 1) * n // size for n in (8, 8))
    assert mesh.traffic.entries()["world", "all_reduce"] == (2, reduced)

    gathered = 0
    for lengths in ([3, 1, 0, 2], [0, 0, 0, 0], [2, 2, 2, 2], [0, 4, 0, 0]):
        parts = c.all_gather_uneven(rows(rank, lengths[rank]), group)
        assert len(parts) == size
        for i, part in enumerate(parts):
            assert torch.equal(part, rows(i, lengths[i]))
        reduced += 2 * (size - 1) * size * 8 // size
        gathered += (size - 1) * max(lengths[:size]) * 3 * 8
    numbers = c.all_gather_uneven(torch.arange(rank), group)  # no further dimension, integers
    assert [n.tolist() for n in numbers] == [list(range(i)) for i in range(size)]
    reduced += 2 * (size - 1) * 8
    gathered += (size - 1) * (size - 1) * 8
    assert mesh.traffic.entries()["world", "all_gather"] == (5, gathered)
    assert mesh.traffic.entries()["world", "all_reduce"] == (7, reduced)

    assert c.gather_objects(f"rank {rank}", group) == [f"rank {i}" for i in range(size)]
    c.barrier(group)
    assert mesh.traffic.entries()["world", "barrier"] == (1, 0)
    by_group = mesh.traffic.bytes_by_group()
    assert by_group == {"world": sum(sent for _, sent in mesh.traffic.entries().values())}


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(size: int) -> None:
    run_on_ranks(check_collectives, size)


def test_a_group_of_one_rank_moves_and_counts_nothing() -> None:
    group = c.Group("alone", (0,), 0)
    x = rows(0, 4)
    same: list[Any] = [
        c.all_to_all(x, [4], [4], group),
        all_to_all_autograd(x, [4], [4], group),
        c.exchange_counts(x, group),
        c.all_reduce_(x, group),
        c.all_gather_uneven(x, group)[0],
        c.gather_objects(x, group)[0],
    ]
    c.barrier(group)
    assert all(s is x for s in same)
    assert group.traffic.entries() == {}


def test_traffic_adds_up_by_group() -> None:
    traffic = c.Traffic()
    ep, mem = c.Group("ep", (0, 1), 0), c.Group("mem", (0, 1, 2, 3), 0)
    traffic.add(ep.name, "all_to_all", 5, ep.ranks)
    traffic.add(ep.name, "all_to_all", 7, ep.ranks)
    traffic.add(mem.name, "all_to_all", 2, mem.ranks)
    traffic.add(ep.name, "all_reduce", 1, ep.ranks)
    assert traffic.entries()["ep", "all_to_all"] == (2, 12)
    assert traffic.bytes_by_group() == {"ep": 13, "mem": 2}
    assert traffic.calls == 4
    assert [call[:4] for call in traffic.last_calls()] == [
        ("ep", (0, 1), "all_reduce", 3),
        ("mem", (0, 1, 2, 3), "all_to_all", 1),
    ]


def asked(awake: float, ready_after: int) -> tuple[int, int, float]:
    """How often a wait asked whether the work is done, how often it then waited for it, and the seconds that
    it counted.
    """
    traffic, calls = c.Traffic(awake), {"asked": 0, "waited": 0}

    def is_completed() -> bool:
        calls["asked"] += 1
        return calls["asked"] >= ready_after

    work: Any = SimpleNamespace(
        is_completed=is_completed, wait=lambda: calls.update(waited=calls["waited"] + 1)
    )
    traffic.wait(work)
    return calls["asked"], calls["waited"], traffic.waited


def test_the_main_thread_stays_awake_for_a_while() -> None:
    assert asked(30.0, 3)[:2] == (3, 1)  # done early
    times, waited, seconds = asked(0.01, 1 << 60)  # then it sleeps
    assert times > 1
    assert waited == 1
    assert 0.01 <= seconds < 5
    assert asked(0.0, 3)[:2] == (0, 1)


def test_other_threads_sleep_at_once_and_count_nothing() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(asked(30.0, 3)))
    thread.start()
    thread.join(60)
    assert found == [(0, 1, 0.0)]
