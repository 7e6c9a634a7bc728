"""Expert parallelism's token exchange: a token travels once to each rank that has one of its experts, and one sum comes back.

Shape legend: N tokens here, K experts per token, R ranks of `ep`, P (token, rank) pairs sent, Q pairs received, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.parallel.collectives import (
    Group,
    all_gather_autograd,
    all_to_all,
    all_to_all_autograd,
    exchange_counts,
    reduce_scatter_autograd,
)

Experts = Callable[..., Tensor]  # (x_QD, local_QK, gates_QK, absent=True) -> each token's gated sum over its experts here

Dispatch = Callable[[Tensor, Tensor, Tensor, Any], Tensor]  # (x_ND, experts_NK, gates_NK, experts) -> y_ND


class AllToAllDispatch:
    """Dispatch over one flat all-to-all; a MoE layer takes it in place of its local default."""

    def __init__(self, group: Group, num_experts: int) -> None:
        self.group = group
        self.experts_per_rank = num_experts // group.size

    def __call__(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Experts) -> Tensor:
        """Gate-weighted sum `[N, D]` of the chosen experts' outputs; `experts` are this rank's own."""
        owner_NK = experts_NK // self.experts_per_rank
        hit_NR = torch.zeros(len(x_ND), self.group.size, dtype=torch.bool, device=x_ND.device).scatter_(1, owner_NK, True)
        rank_P, token_P = hit_NR.T.nonzero(as_tuple=True)  # rank by rank, tokens rising
        asked = hit_NR.sum(0)
        send, receive = asked.tolist(), exchange_counts(asked, self.group).tolist()

        local_PK = experts_NK[token_P] - rank_P[:, None] * self.experts_per_rank  # outside 0..experts_per_rank-1: lives elsewhere
        x_QD = all_to_all_autograd(x_ND.index_select(0, token_P), send, receive, self.group)
        gates_QK = all_to_all_autograd(gates_NK.index_select(0, token_P), send, receive, self.group)
        local_QK = all_to_all(local_PK, send, receive, self.group)

        y_QD = experts(x_QD, local_QK, gates_QK, absent=True)
        y_PD = all_to_all_autograd(y_QD, receive, send, self.group)
        return torch.zeros_like(x_ND).index_add(0, token_P, y_PD)


class SharedWidthDispatch:
    """Around another dispatch, for experts whose hidden width is cut over a group: its ranks gather their tokens, each makes
    a part of every output, and the parts are summed back to the ranks that the tokens came from."""

    def __init__(self, inner: Dispatch, group: Group) -> None:
        self.inner, self.group = inner, group

    def __call__(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Experts) -> Tensor:
        """As the inner dispatch's, for as many tokens on every rank of the group."""
        x, chosen, gates = (all_gather_autograd(part, self.group).flatten(0, 1) for part in (x_ND, experts_NK, gates_NK))
        return reduce_scatter_autograd(self.inner(x, chosen, gates, experts).unflatten(0, (self.group.size, -1)), self.group)
