"""One step of the row-wise optimizers on the touched rows: Triton in one pass, or torch in several that touch
no other row.

R rows of a table, D width, N touched rows. See reference.py for the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.rowwise_adam.reference import Step, round_stochastically, rounding_seed

__all__ = ["Step", "fade", "owed", "rounded", "rounding_seed", "rowwise_adam"]


def rowwise_adam(
    table_RD: Tensor,
    v_R: Tensor,
    last_R: Tensor,
    rows_N: Tensor,
    grad_ND: Tensor,
    decay: Tensor | None,
    step: Step,
) -> None:
    """Update the rows, unique int64 [N], in place; allocates tensors of N rows only.

    v_R float32, last_R int32, grad_ND float32, decay float64 [number of the step + 1 or more]. bfloat16
    tables are rounded stochastically.
    """
    if chosen("rowwise_adam", table_RD) == "triton":
        from hybridtrain.kernels.rowwise_adam.kernel import rowwise_adam as fused

        fused(table_RD, v_R, last_R, rows_N, grad_ND, decay, step)
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
    """What is left, in place, of moments after gap_N steps without gradient: maybe as many as the run has, so
    float64 inside.
    """
    return v_N if beta2 == 1.0 else v_N.mul_(torch.pow(beta2, gap_N.double()).float())


def owed(decay: Tensor, last_N: Tensor, total: Tensor | float) -> Tensor:
    """float32 [N]: product of the decay factors after `last_N`, up to where the log of their product is
    `total`.
    """
    return (total - decay.index_select(0, last_N)).exp_().float()


def rounded(weights_ND: Tensor, dtype: torch.dtype, numbers_N: Tensor, seed: int) -> Tensor:
    """The weights as a table of this dtype holds them."""
    return (
        round_stochastically(weights_ND, numbers_N, seed) if dtype == torch.bfloat16 else weights_ND.to(dtype)
    )
