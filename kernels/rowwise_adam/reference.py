"""The definition of one step of the row-wise optimizers on the rows a step touched. R rows, D width, N touched rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rowwise_adam(
    table_RD: Tensor, v_R: Tensor, last_R: Tensor, rows_N: Tensor, grad_ND: Tensor, decay: Tensor | None,
    step: int, lr: float, eps: float, beta2: float, gain: float, correction: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """New (table, v, last) after step number `step`; `decay[t]` is the log of the product of the decay factors up to step t.

    v <- beta2^(step - last) v + gain mean(g^2);  w <- w exp(decay[step] - decay[last]) - lr g / (sqrt(v / correction) + eps)
    """
    last_N = last_R[rows_N]
    v_N = v_R[rows_N] * torch.pow(beta2, (step - last_N).double()).to(v_R.dtype) + gain * grad_ND.square().mean(1)
    weights_ND = table_RD[rows_N].to(grad_ND.dtype)
    if decay is not None:
        weights_ND = weights_ND * (decay[step] - decay[last_N]).exp().to(grad_ND.dtype)[:, None]
    weights_ND = weights_ND - (lr / ((v_N / correction).sqrt() + eps))[:, None] * grad_ND
    table_RD, v_R, last_R = table_RD.clone(), v_R.clone(), last_R.clone()
    table_RD[rows_N], v_R[rows_N], last_R[rows_N] = weights_ND.to(table_RD.dtype), v_N, step
    return table_RD, v_R, last_R
