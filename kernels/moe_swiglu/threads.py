"""Work that falls into many small pieces, shared out among threads of one core each.

A product of a few hundred rows is too small to be cut over cores: two cores make two of them side by side in
less time than one after the other, and what one core has just written lies in its own cache when it reads it
again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def share_out(work: Callable[[Iterator[int]], None], pieces: Sequence[int]) -> None:
    """`work(some)` on as many threads as torch has here, without gradients; together they draw every piece
    once, in order.

    With fewer than two pieces a thread, `work` runs once, in the caller's thread, on all its cores.
    """
    left = iter(pieces)
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(pieces) < 2 * num_threads:
        work(left)
        return
    for running in [_pool(num_threads).submit(work, left) for _ in range(num_threads)]:
        running.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    pool, all_started = ThreadPoolExecutor(num_threads, "experts"), Barrier(num_threads)
    cores = _cores_of(num_threads)

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, {cores.pop()})  # this thread alone
        torch.set_num_threads(1)
        # a thread's first look makes the number its own; later it would see that of the threads to come
        torch.get_num_threads()
        torch.set_grad_enabled(False)
        all_started.wait()

    for started in [pool.submit(prepare) for _ in range(num_threads)]:
        started.result()
    torch.set_num_threads(num_threads)  # for the threads to come
    return pool


def _cores_of(num_threads: int) -> list[int]:
    """A core for each of the threads, where this process has as many as them; else none: it is not known
    which are idle.

    Threads that sleep between two layers are often woken all on one core, and stay there as long as their
    work takes.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return cores if len(cores) == num_threads else []
