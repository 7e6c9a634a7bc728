"""The definition of the permutation, in plain torch that autograd differentiates.

N tokens, K experts per token, P = N*K pairs, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_destination(
    experts_NK: Tensor, num_experts: int, num_ranks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token once for every rank that has one of its experts, rank by rank, tokens rising: (order_Q,
    inverse_NK, asked_R2).

    Rank r has experts r*num_experts/num_ranks and following; choices outside 0..num_experts-1 go nowhere. A
    token's first choice on a rank stands for all of them: `order_Q[i]` is that pair n*K+k, -1 behind the last
    one; `inverse_NK` says where a pair stands, -1 where another stands for it or it goes nowhere. Q =
    N*min(K, R). `asked_R2`: tokens and pairs of each rank.
    """
    (N, K), Q = experts_NK.shape, len(experts_NK) * min(experts_NK.size(1), num_ranks)
    present_NK = (experts_NK >= 0) & (experts_NK < num_experts)
    owner_NK = torch.where(present_NK, experts_NK // (num_experts // num_ranks), num_ranks)
    again_NK = (owner_NK[:, :, None] == owner_NK[:, None, :]).tril(-1).any(-1)
    key_P = owner_NK.masked_fill(again_NK, num_ranks).flatten()
    place_P = torch.arange(N * K, device=experts_NK.device)
    sorted_P, order_P = torch.sort(key_P.to(torch.int32), stable=True)
    ends_R = torch.searchsorted(
        sorted_P, torch.arange(num_ranks + 1, dtype=torch.int32, device=experts_NK.device)
    )
    real_P = place_P < ends_R[-1]
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = place_P.where(real_P, -1)
    pairs_R = experts_NK.new_zeros(num_ranks + 1).scatter_add_(
        0, owner_NK.flatten(), torch.ones_like(place_P)
    )[:num_ranks]
    return order_P.where(real_P, -1)[:Q], inverse_P.view(N, K), torch.stack([ends_R.diff(), pairs_R], 1)


def permute(x_ND: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
    """Row i of the result is the token of the i-th pair: [P, D]."""
    return x_ND[order_P // inverse_NK.size(1)]


def combine(y_PD: Tensor, gates_NK: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
    """Each token's sum over its pairs, weighted by the gates, k rising: [N, D]."""
    return (y_PD[inverse_NK] * gates_NK[:, :, None]).sum(1)
