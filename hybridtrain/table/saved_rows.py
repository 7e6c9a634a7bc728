"""Rows that were read one update early (`engram.fetch` "stale"), as a checkpoint keeps them: the table has
newer values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def saved_rows_name(kind: str, low: int, high: int) -> str:
    """The name of the rows that the owner of rows `low` to `high-1` saved."""
    return f"{kind}.{low}-{high}"


def saved_rows_for(names: Iterable[str], kind: str, low: int, high: int) -> list[str]:
    """The names of the saved rows of a kind, from the names of a checkpoint's tensors, that may have rows
    among `low` to `high-1`.

    Raises ValueError where such a name does not say which owner's rows it has.
    """
    out = []
    for name in names:
        if name.startswith(f"{kind}.") and name.endswith(".numbers"):
            match = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})\.numbers", name.removeprefix(f"{kind}."))
            if match is None:
                raise ValueError(f"{name} does not say which rows it is of")
            if int(match[1]) < high and low < int(match[2]):
                out.append(name.removesuffix(".numbers"))
    return out


KIND = "ahead"


@dataclass(frozen=True)
class SavedRows:
    """numbers: of the packed table, int64 [N], ascending; values [N, D]: what these rows were."""

    numbers: Tensor
    values: Tensor

    def state(self, low: int, high: int) -> dict[str, Tensor]:
        """For the checkpoint of the owner of rows `low` to `high-1`."""
        name = saved_rows_name(KIND, low, high)
        return {f"{name}.numbers": self.numbers, f"{name}.values": self.values}

    def write_over(self, numbers_M: Tensor, values_MD: Tensor) -> None:
        """Put the rows that are among numbers_M, any int64, in their places of values_MD."""
        if len(self.numbers) == 0:
            return
        place_M = torch.searchsorted(self.numbers, numbers_M).clamp_(max=len(self.numbers) - 1)
        found_M = self.numbers[place_M] == numbers_M
        values_MD[found_M] = self.values[place_M[found_M]].to(values_MD.dtype)
