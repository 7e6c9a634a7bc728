"""One step of the row-wise optimizers on the touched rows: Triton in one pass, or torch in several that touch
no other row.

R rows of a table, D width, N touched rows. See reference.py for the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.rowwise_adam.rounding import round_stochastically

ROWWISE_ADAM = Op("rowwise_adam", "torch, several passes", sources=("rowwise_adam.kernel",))


class RowState(NamedTuple):
    """A table with its rows' second moments, float32, and the steps they were updated at last, int32."""

    table_RD: Tensor
    v_R: Tensor
    last_R: Tensor


class Step(NamedTuple):
    """The numbers of one update; Adam has gain 1 - beta2 and correction 1 - beta2^number, Adagrad beta2, gain
    and correction 1.
    """

    number: int  # counted from 1
    lr: float
    eps: float
    beta2: float
    gain: float
    correction: float
    seed: int = 0  # of rounding.py; with a row's number in the whole table it decides how it is rounded
    first_row: int = 0  # this table's first row in the whole one


def rowwise_adam(
    state: RowState,
    rows_N: Tensor,
    grad_ND: Tensor,
    decay: Tensor | None,
    step: Step,
    backends: Backends = TORCH,
) -> None:
    """Update the rows, unique int64 [N], in place; allocates tensors of N rows only.

    grad_ND float32, decay float64 [number of the step + 1 or more]: entry t is the log of the product of the
    decay factors of steps 1 to t. bfloat16 tables are rounded stochastically.
    """
    table_RD, v_R, last_R = state
    if backends.of(ROWWISE_ADAM, table_RD) == "triton":
        from hybridtrain.kernels.rowwise_adam.kernel import rowwise_adam as fused

        fused(state, rows_N, grad_ND, decay, step)
        return
    last_N = last_R.index_select(0, rows_N)
    square_N = torch.linalg.vector_norm(grad_ND, dim=1).square_().div_(grad_ND.shape[1])
    v_N = fade(v_R.index_select(0, rows_N), step.number - last_N, step.beta2).add_(square_N, alpha=step.gain)
    scale_N = (v_N / step.correction).sqrt_().add_(step.eps).reciprocal_().mul_(-step.lr)
    weights_ND = table_RD.index_select(0, rows_N).float()
    if decay is not None:
        weights_ND.mul_(owed(decay, last_N, decay[step.number]).unsqueeze(1))
    weights_ND.addcmul_(grad_ND, scale_N.unsqueeze(1))
    table_RD.index_copy_(0, rows_N, rounded(weights_ND, table_RD.dtype, rows_N + step.first_row, step.seed))
    v_R.index_copy_(0, rows_N, v_N)
    last_R.index_fill_(0, rows_N, step.number)


def fade(v_N: Tensor, gap_N: Tensor, beta2: float) -> Tensor:
    """Decay moments in place over gap_N steps without gradient: maybe as many as the run has, so float64
    inside.
    """
    return v_N if beta2 == 1.0 else v_N.mul_(torch.pow(beta2, gap_N.double()).float())


def owed(decay: Tensor, last_N: Tensor, total: Tensor | float) -> Tensor:
    """float32 [N]: product of the decay factors after `last_N`, up to where the log of their product is
    `total`.
    """
    return (total - decay.index_select(0, last_N)).exp_().float()


def rounded(weights_ND: Tensor, dtype: torch.dtype, numbers_N: Tensor, seed: int) -> Tensor:
    """The weights as a table of this dtype holds them."""
    if dtype == torch.bfloat16:
        return round_stochastically(weights_ND, numbers_N, seed)
    return weights_ND.to(dtype)
