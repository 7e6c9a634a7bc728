"""Every collective of ours, each counted by group and operation: calls and the bytes this rank sends to others. What torch
sends for FSDP (fsdp.py) and between pipeline stages (pipeline.py) is counted in the same ledger.

Bytes are payload by the ring or pairwise algorithm: what the fabric must carry for this rank, not what a backend
adds. Groups of one rank do nothing and count nothing. What a layer calls is marked `replayed` (replay.py), so that a
recomputed layer sends nothing.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo as uncompiled  # torch.compiler.disable would import the compiler here, for seconds

from hybridtrain.parallel.replay import refuse_again, replayed, replayed_start

Guard = Callable[[], AbstractContextManager[None]]


class Traffic:
    """A ledger of (group, operation) -> [calls, bytes]; safe to write from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], list[int]] = {}

    def add(self, group: str, operation: str, sent: int) -> None:
        with self._lock:
            entry = self._entries.setdefault((group, operation), [0, 0])
            entry[0] += 1
            entry[1] += sent

    def entries(self) -> dict[tuple[str, str], tuple[int, int]]:
        with self._lock:
            return {key: (calls, sent) for key, (calls, sent) in self._entries.items()}

    def bytes_by_group(self) -> dict[str, int]:
        out: dict[str, int] = {}
        for (group, _), (_, sent) in self.entries().items():
            out[group] = out.get(group, 0) + sent
        return out


@dataclass(frozen=True)
class Group:
    """One communication group as this rank sees it. `process_group` is None where the group is this rank alone."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return len(self.ranks)


def all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send `send[i]` rows of `x` (dim 0, in order) to rank i and return the `receive[j]` rows of every rank j, in rank order."""
    return x if group.size == 1 else _begin_all_to_all(x, send, receive, group)()


class Pending:
    """An all-to-all under way beside the computation; it holds what is sent until `wait` has given the result."""

    def __init__(self, out: Tensor, sent: Tensor, work: dist.Work | None) -> None:
        self._out, self._sent, self._work = out, sent, work
        self._times: list[float] = []  # begun, waited for and ended, in any order of the last two
        self._events: list[torch.cuda.Event] = []
        if work is not None and out.is_cuda:
            self._mark()
        elif work is not None:
            self._times.append(time.perf_counter())
            work.get_future().add_done_callback(lambda _: self._times.append(time.perf_counter()))

    def wait(self) -> Tensor:
        """The rows of every rank, in rank order; on CUDA the current stream waits and not this thread. Call it once."""
        out, work = self._out, self._work
        if work is not None and out.is_cuda:
            self._mark()
            with torch.cuda.stream(torch.cuda.Stream(out.device)):
                work.wait()
                self._mark()
        elif work is not None:
            self._times.append(time.perf_counter())
        if work is not None:
            work.wait()
        del self._out, self._sent, self._work
        return out

    def hidden_seconds(self) -> float:
        """How long it travelled before it was waited for; to be asked after `wait`, on CUDA when the device has come so far."""
        if self._events:
            begun, *others = self._events
            return float(min(begun.elapsed_time(event) for event in others)) / 1000
        return min(self._times[1:]) - self._times[0] if self._times else 0.0

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


def begin_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Pending:
    """`all_to_all` that runs on beside what follows. Every rank begins it at the same place among the group's collectives."""
    if group.size == 1:
        return Pending(x, x, None)
    return Pending(*_post_all_to_all(x, send, receive, group))


def all_to_all_autograd(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, guard: Guard = nullcontext) -> Tensor:
    """`all_to_all` whose gradient goes back the way its rows came."""
    return start_all_to_all(x, send, receive, group, guard)()


def start_all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, guard: Guard = nullcontext
) -> Callable[[], Tensor]:
    """Begin `all_to_all_autograd`; what is returned ends it and must be called once.

    What is computed in between runs while the rows travel, and so does its backward pass while their gradients travel back.
    `guard` is entered around whatever allocates the rows received, there and back.
    """
    if group.size == 1:
        return lambda: x
    flight = _Flight(send, receive, group, guard)
    token: Tensor = _Depart.apply(x, flight)  # type: ignore[no-untyped-call]

    def finish() -> Tensor:
        out: Tensor = _Arrive.apply(token, flight)  # type: ignore[no-untyped-call]
        return out

    return finish


@dataclass
class _Flight:
    """One exchange: what both its ends need, and how to end what is under way, the rows or later their gradients."""

    send: Sequence[int]
    receive: Sequence[int]
    group: Group
    guard: Guard
    finish: Callable[[], Tensor] | None = None

    def begin(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """An empty tensor, which ties the two ends together for autograd and carries nothing."""
        with self.guard():
            self.finish = _begin_all_to_all(x, send, receive, self.group)
        return x.new_empty(0)

    def end(self) -> Tensor:
        assert self.finish is not None, "an exchange ends once for every time that it begins"
        finish, self.finish = self.finish, None
        return finish()


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.begin(x, flight.send, flight.receive)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.begin(grads[0], ctx.flight.receive, ctx.flight.send), None


@replayed_start
def _begin_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Callable[[], Tensor]:
    out, _, work = _post_all_to_all(x, send, receive, group)

    def finish() -> Tensor:
        work.wait()
        return out

    return finish


def _post_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> tuple[Tensor, Tensor, dist.Work]:
    """What will be received, what is sent and must live as long, and the work to wait for."""
    x = x.contiguous()
    out = x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, list(receive), list(send), group=group.process_group, async_op=True)
    _count(group, "all_to_all", (sum(send) - send[group.rank]) * _row_bytes(x))
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
    """Every rank's `x` (all of one shape), stacked along a new dim 0; the gradient of each is summed over the ranks."""
    if group.size == 1:
        return x[None]
    out: Tensor = _AllGather.apply(x, group)  # type: ignore[no-untyped-call]
    return out


@uncompiled
def reduce_scatter_autograd(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of `x[i]` on rank i; dim 0 is the group's size. Its gradient is every rank's, stacked."""
    if group.size == 1:
        return x[0]
    out: Tensor = _ReduceScatter.apply(x, group)  # type: ignore[no-untyped-call]
    return out


@replayed
def _all_gather(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty((group.size, *x.shape))
    dist.all_gather_single(out, x.contiguous()[None], group=group.process_group)
    count_all_gather(x, group)
    return out


@replayed
def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(x.shape[1:])
    dist.reduce_scatter_single(out[None], x.contiguous(), group=group.process_group)
    count_reduce_scatter(out, group)
    return out


def exchange_counts(counts: Tensor, group: Group) -> Tensor:
    """`counts[i]` goes to rank i; returns what every rank sent here. Any number of columns; dim 0 is the group's size."""
    ones = [1] * group.size
    return all_to_all(counts, ones, ones, group)


def all_reduce_(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` in place over the group; every rank gets bitwise the same result."""
    if group.size > 1:
        dist.all_reduce(x, op=op, group=group.process_group)
        count_all_reduce(x, group)
    return x


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
    dist.all_gather_single(out, padded, group=group.process_group)
    count_all_gather(padded, group)
    return [
        part[:length] for part, length in zip(out.chunk(group.size) if max(lengths) else [x] * group.size, lengths, strict=True)
    ]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Every rank's `value`, on every rank (pickled; for messages, not for tensors)."""
    if group.size == 1:
        return [value]
    out: list[Any] = [None] * group.size
    dist.all_gather_object(out, value, group=group.process_group)
    _count(group, "all_gather", (group.size - 1) * len(pickle.dumps(value)))
    return out


def swap(x: Tensor, peer: int, group: Group) -> Tensor:
    """Send `x` to rank `peer` of the group and return that rank's, of the same shape; only the two take part."""
    out = torch.empty_like(x)
    pair = group.process_group
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x.contiguous(), group=pair, group_peer=peer),
            dist.P2POp(dist.irecv, out, group=pair, group_peer=peer),
        ]
    )
    for work in works:
        work.wait()
    count_send(x, group, "swap")
    return out


def barrier(group: Group) -> None:
    if group.size > 1:
        dist.barrier(group=group.process_group)
        _count(group, "barrier", 0)


def count_all_gather(mine: Tensor, group: Group) -> None:
    """An all-gather in which every rank has as much as `mine`."""
    _count(group, "all_gather", (group.size - 1) * mine.nbytes)


def count_reduce_scatter(mine: Tensor, group: Group) -> None:
    """A reduce-scatter that leaves every rank as much as `mine`."""
    _count(group, "reduce_scatter", (group.size - 1) * mine.nbytes)


def count_all_reduce(x: Tensor, group: Group) -> None:
    _count(group, "all_reduce", 2 * (group.size - 1) * x.nbytes // group.size)


def count_send(x: Tensor, group: Group, operation: str = "send") -> None:
    _count(group, operation, x.nbytes)


def _row_bytes(x: Tensor) -> int:
    return x[:1].numel() * x.element_size() if x.shape[0] else 0


def _count(group: Group, operation: str, sent: int) -> None:
    refuse_again(f"{operation} over {group.name}")
    group.traffic.add(group.name, operation, sent)
