"""Exchanges beside the computation: what arrives, and how long they were hidden."""

from __future__ import annotations

import time

import torch

from hybridtrain.parallel import collectives as c
from hybridtrain.parallel.async_all_to_all import begin_all_to_all
from tests.parallel.groups import mesh_here
from tests.parallel.test_collectives import SPLITS, rows
from tests.ranks import run_on_ranks


def begin_and_wait() -> list[float]:
    """All splits; then rank 1 begins two exchanges 0.4 s after rank 0: how long these were hidden here."""
    mesh = mesh_here()
    group, rank = mesh.own_group("mem", "mem_ahead"), mesh.rank
    assert group.process_group is not mesh.mem.process_group
    hidden = []
    for late, computing in [(0.0, 0.0)] * len(SPLITS[2]) + [(0.4, 0.0), (0.4, 1.2)]:
        splits = SPLITS[2][len(hidden) % len(SPLITS[2])]
        send, receive = splits[rank], [splits[i][rank] for i in range(2)]
        expected = c.all_to_all(rows(rank, sum(send)), send, receive, mesh.world)
        c.barrier(mesh.world)
        time.sleep(late * rank)
        pending = begin_all_to_all(rows(rank, sum(send)), send, receive, group)
        time.sleep(computing)
        assert torch.equal(pending.wait(), expected)
        hidden.append(pending.hidden_seconds())
    away = sum(sum(splits[rank]) - splits[rank][rank] for splits in [*SPLITS[2], *SPLITS[2][:2]])
    assert mesh.traffic.entries()["mem_ahead", "all_to_all"] == (len(hidden), away * 3 * 8)
    return hidden[-2:]


def test_an_exchange_beside_the_computation_and_how_long_it_was_hidden() -> None:
    (waited, computed), (waited_1, computed_1) = run_on_ranks(begin_and_wait, 2)
    assert waited < 0.2  # it took 0.4 s, all of them waited for
    assert 0.3 < computed < 1.1  # it took 0.4 s beside 1.2 s of other work
    assert max(waited_1, computed_1) < 0.3  # when rank 1 began, rank 0 had sent


def test_alone_nothing_travels() -> None:
    group = c.Group("mem_ahead", (0,), 0)
    pending = begin_all_to_all(rows(0, 2), [2], [2], group)
    assert torch.equal(pending.wait(), rows(0, 2))
    assert pending.hidden_seconds() == 0.0
    assert group.traffic.entries() == {}
