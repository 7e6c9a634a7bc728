"""Optimizers of table rows: an update reads and writes the touched rows and nothing else.

Shapes: R rows of the local table, D row width, N touched rows. t is the global step, counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hybridtrain.errors import SettingsError
from hybridtrain.settings import MemorySettings


class RowOptimizer(Protocol):
    """What the training loop and the checkpoint ask of an optimizer of table rows.

    state: tensors with the local rows as dim 0; they are saved and resharded with the table, and may be loaded in place.
    step_count: updates so far, the same on every rank.
    """

    state: dict[str, Tensor]
    step_count: int

    def catch_up(self, rows_N: Tensor) -> None:
        """Apply the weight decay that the rows int64 [N] owe for steps without gradient; called before they are read."""

    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """What the rows int64 [N] are once `catch_up` was called, as a tensor [N, D] of its own; changes nothing.

        With `coming_lr`: once the coming step, at that rate, which touches none of them, was made and `catch_up` was called.
        """

    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the rows, sorted unique int64 [N], by their gradients; every other row has gradient 0. N may be 0."""

    def changed_since(self, step_count: int) -> Tensor:
        """Ascending int64 [N]: at least every row that was written to since there were `step_count` updates."""

    def watch(self, keep: Callable[[Tensor], None] | None) -> bool:
        """Call `keep` with rows, ascending, before they change, from now on; None ends it. False: a step changes every row."""

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint must hold beside `state`: numbers and lists of numbers, exact in JSON."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take over what `scalars` gave."""


def make_row_optimizer(memory: MemorySettings, table_RD: Tensor) -> RowOptimizer:
    """The optimizer that `memory.optimizer` names for the local rows; it changes `table_RD` in place.

    Raises SettingsError where the settings do not fit the optimizer.
    """
    if memory.optimizer == "rowwise_adam":
        return RowwiseAdam(table_RD, beta2=memory.beta2, eps=memory.eps, weight_decay=memory.weight_decay)
    if memory.optimizer == "rowwise_adagrad":
        return RowwiseAdagrad(table_RD, eps=memory.eps, weight_decay=memory.weight_decay)
    if memory.beta2 >= 1.0:
        raise SettingsError("settings", [f'memory.beta2={memory.beta2} must be below 1 for memory.optimizer="adam"'])
    return DenseAdam(table_RD, beta2=memory.beta2, eps=memory.eps, weight_decay=memory.weight_decay)


class _Rowwise:
    """One float32 second moment `v` per row, and `last`, the step up to which a row's moment and decay are applied.

    What a row owes for the steps since `last` is applied when it is next read or updated. Decoupled weight decay multiplies a
    row by 1 - lr_s * weight_decay at every step s, so the log of the product over all steps so far is kept, and a row owes the
    exponential of a difference. The arithmetic is float32 whatever the table's dtype; a bfloat16 table keeps no decay smaller
    than its rounding.
    """

    def __init__(self, table_RD: Tensor, *, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        rows, device = len(table_RD), table_RD.device
        self.table_RD = table_RD
        self.eps, self.weight_decay = eps, weight_decay
        self.step_count = 0
        self.state = {
            "v": torch.zeros(rows, dtype=torch.float32, device=device),
            "last": torch.zeros(rows, dtype=torch.int32, device=device),
        }
        self._decay: _DecayLog | None = None  # none as long as no step has decayed anything
        self._keep: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def catch_up(self, rows_N: Tensor) -> None:
        """Apply what the rows int64 [N] owe, in place; costs nothing as long as no step had weight decay."""
        if self._decay is None or len(rows_N) == 0:
            return
        last_N = self.state["last"].index_select(0, rows_N)
        v_N = self._carry(self.state["v"].index_select(0, rows_N), self.step_count - last_N)
        weights_ND = self.table_RD.index_select(0, rows_N).float().mul_(self._decay.factor(last_N).unsqueeze(1))
        self._write(rows_N, v_N, weights_ND)

    @torch.no_grad()
    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """See RowOptimizer; the same bits that `catch_up` will write."""
        weights_ND = self.table_RD.index_select(0, rows_N)
        log = self._decay
        if log is None and coming_lr is not None and self.weight_decay > 0.0:
            log = self._no_decay_yet()
        if log is None or len(rows_N) == 0:
            return weights_ND
        coming = 0.0 if coming_lr is None else self._log_factor(coming_lr)
        factor_N = log.factor(self.state["last"].index_select(0, rows_N), coming)
        return weights_ND.float().mul_(factor_N.unsqueeze(1)).to(weights_ND.dtype)

    @torch.no_grad()
    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the rows, sorted unique int64 [N], by grad_ND; allocates tensors of N rows only.

        Raises ValueError where lr * weight_decay reaches 1, which would turn rows to zero or round.
        """
        self._advance(lr)
        if len(rows_N) == 0:
            return
        grad_ND = grad_ND.float()
        last_N = self.state["last"].index_select(0, rows_N)
        square_N = torch.linalg.vector_norm(grad_ND, dim=1).square_().div_(grad_ND.shape[1])
        v_N = self._carry(self.state["v"].index_select(0, rows_N), self.step_count - last_N).add_(square_N, alpha=self._gain())
        scale_N = (v_N / self._correction()).sqrt_().add_(self.eps).reciprocal_().mul_(-lr)
        weights_ND = self.table_RD.index_select(0, rows_N).float()
        if self._decay is not None:
            weights_ND.mul_(self._decay.factor(last_N).unsqueeze(1))
        self._write(rows_N, v_N, weights_ND.addcmul_(grad_ND, scale_N.unsqueeze(1)))

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
        """Take over what `scalars` gave; raises ValueError where the log does not belong to the step count."""
        log = scalars.get("decay_log")
        if log is not None and len(log) != scalars["step_count"] + 1:
            raise ValueError(f"decay_log has {len(log)} entries, must have step_count + 1 = {scalars['step_count'] + 1}")
        self.step_count = int(scalars["step_count"])
        self._decay = None if log is None else _DecayLog(log, self.table_RD.device)

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

    def _no_decay_yet(self) -> _DecayLog:
        return _DecayLog([0.0] * (self.step_count + 1), self.table_RD.device)

    def _write(self, rows_N: Tensor, v_N: Tensor, weights_ND: Tensor) -> None:
        keep = self._keep  # another thread may end it
        if keep is not None:
            keep(rows_N)
        self.table_RD.index_copy_(0, rows_N, weights_ND.to(self.table_RD.dtype))
        self.state["v"].index_copy_(0, rows_N, v_N)
        self.state["last"].index_fill_(0, rows_N, self.step_count)

    def _carry(self, v_N: Tensor, gap_N: Tensor) -> Tensor:
        """What is left of the moments after gap_N steps without gradient; a tensor that may be written to."""
        raise NotImplementedError

    def _gain(self) -> float:
        """Weight of a new squared gradient in the moment."""
        raise NotImplementedError

    def _correction(self) -> float:
        """What the moment is divided by after `step_count` steps to be free of bias."""
        raise NotImplementedError


class RowwiseAdam(_Rowwise):
    """Adam with beta1 = 0 and one second moment per row.

        v <- beta2 v + (1 - beta2) mean(g^2)        w <- w - lr g / (sqrt(v / (1 - beta2^t)) + eps)

    Equal to that rule applied to every row at every step, at the cost of the touched rows. beta2 = 1 is its limit, the mean
    over all steps; beta2 = 0 normalises each row's gradient by its own root mean square.
    """

    def __init__(self, table_RD: Tensor, *, beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(table_RD, eps=eps, weight_decay=weight_decay)
        self.beta2 = beta2

    def _carry(self, v_N: Tensor, gap_N: Tensor) -> Tensor:
        return v_N.mul_(torch.pow(self.beta2, gap_N.double()).float())

    def _gain(self) -> float:
        return 1.0 - self.beta2 if self.beta2 < 1.0 else 1.0

    def _correction(self) -> float:
        return 1.0 - self.beta2**self.step_count if self.beta2 < 1.0 else float(self.step_count)


class RowwiseAdagrad(_Rowwise):
    """Adagrad with one sum per row: v <- v + mean(g^2); w <- w - lr g / (sqrt(v) + eps)."""

    def _carry(self, v_N: Tensor, gap_N: Tensor) -> Tensor:
        return v_N

    def _gain(self) -> float:
        return 1.0

    def _correction(self) -> float:
        return 1.0


class DenseAdam:
    """torch's Adam over the whole local table, the reference: two float32 moments of [R, D].

    By its nature it allocates a gradient of the table's size at every step, and updates rows that no token read. A table that is
    not float32 is updated through a float32 copy. Weight decay is decoupled and never owed.
    """

    def __init__(
        self, table_RD: Tensor, *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        self.table_RD = table_RD
        self.step_count = 0
        self.state = {name: torch.zeros_like(table_RD, dtype=torch.float32) for name in ("m", "v")}
        self._copied = table_RD.dtype != torch.float32
        self._weights_RD = table_RD.detach().float()  # the table itself where it is float32
        self._adam = torch.optim.AdamW([self._weights_RD], betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)

    def catch_up(self, rows_N: Tensor) -> None:
        """Nothing is ever owed: every step updates every row."""

    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """The rows as they are. Raises ValueError with `coming_lr`: no row is left alone by the coming step."""
        if coming_lr is not None:
            raise ValueError("dense Adam updates every row, so none can be known before the coming step")
        return self.table_RD.index_select(0, rows_N)

    @torch.no_grad()
    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the whole table; rows outside rows_N, unique int64 [N], have gradient 0."""
        weights_RD = self._weights_RD
        if self._copied:
            weights_RD.copy_(self.table_RD)
        self._adam.state[weights_RD] = {
            "step": torch.tensor(float(self.step_count)),
            "exp_avg": self.state["m"],
            "exp_avg_sq": self.state["v"],
        }
        self._adam.param_groups[0]["lr"] = lr
        weights_RD.grad = torch.zeros_like(weights_RD).index_copy_(0, rows_N, grad_ND.float())
        self._adam.step()
        weights_RD.grad = None
        if self._copied:
            self.table_RD.copy_(weights_RD)
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


class _DecayLog:
    """entry t = log of the product of the decay factors of steps 1 … t, in float64; entry 0 is 0."""

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

    def factor(self, last_N: Tensor, coming: float = 0.0) -> Tensor:
        """float32 [N]: product of the factors of all steps after `last_N`, and of one to come whose log is `coming`."""
        return (self._total + coming - self._entries.index_select(0, last_N)).exp_().float()

    def to_list(self) -> list[float]:
        return self._entries[: self._length].tolist()
