"""Runs a test's function on several gloo ranks of this machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hybridtrain.launch.cores import shares_of_cores, usable_cores

# torch is imported once, in the server that every rank is forked from; the launcher, which shares the server,
# adds nothing
PRELOAD = ["torch", "torch.distributed", "torch.distributed.fsdp", "hybridtrain.run.loop", "tests.ranks"]


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message is its traceback."""


def run_on_ranks(function: Callable[..., Any], nproc: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call the module-level `function(*args)` on `nproc` ranks that have joined one gloo world; returns each
    rank's result.

    Results travel pickled by value. The ranks see torchrun's environment and one CPU thread each. Raises
    RankFailure with the first failing rank's traceback. No process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="hybridtrain-test-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(nproc)]
        shares = shares_of_cores(usable_cores(), nproc, 1)
        ranks = [
            context.Process(
                target=_rank,
                args=(
                    partial(function, *args),
                    rank,
                    shares,
                    str(Path(folder) / "store"),
                    timeout,
                    pipes[rank][1],
                ),
            )
            for rank in range(nproc)
        ]
        try:
            for rank, (_, sender) in zip(ranks, pipes, strict=True):
                rank.start()
                sender.close()  # so that a dead rank reads as the end of its pipe
            results = _collect([receiver for receiver, _ in pipes], deadline, timeout)
            for rank in ranks:
                rank.join(max(0.1, deadline - time.monotonic()))
            return results
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join(10)


def _collect(receivers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    """Every rank's result. Of several failures the earliest is raised, since it is mostly why the others
    failed.
    """
    results: dict[int, Any] = {}
    failures: list[tuple[int, int, str]] = []  # time, rank, text
    while len(results) + len(failures) < len(receivers):
        waiting = [
            r for i, r in enumerate(receivers) if i not in results and i not in [f[1] for f in failures]
        ]
        ready = wait(waiting, 0.5 if failures else max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            number = next(i for i, r in enumerate(receivers) if r is receiver)
            try:
                when, good, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                when, good, value = 0, False, "died without a word"  # before those that could still speak
            if good:
                results[number] = value
            else:
                failures.append((when, number, value))
    if failures:
        _, number, text = min(failures)
        raise RankFailure(f"rank {number} {text}")
    if len(results) < len(receivers):
        raise RankFailure(
            f"rank(s) {[i for i in range(len(receivers)) if i not in results]} did not finish within "
            f"{timeout} s"
        )
    return [results[i] for i in range(len(receivers))]


def _rank(
    work: Callable[[], Any],
    rank: int,
    shares: list[list[int]],
    store: str,
    timeout: float,
    sender: Connection,
) -> None:
    gc.freeze()  # as the launcher's ranks, and bound as they are
    if shares[rank]:
        os.sched_setaffinity(0, shares[rank])
    nproc = len(shares)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(nproc),
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=nproc,
            timeout=timedelta(seconds=timeout),
        )
        message = pickle.dumps((0, True, work()))
        if dist.is_initialized():
            dist.barrier()  # none leaves while another still talks to it
    except BaseException:
        message = pickle.dumps((time.time_ns(), False, f"failed:\n{traceback.format_exc()}"))
    sender.send_bytes(message)
    sender.close()
    os._exit(0)  # nothing of a test's threads or groups may keep the process
