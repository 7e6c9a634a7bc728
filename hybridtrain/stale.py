"""Rows that were read one update early (`memory.fetch` "stale"), as a checkpoint keeps them: the table has them no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridtrain.pieces import piece_name

KIND = "ahead"


@dataclass(frozen=True)
class StaleRows:
    """numbers: of the packed table, int64 [N], ascending; values [N, D]: what these rows were."""

    numbers: Tensor
    values: Tensor

    def state(self, low: int, high: int) -> dict[str, Tensor]:
        """For the checkpoint of the owner of rows `low` to `high-1`."""
        piece = piece_name(KIND, low, high)
        return {f"{piece}.numbers": self.numbers, f"{piece}.values": self.values}

    def write_over(self, numbers_M: Tensor, values_MD: Tensor) -> None:
        """Put the rows that are among numbers_M, any int64, in their places of values_MD."""
        if len(self.numbers) == 0:
            return
        place_M = torch.searchsorted(self.numbers, numbers_M).clamp_(max=len(self.numbers) - 1)
        found_M = self.numbers[place_M] == numbers_M
        values_MD[found_M] = self.values[place_M[found_M]].to(values_MD.dtype)
