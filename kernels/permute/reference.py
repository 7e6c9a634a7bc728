"""The definition of the permutation, in plain torch that autograd differentiates.

N tokens, K experts per token, P = N*K pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs in stable order of their expert: (order_P, inverse_NK, counts_E), all int64.

    `order_P[i]` is the flat pair n*K+k that stands i-th; `inverse_NK` says where each pair stands.
    """
    flat_P = experts_NK.reshape(-1)
    order_P = torch.sort(flat_P, stable=True).indices
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    return order_P, inverse_P.view(experts_NK.shape), torch.bincount(flat_P, minlength=num_experts)


def permute(x_ND: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
    """Row i of the result is the token of the i-th pair: [P, D]."""
    return x_ND[order_P // inverse_NK.size(1)]


def combine(y_PD: Tensor, gates_NK: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
    """Each token's sum over its pairs, weighted by the gates, k rising: [N, D]."""
    return (y_PD[inverse_NK] * gates_NK[:, :, None]).sum(1)
