"""Rows as they were at one moment, read piece by piece while training goes on changing them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Snapshot:
    """Tensors with the same rows as dim 0, as they were when this was made.

    Nothing is copied at first. Whoever changes rows calls `keep` before; `read` takes the rows as they are and then puts
    back what was kept of them. So it may run in another thread: a row that was changed, or is half changed, when it was read
    had been kept before.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []

    def keep(self, rows_N: Tensor) -> None:
        """Remember rows, ascending int64 [N], that are about to change."""
        self._kept.append((rows_N, {name: value.index_select(0, rows_N) for name, value in self._tensors.items()}))

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Rows `low` to `high-1` of a tensor, on the CPU."""
        out = self._tensors[name][low:high].to("cpu", copy=True)
        for rows_N, values in reversed(tuple(self._kept)):  # what was kept first is oldest, and wins
            start, end = torch.searchsorted(rows_N, torch.tensor([low, high], device=rows_N.device)).tolist()
            out.index_copy_(0, (rows_N[start:end] - low).to("cpu"), values[name][start:end].to("cpu"))
        return out

    def gather(self, name: str, rows_N: Tensor) -> Tensor:
        """Some rows of a tensor, ascending int64 [N], on the CPU."""
        out = self._tensors[name].index_select(0, rows_N).to("cpu")
        for kept_K, values in reversed(tuple(self._kept)):
            place_K = torch.searchsorted(rows_N, kept_K).clamp_(max=max(len(rows_N) - 1, 0))
            found_K = rows_N[place_K] == kept_K if len(rows_N) else torch.zeros_like(kept_K, dtype=torch.bool)
            out.index_copy_(0, place_K[found_K].to("cpu"), values[name][found_K].to("cpu"))
        return out
