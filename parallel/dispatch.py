"""Expert parallelism's token exchange: a token travels once to each rank that has one of its experts, and one sum comes back.

Shape legend: N tokens here, K experts per token, R ranks of `ep`, P (token, rank) pairs sent, Q pairs received, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridtrain.parallel.collectives import Group, all_to_all, all_to_all_autograd, exchange_counts

Experts = Callable[[Tensor, Tensor], Tensor]  # (x_PD sorted by expert, counts_E) -> y_PD
LocalDispatch = Callable[[Tensor, Tensor, Tensor, Experts, int], Tensor]


class AllToAllDispatch:
    """Dispatch over one flat all-to-all. Hand it to a MoE layer in place of its local default.

    `local` runs the experts that live here on received tokens; slots whose expert lives elsewhere carry the id -1.
    """

    def __init__(self, group: Group, num_experts: int, local: LocalDispatch) -> None:
        self.group, self.local = group, local
        self.experts_per_rank = num_experts // group.size

    def __call__(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Experts, num_experts: int) -> Tensor:
        """Gate-weighted sum `[N, D]` of the chosen experts' outputs; `experts` are this rank's own."""
        owner_NK = experts_NK // self.experts_per_rank
        hit_NR = torch.zeros(len(x_ND), self.group.size, dtype=torch.bool, device=x_ND.device).scatter_(1, owner_NK, True)
        rank_P, token_P = hit_NR.T.nonzero(as_tuple=True)  # rank by rank, tokens rising
        asked = hit_NR.sum(0)
        send, receive = asked.tolist(), exchange_counts(asked, self.group).tolist()

        elsewhere_PK = owner_NK[token_P] != rank_P[:, None]
        local_PK = (experts_NK[token_P] - rank_P[:, None] * self.experts_per_rank).masked_fill_(elsewhere_PK, -1)
        x_QD = all_to_all_autograd(x_ND.index_select(0, token_P), send, receive, self.group)
        gates_QK = all_to_all_autograd(gates_NK.index_select(0, token_P), send, receive, self.group)
        local_QK = all_to_all(local_PK.to(torch.int32), send, receive, self.group).long()

        y_QD = self.local(x_QD, local_QK, gates_QK, experts, self.experts_per_rank)
        y_PD = all_to_all_autograd(y_QD, receive, send, self.group)
        return torch.zeros_like(x_ND).index_add(0, token_P, y_PD)
