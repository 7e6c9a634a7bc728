"""Running sums that a module takes while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Counters:
    """Named sums since the last reset; detached, on the module's device, additive over micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._paused = False

    def add(self, name: str, value: Tensor) -> None:
        if self._paused:
            return
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While what was counted before is computed a second time."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
