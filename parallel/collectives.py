"""Every collective of ours, each counted by group and operation: calls and the bytes this rank sends to
others. What torch sends for FSDP (fsdp.py) and between pipeline stages (pipeline.py) is counted in the same
ledger.

Bytes are payload by the ring or pairwise algorithm: what the fabric must carry for this rank, not what a
backend adds. Groups of one rank do nothing and count nothing. What a layer calls is marked `replayed`
(replay.py), so that a recomputed layer sends nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import (
    _disable_dynamo as uncompiled,  # torch.compiler.disable would import the compiler here, for seconds
)

from hybridtrain.parallel.replay import refuse_again, replayed, replayed_start
from hybridtrain.parallel.traffic import SEND, Traffic


@dataclass(frozen=True)
class Group:
    """One communication group as this rank sees it. `process_group` is None where the group is this rank
    alone.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", len(self.ranks))


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send `send[i]` rows of `x` (dim 0, in order) to rank i and return the `receive[j]` rows of every rank
    j, in rank order.
    """
    return x if group.size == 1 else launch_all_to_all(x, send, receive, group)()


@replayed_start
def launch_all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group
) -> Callable[[], Tensor]:
    """Begin an all-to-all; what is returned waits for it and gives the rows of every rank, in rank order."""
    out, _, work = post_all_to_all(x, send, receive, group)

    def finish() -> Tensor:
        group.traffic.wait(work)
        return out

    return finish


def post_all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group
) -> tuple[Tensor, Tensor, dist.Work]:
    """Returns what will be received, what is sent (it must live as long) and the work to wait for."""
    x = x.contiguous()
    out = x.new_empty((sum(receive), *x.shape[1:]))
    _count(group, "all_to_all", (sum(send) - send[group.rank]) * _row_bytes(x))
    work = dist.all_to_all_single(out, x, list(receive), list(send), group=group.process_group, async_op=True)
    return out, x, work


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.group), None


@uncompiled
def all_gather_autograd(x: Tensor, group: Group) -> Tensor:
    """Every rank's `x` (all of one shape), stacked along a new dim 0; the gradient of each is summed over the
    ranks.
    """
    if group.size == 1:
        return x[None]
    out: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


@uncompiled
def reduce_scatter_autograd(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of `x[i]` on rank i; dim 0 is the group's size. Its gradient is every rank's,
    stacked.
    """
    if group.size == 1:
        return x[0]
    out: Tensor = _ReduceScatter.apply(x, group)  # type: ignore[no-untyped-call]
    return out


@replayed
def _all_gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty((group.size, *x.shape))
    count_all_gather(x, group)
    group.traffic.wait(
        dist.all_gather_single(out, x.contiguous()[None], group=group.process_group, async_op=True)
    )
    return out


@replayed
def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[1:])
    count_reduce_scatter(out, group)
    group.traffic.wait(
        dist.reduce_scatter_single(out[None], x.contiguous(), group=group.process_group, async_op=True)
    )
    return out


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """`counts[i]` goes to rank i; returns what every rank sent here. Any number of columns; dim 0 is the
    group's size.
    """
    ones = [1] * group.size
    return all_to_all(counts, ones, ones, group)


def all_reduce_(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` in place over the group; every rank gets bitwise the same result."""
    if group.size > 1:
        count_all_reduce(x, group)
        group.traffic.wait(dist.all_reduce(x, op=op, group=group.process_group, async_op=True))
    return x


def begin_broadcast(x: Tensor, owner: int, group: Group) -> Callable[[], None]:
    """Begin to send the contiguous `x` of the group's rank `owner` to all of its ranks, in place; what is
    returned waits for it.
    """
    _count(group, "broadcast", (group.size - 1) * x.nbytes if group.rank == owner else 0)
    work = dist.broadcast(x, group=group.process_group, group_src=owner, async_op=True)
    return partial(group.traffic.wait, work)


def all_gather_uneven(x: Tensor, group: Group) -> list[Tensor]:
    """Every rank's `x`, in rank order; dim 0 may differ between ranks."""
    if group.size == 1:
        return [x]
    sizes = x.new_zeros(group.size, dtype=torch.int64)
    sizes[group.rank] = x.shape[0]
    lengths: list[int] = all_reduce_(sizes, group).tolist()
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: x.shape[0]] = x
    out = padded.new_empty((group.size * max(lengths), *x.shape[1:]))
    count_all_gather(padded, group)
    group.traffic.wait(dist.all_gather_single(out, padded, group=group.process_group, async_op=True))
    return [
        part[:length]
        for part, length in zip(
            out.chunk(group.size) if max(lengths) else [x] * group.size, lengths, strict=True
        )
    ]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's `value`, on every rank (pickled; for messages, not for tensors)."""
    if group.size == 1:
        return [value]
    out: list[Any] = [None] * group.size
    _count(group, "all_gather", (group.size - 1) * len(pickle.dumps(value)))
    dist.all_gather_object(out, value, group=group.process_group)
    return out


def swap(x: Tensor, peer: int, group: Group) -> Tensor:
    """Send `x` to rank `peer` of the group and return what it sends, of one shape; others take no part."""
    out = torch.empty_like(x)
    pair = group.process_group
    _count(group, "swap", x.nbytes, tuple(sorted((group.ranks[group.rank], group.ranks[peer]))))
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x.contiguous(), group=pair, group_peer=peer),
            dist.P2POp(dist.irecv, out, group=pair, group_peer=peer),
        ]
    )
    for work in works:
        group.traffic.wait(work)
    return out


def barrier(group: Group) -> None:
    if group.size > 1:
        _count(group, "barrier", 0)
        dist.barrier(group=group.process_group)


def count_all_gather(mine: Tensor, group: Group) -> None:
    """Count an all-gather in which every rank has as much as `mine`."""
    _count(group, "all_gather", (group.size - 1) * mine.nbytes)


def count_reduce_scatter(mine: Tensor, group: Group) -> None:
    """Count a reduce-scatter that leaves every rank as much as `mine`."""
    _count(group, "reduce_scatter", (group.size - 1) * mine.nbytes)


def count_all_reduce(x: Tensor, group: Group) -> None:
    _count(group, "all_reduce", 2 * (group.size - 1) * x.nbytes // group.size)


def count_send(x: Tensor, group: Group, target: int) -> None:
    """Count a send of `x` to the rank `target` of all ranks."""
    _count(group, SEND, x.nbytes, (group.ranks[group.rank], target))


def count_receive(group: Group, source: int) -> None:
    """Note that this rank will wait for a send of the rank `source` of all ranks."""
    refuse_again(f"receive over {group.name}")
    group.traffic.expect(group.name, SEND, (source, group.ranks[group.rank]))


def _row_bytes(x: Tensor) -> int:
    return x[:1].numel() * x.element_size() if x.shape[0] else 0


def _count(group: Group, operation: str, sent: int, ranks: tuple[int, ...] = ()) -> None:
    refuse_again(f"{operation} over {group.name}")
    group.traffic.add(group.name, operation, sent, ranks or group.ranks)
