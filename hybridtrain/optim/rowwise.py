"""Optimizers of table rows: an update reads and writes the touched rows and nothing else.

Shapes: R rows of the local table, D row width, N touched rows. t is the global step, counted from 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.rowwise_adam.op import RowState, Step, fade, rowwise_adam
from hybridtrain.kernels.rowwise_adam.rounding import rounding_seed
from hybridtrain.optim.row_moments import RowMoments

_ROWS_AT_ONCE = 1 << 18


class _Rowwise(RowMoments):
    """The update of the touched rows. The arithmetic is float32 whatever the table's dtype; a bfloat16 table
    is rounded stochastically, so that steps and decays smaller than its last place count on average.
    """

    @torch.no_grad()
    def catch_up(self, rows_N: Tensor) -> None:
        """Apply what the rows int64 [N] owe, in place; costs nothing as long as no step had weight decay."""
        if self._decay is not None and len(rows_N):
            self._apply(rows_N, self._beta2())

    def _apply(self, rows_N: Tensor, beta2: float) -> None:
        """What the rows owe, their moments by this factor a step."""
        v_R, last_R = self.state["v"], self.state["last"]
        v_N = fade(v_R.index_select(0, rows_N), self.step_count - last_R.index_select(0, rows_N), beta2)
        values_ND = self.values(rows_N) if self._decay is not None else None
        self._about_to_change(rows_N)
        if values_ND is not None:
            self.table_RD.index_copy_(0, rows_N, values_ND)
        v_R.index_copy_(0, rows_N, v_N)
        last_R.index_fill_(0, rows_N, self.step_count)

    @torch.no_grad()
    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the rows, sorted unique int64 [N], by grad_ND; allocates tensors of N rows only.

        Raises ValueError where lr * weight_decay reaches 1, which would turn rows to zero or round.
        """
        self._advance(lr)
        if len(rows_N) == 0:
            return
        self._about_to_change(rows_N)
        state = RowState(self.table_RD, self.state["v"], self.state["last"])
        decay = self._decay.entries if self._decay is not None else None
        rowwise_adam(state, rows_N, grad_ND.float(), decay, self._numbers(lr), self.backends)

    def _advance(self, lr: float) -> None:
        if self._decay is None and self.weight_decay > 0.0:
            self._decay = self._no_decay_yet()
        if self._decay is not None:
            self._decay.append(self._log_factor(lr))
        self.step_count += 1

    def _about_to_change(self, rows_N: Tensor) -> None:
        keep = self._keep  # another thread may end it
        if keep is not None:
            keep(rows_N)

    def _numbers(self, lr: float) -> Step:
        stochastic = self.table_RD.dtype == torch.bfloat16
        seed = rounding_seed(self.seed, self.step_count) if stochastic else 0
        rule = (self._beta2(), self._gain(), self._correction())
        return Step(self.step_count, lr, self.eps, *rule, seed, self.first_row)

    def _beta2(self) -> float:
        """The factor of a moment over a step without gradient."""
        raise NotImplementedError

    def _gain(self) -> float:
        """Weight of a new squared gradient in the moment."""
        raise NotImplementedError

    def _correction(self) -> float:
        """The divisor that makes the moment unbiased after `step_count` steps."""
        raise NotImplementedError


class RowwiseAdam(_Rowwise):
    """Adam with beta1 = 0 and one second moment per row.

        v <- beta2 v + (1 - beta2) mean(g^2)        w <- w - lr g / (sqrt(v / (1 - beta2^t)) + eps)

    Equal to that rule applied to every row at every step, at the cost of the touched rows. beta2 = 1 is its
    limit, the mean over all steps; beta2 = 0 normalises each row's gradient by its own root mean square.

    beta2 may change where a run is resumed: each step counts with the beta2 that it had. The bias correction
    is the sum of the weights that squared gradients have in v, which for one beta2 is 1 - beta2^t; it was
    `_weight` after step `_since`, when beta2 changed last.
    """

    def __init__(self, table_RD: Tensor, *, beta2: float = 0.95, **others: Any) -> None:
        super().__init__(table_RD, **others)
        self.beta2 = beta2
        self._since, self._weight = 0, 0.0

    def scalars(self) -> dict[str, Any]:
        """See RowMoments; and the moments' beta2 with the record of earlier ones."""
        record = {"beta2_since": self._since, "weight_before": self._weight}
        return super().scalars() | {"beta2": self.beta2} | record

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """See RowMoments. Where beta2 was another one, it brings every row's moment up to date."""
        super().load_scalars(scalars)
        self._since = int(scalars.get("beta2_since", 0))
        self._weight = float(scalars.get("weight_before", 0.0))
        ours, self.beta2 = self.beta2, float(scalars.get("beta2", self.beta2))
        if ours == self.beta2:
            return
        rows, device = len(self.table_RD), self.table_RD.device
        for low in range(0, rows, _ROWS_AT_ONCE):
            self._apply(torch.arange(low, min(low + _ROWS_AT_ONCE, rows), device=device), self.beta2)
        self._weight, self._since, self.beta2 = self._correction(), self.step_count, ours

    def _beta2(self) -> float:
        return self.beta2

    def _gain(self) -> float:
        return 1.0 - self.beta2 if self.beta2 < 1.0 else 1.0

    def _correction(self) -> float:
        steps = self.step_count - self._since
        if self.beta2 == 1.0:
            return self._weight + steps
        kept = self.beta2**steps
        return self._weight * kept + (1.0 - kept)


class RowwiseAdagrad(_Rowwise):
    """Adagrad with one sum per row: v <- v + mean(g^2); w <- w - lr g / (sqrt(v) + eps)."""

    def _beta2(self) -> float:
        return 1.0

    def _gain(self) -> float:
        return 1.0

    def _correction(self) -> float:
        return 1.0
