"""Optimizers of table rows: an update reads and writes the touched rows and nothing else.

Shapes: R rows of the local table, D row width, N touched rows. t is the global step, counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.kernels.rowwise_adam.op import RowState, Step, fade, rounded, rowwise_adam
from hybridtrain.kernels.rowwise_adam.rounding import rounding_seed
from hybridtrain.optim.decay import DecayLog

_ROWS_AT_ONCE = 1 << 18


class _Rowwise:
    """One float32 second moment `v` per row, and `last`, the step up to which a row's moment and decay are
    applied.

    What a row owes for the steps since `last` is applied when it is next read or updated. Decoupled weight
    decay multiplies a row by 1 - lr_s * weight_decay at every step s, so the log of the product over all
    steps so far is kept, and a row owes the exponential of a difference. The arithmetic is float32 whatever
    the table's dtype; a bfloat16 table is rounded stochastically, so that steps and decays smaller than its
    last place count on average.
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

    def _advance(self, lr: float) -> None:
        log_factor = self._log_factor(lr)
        if self._decay is None and self.weight_decay > 0.0:
            self._decay = self._no_decay_yet()
        if self._decay is not None:
            self._decay.append(log_factor)
        self.step_count += 1

    def _log_factor(self, lr: float) -> float:
        if lr * self.weight_decay >= 1.0:
            raise ValueError(f"lr * weight_decay = {lr} * {self.weight_decay} must be below 1")
        return math.log1p(-lr * self.weight_decay)

    def _no_decay_yet(self) -> DecayLog:
        return DecayLog([0.0] * (self.step_count + 1), self.table_RD.device)

    def _about_to_change(self, rows_N: Tensor) -> None:
        keep = self._keep  # another thread may end it
        if keep is not None:
            keep(rows_N)

    def _rounded(self, weights_ND: Tensor, rows_N: Tensor, step: int) -> Tensor:
        """The rows as the table holds them after that step."""
        return rounded(weights_ND, self.table_RD.dtype, rows_N + self.first_row, self._rounding(step))

    def _rounding(self, step: int) -> int:
        """The seed of the step's rounding; rows of other types than bfloat16 need none."""
        return rounding_seed(self.seed, step) if self.table_RD.dtype == torch.bfloat16 else 0

    def _numbers(self, lr: float) -> Step:
        seed = self._rounding(self.step_count)
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
        """See _Rowwise; and the moments' beta2 with the record of earlier ones."""
        return super().scalars() | {
            "beta2": self.beta2,
            "beta2_since": self._since,
            "weight_before": self._weight,
        }

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """See _Rowwise. Where beta2 was another one, every row's moment is brought up to date by that one."""
        super().load_scalars(scalars)
        self._since, self._weight = (
            int(scalars.get("beta2_since", 0)),
            float(scalars.get("weight_before", 0.0)),
        )
        ours, self.beta2 = self.beta2, float(scalars.get("beta2", self.beta2))
        if ours == self.beta2:
            return
        for low in range(0, len(self.table_RD), _ROWS_AT_ONCE):
            rows_N = torch.arange(
                low, min(low + _ROWS_AT_ONCE, len(self.table_RD)), device=self.table_RD.device
            )
            self._apply(rows_N, self.beta2)
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
