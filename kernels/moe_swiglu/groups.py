"""The experts from tokens to tokens by grouped products: the way of all devices but the CPU.

N tokens, K choices per token, P = N*K pairs sorted by expert, E experts, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.grouped_mlp.op import grouped_swiglu
from hybridtrain.kernels.moe_swiglu.op import Choice, ExpertWeights, Pairs
from hybridtrain.kernels.permute.op import combine, permute


def by_groups(
    x_ND: Tensor, choice: Choice, pairs: Pairs, weights: ExpertWeights, backends: Backends
) -> Tensor:
    """`moe_swiglu` of pairs sorted by expert, absent ones behind all others: [N, D]."""
    order_P, inverse_NK, counts_E = pairs
    x_PD = permute(x_ND, order_P, inverse_NK, backends)
    if choice.absent and choice.present is None:
        x_PD, counts_E = _absent_as_zeros(x_PD, counts_E)
    num_pairs = len(x_PD)
    there = num_pairs if choice.present is None else choice.present
    if there < num_pairs:  # else no slice: its gradient would be a fill and a copy
        x_PD = x_PD[:there]
    y_PD = grouped_swiglu(x_PD, counts_E, *weights, backends)
    if there < num_pairs:
        y_PD = F.pad(y_PD, (0, 0, 0, num_pairs - there))
    return combine(y_PD, choice.gates_NK, order_P, inverse_NK, backends)


def _absent_as_zeros(x_PD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """The rows behind those of all experts, set to zero and handed to the last one: zero is all that comes
    out, and all that their gradients add to any weight."""
    total = counts_E.sum()
    absent_P = torch.arange(len(x_PD), device=x_PD.device) >= total
    last = counts_E[-1:] + (len(x_PD) - total)
    return x_PD.masked_fill(absent_P[:, None], 0), torch.cat([counts_E[:-1], last])
