"""Running sums that a module takes while it trains."""

from __future__ import annotations

from torch import Tensor


class Counters:
    """Named sums since the last reset; detached, on the module's device, additive over micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
