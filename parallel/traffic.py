"""The ledger of what a rank sends: calls and bytes by group and operation, and each group's last call."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

SEND = "send"


class Call(NamedTuple):
    """The last collective that this rank began in a group: its `number`-th there, counted from 1.

    A send is one of two ranks, who sends and who receives; each direction is numbered for itself, alike by
    both.
    """

    group: str
    ranks: tuple[int, ...]  # all that take part
    operation: str
    number: int
    at: float  # time.monotonic()


class Traffic:
    """A ledger of (group, operation) -> [calls, bytes] and of the last call of each group; safe to write from
    several threads.

    A call is entered before it is made, so that a rank that waits in it is known to wait. `calls` rises as
    long as this rank goes on; `waited` are its seconds in collectives, where the host waits for them.

    The main thread stays awake for the first `awake` seconds that it waits: between ranks of one machine a
    core that sleeps takes longer to wake than most messages to arrive. It yields its core to all others
    meanwhile.
    """

    def __init__(self, awake: float = 0.0) -> None:
        self.awake = awake
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], list[int]] = {}
        self._last: dict[tuple[str, tuple[int, ...]], Call] = {}
        self.calls = 0
        self.waited = 0.0

    def add(self, group: str, operation: str, sent: int, ranks: tuple[int, ...]) -> None:
        """A call in which these ranks of the group take part."""
        with self._lock:
            entry = self._entries.setdefault((group, operation), [0, 0])
            entry[0] += 1
            entry[1] += sent
        self.expect(group, operation, ranks)

    def expect(self, group: str, operation: str, ranks: tuple[int, ...]) -> None:
        """The part of a call in which this rank sends nothing: it will wait for another's."""
        with self._lock:
            self.calls += 1
            number = self._last[group, ranks].number + 1 if (group, ranks) in self._last else 1
            self._last[group, ranks] = Call(group, ranks, operation, number, time.monotonic())

    def wait(self, work: dist.Work) -> None:
        """Wait for other ranks, or for what is sent to arrive; the main thread's seconds are `waited`."""
        if threading.current_thread() is not threading.main_thread():
            work.wait()
            return
        begin = time.perf_counter()
        while time.perf_counter() - begin < self.awake and not work.is_completed():
            os.sched_yield()
        work.wait()
        self.waited += time.perf_counter() - begin

    def alive(self) -> None:
        """Note progress outside of collectives, such as a part of a checkpoint that was written."""
        with self._lock:
            self.calls += 1

    def last_calls(self) -> list[Call]:
        """Of every group, and direction of sends, that was used; the newest first."""
        with self._lock:
            return sorted(self._last.values(), key=lambda call: -call.at)

    def entries(self) -> dict[tuple[str, str], tuple[int, int]]:
        with self._lock:
            return {key: (calls, sent) for key, (calls, sent) in self._entries.items()}

    def bytes_by_group(self) -> dict[str, int]:
        out: dict[str, int] = {}
        for (group, _), (_, sent) in self.entries().items():
            out[group] = out.get(group, 0) + sent
        return out
