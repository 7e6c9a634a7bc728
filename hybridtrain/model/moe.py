"""Mixture of experts: router, dispatch and grouped experts.

B batch, T tokens, N = B*T, D model width, E experts, K experts per token, P = N*K pairs, F expert width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from hybridtrain.kernels.moe_swiglu.op import moe_swiglu
from hybridtrain.model.feedforward import SwiGLU
from hybridtrain.model.router import Router
from hybridtrain.settings import Settings


class GroupedExperts(nn.Module):
    """One SwiGLU per expert."""

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_up = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w_down = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def forward(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, absent: bool = False) -> Tensor:
        """Each token's gated sum over its experts: [N, D]. With `absent`, experts outside 0..E-1 are none of these and count nothing."""
        w_gate, w_up, w_down = (_local(w) for w in (self.w_gate, self.w_up, self.w_down))
        return moe_swiglu(x_ND, experts_NK, gates_NK, w_gate, w_up, w_down, absent)


def _local(weight: Tensor) -> Tensor:
    """This rank's experts where the weight is a DTensor; the weight itself where it is not."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class Dispatch(Protocol):
    """Brings tokens to their experts and back: the gated sum over each token's experts, [N, D]."""

    def __call__(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: GroupedExperts) -> Tensor: ...


class LocalDispatch:
    """All experts are on this device."""

    def __call__(self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: GroupedExperts) -> Tensor:
        out_ND: Tensor = experts(x_ND, experts_NK, gates_NK)
        return out_ND


class MoE(nn.Module):
    """Routed experts and, where asked for, shared experts that see every token."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        dim, moe = settings.model.dim, settings.model.moe
        self.router = Router(dim, moe, tokens_per_step=settings.train.global_batch * settings.train.seq_len)
        self.experts = GroupedExperts(moe.num_experts, dim, moe.hidden)
        self.shared = SwiGLU(dim, moe.num_shared * moe.hidden) if moe.num_shared else None
        self.dispatch: Dispatch = LocalDispatch()

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        experts_NK, gates_NK = self.router(x_ND)
        y_BTD = self.dispatch(x_ND, experts_NK, gates_NK, self.experts).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)
