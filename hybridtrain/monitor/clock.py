"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in named phases since the last `take`. On CUDA by events, so that measuring never waits
    for the device.

    `step`, `current` and `entered` say where the run stands: step and phase under way, a number that rises as
    it goes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.step, self.current, self.entered = 0, "", 0
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.current, self.entered = name, self.entered + 1
        if self.cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_at = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin_at
        self.current = ""

    def alive(self) -> None:
        """Note progress within a long phase."""
        self.entered += 1

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds
