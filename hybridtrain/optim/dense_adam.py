"""Adam over a whole table: the reference for small tables.

Shapes: R rows of the local table, D row width, N touched rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class DenseAdam:
    """torch's Adam over the whole local table, float32, the reference: two moments of [R, D].

    By its nature it allocates a gradient of the table's size at every step, and updates rows that no token
    read. Weight decay is decoupled and never owed.
    """

    def __init__(
        self,
        table_RD: Tensor,
        *,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.table_RD = table_RD
        self.step_count = 0
        self.state = {name: torch.zeros_like(table_RD) for name in ("m", "v")}
        self._adam = torch.optim.AdamW([table_RD], betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)

    def catch_up(self, rows_N: Tensor) -> None:
        """Nothing is ever owed: every step updates every row."""

    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """The rows as they are. Raises ValueError with `coming_lr`: the coming step changes every row."""
        if coming_lr is not None:
            raise ValueError("dense Adam updates every row, so none can be known before the coming step")
        return self.table_RD.index_select(0, rows_N)

    @torch.no_grad()
    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the whole table; rows outside rows_N, unique int64 [N], have gradient 0."""
        weights_RD = self.table_RD
        self._adam.state[weights_RD] = {
            "step": torch.tensor(float(self.step_count)),
            "exp_avg": self.state["m"],
            "exp_avg_sq": self.state["v"],
        }
        self._adam.param_groups[0]["lr"] = lr
        weights_RD.grad = torch.zeros_like(weights_RD).index_copy_(0, rows_N, grad_ND.float())
        self._adam.step()
        weights_RD.grad = None
        self.step_count += 1

    def changed_since(self, step_count: int) -> Tensor:
        """All rows: every step updates them."""
        return torch.arange(len(self.table_RD), device=self.table_RD.device)

    def watch(self, keep: Callable[[Tensor], None] | None) -> bool:
        """Every step changes every row."""
        return False

    def scalars(self) -> dict[str, Any]:
        """The step count."""
        return {"step_count": self.step_count}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take over what `scalars` gave."""
        self.step_count = int(scalars["step_count"])
