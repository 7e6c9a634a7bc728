"""The definition of one step of the row-wise optimizers on the rows a step touched. R rows, D width, N
touched rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.kernels.rowwise_adam.op import RowState, Step


def rowwise_adam(
    state: RowState, rows_N: Tensor, grad_ND: Tensor, decay: Tensor | None, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """New (table, v, last), the table unrounded; `decay[t]` is the log of the product of the decay factors up
    to step t.

    v <- beta2^(number - last) v + gain mean(g^2);  w <- w exp(decay[number] - decay[last]) - lr g / (sqrt(v /
    correction) + eps)
    """
    table_RD, v_R, last_R = state
    last_N = last_R[rows_N]
    kept_N = torch.pow(step.beta2, (step.number - last_N).double()).to(v_R.dtype)
    v_N = v_R[rows_N] * kept_N + step.gain * grad_ND.square().mean(1)
    weights_ND = table_RD[rows_N].to(grad_ND.dtype)
    if decay is not None:
        weights_ND = weights_ND * (decay[step.number] - decay[last_N]).exp().to(grad_ND.dtype)[:, None]
    weights_ND = weights_ND - (step.lr / ((v_N / step.correction).sqrt() + step.eps))[:, None] * grad_ND
    return (
        table_RD.to(grad_ND.dtype).index_copy(0, rows_N, weights_ND),
        v_R.index_copy(0, rows_N, v_N),
        last_R.index_fill(0, rows_N, step.number),
    )
