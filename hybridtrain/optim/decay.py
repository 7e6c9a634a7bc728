"""The weight decay that rows owe for steps that did not touch them, logged once for the whole table."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.kernels.rowwise_adam.op import owed


class DecayLog:
    """entry t = log of the product of the decay factors of steps 1 … t, in float64; entry 0 is 0. N rows
    asked for.
    """

    def __init__(self, entries: list[float], device: torch.device) -> None:
        self._length = len(entries)
        self._entries = torch.zeros(max(1024, 2 * self._length), dtype=torch.float64, device=device)
        self._entries[: self._length] = torch.tensor(entries, dtype=torch.float64)
        self._total = entries[-1]

    def append(self, log_factor: float) -> None:
        if self._length == len(self._entries):
            self._entries = torch.cat([self._entries, torch.zeros_like(self._entries)])
        self._total += log_factor
        self._entries[self._length] = self._total
        self._length += 1

    @property
    def entries(self) -> Tensor:
        return self._entries[: self._length]

    def factor(self, last_N: Tensor, coming: float = 0.0) -> Tensor:
        """float32 [N]: product of the factors of all steps after `last_N`, and of one to come whose log is
        `coming`.
        """
        return owed(self._entries, last_N, self._total + coming)

    def to_list(self) -> list[float]:
        return self.entries.tolist()
