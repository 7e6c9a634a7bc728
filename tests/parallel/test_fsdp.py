"""Gradients of ranks are added up in rank order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.fsdp import RankOrderSum
from tests.ranks import run_on_ranks

RANKS, WIDTH = 3, 1001


def contribution(rank: int) -> torch.Tensor:
    """Of very different sizes, so that another order is another sum."""
    return torch.randn(RANKS * WIDTH, generator=torch.Generator().manual_seed(rank)) * 100.0**rank


def add_up() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    counted = Group("fsdp", tuple(range(RANKS)), rank, group)
    total = RankOrderSum(counted)
    out = total.allocate((WIDTH,), dtype=torch.float32, device=torch.device("cpu"))
    total(out, contribution(rank), group, dist.ReduceOp.SUM)
    a, b, c = (contribution(r).chunk(RANKS)[rank] for r in range(RANKS))
    assert torch.equal(out, (a + b) + c)
    assert not torch.equal(out, a + (b + c))
    assert counted.traffic.entries() == {("fsdp", "reduce_scatter"): (1, (RANKS - 1) * WIDTH * 4)}
    with pytest.raises(ValueError, match="gradients are summed, at once"):
        total(out, contribution(rank), group, dist.ReduceOp.AVG)


def test_the_order_is_that_of_the_ranks() -> None:
    run_on_ranks(add_up, RANKS)
