"""All-to-alls under way beside the computation: rows on their way with the time they take, and exchanges
whose gradients go back the way their rows came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.parallel import collectives
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.traffic import Traffic

Guard = Callable[[], AbstractContextManager[None]]


class Handle:
    """An all-to-all under way beside the computation; it holds what is sent until `wait` has given the
    result.
    """

    def __init__(self, out: Tensor, sent: Tensor, work: dist.Work | None, traffic: Traffic) -> None:
        self._out, self._sent, self._work, self._traffic = out, sent, work, traffic
        self._times: list[float] = []  # begun, waited for and ended, in any order of the last two
        self._events: list[torch.cuda.Event] = []
        if work is not None and out.is_cuda:
            self._mark()
        elif work is not None:
            self._times.append(time.perf_counter())
            work.get_future().add_done_callback(lambda _: self._times.append(time.perf_counter()))

    def wait(self) -> Tensor:
        """The rows of every rank, in rank order; on CUDA the current stream waits and not this thread. Call
        it once.
        """
        out, work = self._out, self._work
        if work is not None and out.is_cuda:
            self._mark()
            with torch.cuda.stream(torch.cuda.Stream(out.device)):
                work.wait()
                self._mark()
        elif work is not None:
            self._times.append(time.perf_counter())
        if work is not None:
            self._traffic.wait(work)
        del self._out, self._sent, self._work
        return out

    def hidden_seconds(self) -> float:
        """How long it travelled before it was waited for; to be asked after `wait`, on CUDA when the device
        has come so far.
        """
        if self._events:
            begun, *others = self._events
            return float(min(begun.elapsed_time(event) for event in others)) / 1000
        return min(self._times[1:]) - self._times[0] if self._times else 0.0

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)


def begin_all_to_all(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Handle:
    """`all_to_all` that runs on beside what follows. Every rank begins it at the same place among the group's
    collectives.
    """
    if group.size == 1:
        return Handle(x, x, None, group.traffic)
    return Handle(*collectives.post_all_to_all(x, send, receive, group), group.traffic)


def all_to_all_autograd(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, guard: Guard = nullcontext
) -> Tensor:
    """`all_to_all` whose gradient goes back the way its rows came."""
    return start_all_to_all(x, send, receive, group, guard)()


def start_all_to_all(
    x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group, guard: Guard = nullcontext
) -> Callable[[], Tensor]:
    """Begin `all_to_all_autograd`; what is returned ends it and must be called once.

    What is computed in between runs while the rows travel, and so does its backward pass while their
    gradients travel back. `guard` is entered around whatever allocates the rows received, there and back.
    """
    if group.size == 1:
        return lambda: x
    flight = AsyncAllToAll(send, receive, group, guard)
    token: Tensor = _Begin.apply(x, flight)  # type: ignore[no-untyped-call]

    def finish() -> Tensor:
        out: Tensor = _End.apply(token, flight)  # type: ignore[no-untyped-call]
        return out

    return finish


@dataclass
class AsyncAllToAll:
    """One exchange: what both its ends need, and how to end what is under way, the rows or later their
    gradients.
    """

    send: Sequence[int]
    receive: Sequence[int]
    group: Group
    guard: Guard
    finish: Callable[[], Tensor] | None = None

    def begin(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """An empty tensor, which ties the two ends together for autograd and carries nothing."""
        with self.guard():
            self.finish = collectives.launch_all_to_all(x, send, receive, self.group)
        return x.new_empty(0)

    def end(self) -> Tensor:
        assert self.finish is not None, "an exchange ends once for every time that it begins"
        finish, self.finish = self.finish, None
        return finish()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return flight.begin(x, flight.send, flight.receive)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.end(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: AsyncAllToAll) -> Tensor:
        ctx.flight = flight
        return flight.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.begin(grads[0], ctx.flight.receive, ctx.flight.send), None
