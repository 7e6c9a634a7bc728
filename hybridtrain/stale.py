"""Rows that were read one update early (`memory.fetch` "stale"), as a checkpoint keeps them: the table alone cannot give them back.

Each owner writes its part under a name that says which rows of the packed table it owned, so that owners of other ranges, at
another layout, find theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PREFIX = "ahead."


@dataclass(frozen=True)
class StaleRows:
    """numbers: of the packed table, int64 [N], ascending; values [N, D]: what these rows were."""

    numbers: Tensor
    values: Tensor

    def state(self, low: int, high: int) -> dict[str, Tensor]:
        """For the checkpoint of the owner of rows `low` to `high-1`."""
        piece = f"{PREFIX}{low}-{high}"
        return {f"{piece}.numbers": self.numbers, f"{piece}.values": self.values}

    @classmethod
    def pieces(cls, state: Mapping[str, Tensor]) -> list[StaleRows]:
        """What several owners' `state` together hold."""
        numbers = [name for name in state if name.endswith(".numbers")]
        return [cls(state[name], state[name.removesuffix("numbers") + "values"]) for name in numbers]

    def write_over(self, numbers_M: Tensor, values_MD: Tensor) -> None:
        """Put the rows that are among numbers_M, any int64, in their places of values_MD."""
        if len(self.numbers) == 0:
            return
        place_M = torch.searchsorted(self.numbers, numbers_M).clamp_(max=len(self.numbers) - 1)
        found_M = self.numbers[place_M] == numbers_M
        values_MD[found_M] = self.values[place_M[found_M]].to(values_MD.dtype)


def names_for(names: Iterable[str], low: int, high: int) -> list[str]:
    """Those of a checkpoint's stale rows, among its names without their section, that the owner of `low` to `high-1` needs."""
    out = []
    for name in names:
        theirs = [int(bound) for bound in name.removeprefix(PREFIX).split(".")[0].split("-")]
        if theirs[0] < high and low < theirs[1]:
            out.append(name)
    return out
