"""Rows as they were at one moment, read in parts while training goes on changing them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class CopyOnWrite:
    """Tensors with the same rows as dim 0, as they were when this was made.

    Nothing is copied at first. Whoever changes rows calls `keep` before; `read` takes the rows as they are
    and then puts back what was kept of them. So it may run in another thread: a row that was changed, or is
    half changed, when it was read had been kept before. A row is kept when it changes for the first time, and
    never again: what is kept does not grow with the time that passes, but with the number of different rows
    that change.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []
        some = next(iter(self._tensors.values()))
        # numpy's zeros are pages that exist once they are written to: no pass over a byte for every row of
        # the table
        self._has_R = torch.from_numpy(np.zeros(len(some), dtype=np.bool_)).to(some.device)

    def keep(self, rows_N: Tensor) -> None:
        """Remember rows, ascending int64 [N], that are about to change; those that changed before are
        remembered already.
        """
        new_N = rows_N[~self._has_R.index_select(0, rows_N)]
        if len(new_N):
            self._kept.append(
                (new_N, {name: value.index_select(0, new_N) for name, value in self._tensors.items()})
            )
            self._has_R.index_fill_(0, new_N, True)

    def read(self, name: str, low: int, high: int) -> Tensor:
        """Rows `low` to `high-1` of a tensor, on the CPU."""
        out = self._tensors[name][low:high].to("cpu", copy=True)
        for rows_N, values in tuple(self._kept):
            start, end = torch.searchsorted(rows_N, torch.tensor([low, high], device=rows_N.device)).tolist()
            out.index_copy_(0, (rows_N[start:end] - low).to("cpu"), values[name][start:end].to("cpu"))
        return out

    def gather(self, name: str, rows_N: Tensor) -> Tensor:
        """Some rows of a tensor, ascending int64 [N], on the CPU."""
        out = self._tensors[name].index_select(0, rows_N).to("cpu")
        for kept_K, values in tuple(self._kept):
            place_K = torch.searchsorted(rows_N, kept_K).clamp_(max=max(len(rows_N) - 1, 0))
            found_K = rows_N[place_K] == kept_K if len(rows_N) else torch.zeros_like(kept_K, dtype=torch.bool)
            out.index_copy_(0, place_K[found_K].to("cpu"), values[name][found_K].to("cpu"))
        return out
