"""What a row-wise optimizer keeps of its rows, how a reader sees them, and what of it a checkpoint holds.

Shapes: R rows of the local table, D row width, N of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.kernels.rowwise_adam.op import rounded
from hybridtrain.kernels.rowwise_adam.rounding import rounding_seed
from hybridtrain.optim.decay import DecayLog


class RowMoments:
    """One float32 second moment `v` per row, and `last`, the step up to which a row's moment and decay are
    applied.

    What a row owes for the steps since `last` is applied when it is next read or updated. Decoupled weight
    decay multiplies a row by 1 - lr_s * weight_decay at every step s, so the log of the product over all
    steps so far is kept, and a row owes the exponential of a difference.
    """

    def __init__(
        self,
        table_RD: Tensor,
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        first_row: int = 0,
        backends: Backends = TORCH,
    ) -> None:
        """`seed` and the number of the table's first row in the whole table decide how bfloat16 rows are
        rounded.
        """
        rows, device = len(table_RD), table_RD.device
        self.table_RD = table_RD
        self.eps, self.weight_decay = eps, weight_decay
        self.seed, self.first_row, self.backends = seed, first_row, backends
        self.step_count = 0
        self.state = {
            "v": torch.zeros(rows, dtype=torch.float32, device=device),
            "last": torch.zeros(rows, dtype=torch.int32, device=device),
        }
        self._decay: DecayLog | None = None  # none as long as no step has decayed anything
        self._keep: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """See RowOptimizer; the same bits that `catch_up` will write."""
        weights_ND = row_gather(self.table_RD, rows_N, self.backends)
        log = self._decay
        if log is None and coming_lr is not None and self.weight_decay > 0.0:
            log = self._no_decay_yet()
        if log is None or len(rows_N) == 0:
            return weights_ND
        step, coming = self.step_count, 0.0
        if coming_lr is not None:
            step, coming = step + 1, self._log_factor(coming_lr)
        factor_N = log.factor(self.state["last"].index_select(0, rows_N), coming)
        return self._rounded(weights_ND.float().mul_(factor_N.unsqueeze(1)), rows_N, step)

    def changed_since(self, step_count: int) -> Tensor:
        """See RowOptimizer; whatever writes to a row notes the step count, which may not have moved since."""
        return (self.state["last"] >= step_count).nonzero().flatten()

    def watch(self, keep: Callable[[Tensor], None] | None) -> bool:
        self._keep = keep
        return True

    def scalars(self) -> dict[str, Any]:
        """The step count and, where rows may owe weight decay, its log by step (8 bytes a step)."""
        out: dict[str, Any] = {"step_count": self.step_count}
        if self._decay is not None:
            out["decay_log"] = self._decay.to_list()
        return out

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take over what `scalars` gave, behind the state; raises ValueError where the log or state is not of
        the step count.
        """
        log = scalars.get("decay_log")
        if log is not None and len(log) != scalars["step_count"] + 1:
            raise ValueError(
                f"decay_log has {len(log)} entries, must have step_count + 1 = {scalars['step_count'] + 1}"
            )
        last_R = self.state["last"]
        if len(last_R) and not 0 <= int(last_R.min()) <= int(last_R.max()) <= scalars["step_count"]:
            raise ValueError(
                f"rows of steps {int(last_R.min())} to {int(last_R.max())}, of {scalars['step_count']} steps"
            )
        self.step_count = int(scalars["step_count"])
        self._decay = None if log is None else DecayLog(log, self.table_RD.device)

    def _log_factor(self, lr: float) -> float:
        if lr * self.weight_decay >= 1.0:
            raise ValueError(f"lr * weight_decay = {lr} * {self.weight_decay} must be below 1")
        return math.log1p(-lr * self.weight_decay)

    def _no_decay_yet(self) -> DecayLog:
        return DecayLog([0.0] * (self.step_count + 1), self.table_RD.device)

    def _rounded(self, weights_ND: Tensor, rows_N: Tensor, step: int) -> Tensor:
        """The rows as the table holds them after that step."""
        return rounded(
            weights_ND, self.table_RD.dtype, rows_N + self.first_row, rounding_seed(self.seed, step)
        )
