"""Every piece is done once, and each thread keeps to a core where there are as many as threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from hybridtrain.kernels.moe_swiglu import op as threads
from hybridtrain.launch.cores import usable_cores


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads._pool.cache_clear()
    yield
    threads._pool.cache_clear()
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_piece_is_done_once_and_the_caller_keeps_its_threads_and_cores() -> None:
    done: list[int] = []
    seen: list[tuple[int, bool, int]] = []

    def work(pieces: Iterator[int]) -> None:
        done.extend(pieces)
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), len(os.sched_getaffinity(0))))

    cores = len(usable_cores())
    threads.share_out(work, range(50))
    assert sorted(done) == list(range(50))
    assert seen == [(1, False, 1 if cores == 2 else cores)] * 2
    assert (torch.get_num_threads(), len(os.sched_getaffinity(0))) == (2, cores)


def test_each_thread_has_a_core_where_there_are_as_many() -> None:
    cores = usable_cores()
    assert sorted(threads._cores_of(len(cores))) == sorted(cores)
    assert threads._cores_of(len(cores) + 1) == []
