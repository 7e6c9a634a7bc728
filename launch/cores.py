"""Which cores each rank of this machine keeps to.

Ranks that wait for each other sleep and wake many times a step. Where the kernel wakes two of them on one
core while another idles, they compute one after the other; bound to cores of their own they cannot.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from itertools import pairwise
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_SPINS = "10000"  # some ten microseconds


def let_openmp_sleep(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep soon after they have no work, in a process that will import torch with this
    environment.

    By default libgomp's look for work for milliseconds, on the cores where the threads of the experts
    compute meanwhile (kernels/moe_swiglu/op.py). What the environment says stands.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = _SPINS


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use, hardware threads of one core side by side."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return sorted(cores, key=lambda core: (_first_sibling(core), core))


def shares_of_cores(cores: list[int], ranks: int, threads: int) -> list[list[int]]:
    """The `cores` cut into one part for each rank, of as equal size as can be; empty ones where ranks are not
    to be bound.

    They are not where there is one rank, where the ranks' `threads` each are more than the cores, or where
    the system cannot.
    """
    if ranks == 1 or len(cores) < ranks * threads or not hasattr(os, "sched_setaffinity"):
        return [[] for _ in range(ranks)]
    bounds = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    return [cores[low:high] for low, high in pairwise(bounds)]


def _first_sibling(core: int) -> int:
    """The first hardware thread of the core of which this is one; itself where the system does not say."""
    try:
        text = (_CPUS / f"cpu{core}" / "topology" / "thread_siblings_list").read_text(encoding="ascii")
        return int(text.replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return core
