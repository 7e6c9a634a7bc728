"""Ranks that act for themselves and learn what went wrong anywhere, so that all go on or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from torch.distributed.checkpoint.api import CheckpointException

from hybridtrain.parallel.collectives import Group, gather_objects

T = TypeVar("T")


class Failures(Exception):
    """What went wrong on which rank; the same on all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def all_or_none(world: Group, act: Callable[[], T]) -> list[T]:
    """What `act` returned on every rank; raises Failures on all of them where it raised on any."""
    problems: list[str] = []
    value: T | None = None
    try:
        value = act()
    except (Exception, CheckpointException) as error:  # whatever a disk or torch can raise
        problems = describe_failures(error, world.rank)
    outcomes = gather_objects((problems, value), world)
    if any(theirs for theirs, _ in outcomes):
        raise Failures(list(dict.fromkeys(p for theirs, _ in outcomes for p in theirs)))
    return [theirs for _, theirs in outcomes]


def on_first(world: Group, act: Callable[[], T]) -> T:
    """What `act` returned on rank 0, which alone runs it, on every rank; raises Failures on all of them where
    it raised.
    """
    return cast(T, all_or_none(world, act if world.rank == 0 else lambda: None)[0])


def describe_failures(error: BaseException, rank: int) -> list[str]:
    """One line for each rank that failed: torch raises what failed anywhere on all ranks, as one
    BaseException.
    """
    failures = (
        {r: e for r, (e, _) in error.failures.items()}
        if isinstance(error, CheckpointException)
        else {rank: error}
    )
    return [f"rank {r}: {type(e).__name__}: {e}".splitlines()[0] for r, e in failures.items()]
