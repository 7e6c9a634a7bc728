"""The tests' own helper: results in rank order, failures with their traceback, no process left."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailure, run_on_ranks


def total(offset: int) -> tuple[int, int, int]:
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), int(value), torch.get_num_threads()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    time.sleep(60)


def sleep_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def test_results_come_in_rank_order() -> None:
    assert run_on_ranks(total, 2, 10) == [(0, 21, 1), (1, 21, 1)]


def test_failures_are_raised_and_end_all_ranks() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 failed.*in fail_on_one.*KeyError: 'the reason'"):
        run_on_ranks(fail_on_one, 2)
    with pytest.raises(RankFailure, match="rank 0 died without a word"):
        run_on_ranks(die_on_one, 2)
    with pytest.raises(RankFailure, match=r"rank\(s\) \[0, 1\] did not finish within 3 s"):
        run_on_ranks(sleep_on_one, 2, timeout=3)
    assert multiprocessing.active_children() == []
