"""What an optimizer of table rows must do, and which one the settings name.

Shapes: R rows of the local table, D row width, N touched rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hybridtrain.errors import SettingsError
from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.optim.dense_adam import DenseAdam
from hybridtrain.optim.rowwise import RowwiseAdagrad, RowwiseAdam
from hybridtrain.settings.engram import EngramSettings


class RowOptimizer(Protocol):
    """What the training loop and the checkpoint ask of an optimizer of table rows.

    state: tensors with the local rows as dim 0; they are saved and resharded with the table, and may be
    loaded in place. step_count: updates so far, the same on every rank.
    """

    state: dict[str, Tensor]
    step_count: int

    def catch_up(self, rows_N: Tensor) -> None:
        """Apply the weight decay that the rows int64 [N] owe for steps without gradient; called before they
        are read.
        """

    def values(self, rows_N: Tensor, coming_lr: float | None = None) -> Tensor:
        """What the rows int64 [N] are once `catch_up` was called, as a tensor [N, D] of its own; changes
        nothing.

        With `coming_lr`: once the coming step, at that rate, which touches none of them, was made and
        `catch_up` was called.
        """

    def step(self, rows_N: Tensor, grad_ND: Tensor, lr: float) -> None:
        """Update the rows, sorted unique int64 [N], by their gradients; every other row has gradient 0. N may
        be 0.
        """

    def changed_since(self, step_count: int) -> Tensor:
        """Ascending int64 [N]: at least the rows written to since there were `step_count` updates."""

    def watch(self, keep: Callable[[Tensor], None] | None) -> bool:
        """Call `keep` with rows, ascending, before they change, from now on; None ends it. False: a step
        changes every row.
        """

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint must hold beside `state`: numbers and lists of numbers, exact in JSON."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take over what `scalars` gave."""


def make_row_optimizer(
    engram: EngramSettings,
    table_RD: Tensor,
    seed: int = 0,
    first_row: int = 0,
    backends: Backends = TORCH,
) -> RowOptimizer:
    """The optimizer that `engram.optimizer` names for the local rows; it changes `table_RD` in place.

    The run's seed and the number of the table's first row in the whole table decide how bfloat16 rows are
    rounded.

    Raises SettingsError where the settings do not fit the optimizer.
    """
    rule: dict[str, Any] = {"eps": engram.eps, "weight_decay": engram.weight_decay}
    rowwise = rule | {"seed": seed, "first_row": first_row, "backends": backends}
    if engram.optimizer == "rowwise_adam":
        return RowwiseAdam(table_RD, beta2=engram.beta2, **rowwise)
    if engram.optimizer == "rowwise_adagrad":
        return RowwiseAdagrad(table_RD, **rowwise)
    if engram.beta2 >= 1.0:
        raise SettingsError(
            "settings", [f'engram.beta2={engram.beta2} must be below 1 for engram.optimizer="adam"']
        )
    return DenseAdam(table_RD, beta2=engram.beta2, **rule)
