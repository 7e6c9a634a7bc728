"""The definition of the experts from tokens to tokens. N tokens, K choices per token, E experts, D width, F
hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_swiglu(
    x_ND: Tensor,
    experts_NK: Tensor,
    gates_NK: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
) -> Tensor:
    """Each token's sum over its choices of gate * w_down(silu(w_gate x) * w_up x): [N, D]."""
    out_ND = torch.zeros_like(x_ND)
    for e in range(len(w_gate_EDF)):
        y_ND = (F.silu(x_ND @ w_gate_EDF[e]) * (x_ND @ w_up_EDF[e])) @ w_down_EFD[e]
        gate_N = torch.where(experts_NK == e, gates_NK, 0).sum(1).to(x_ND.dtype)
        out_ND = out_ND + y_ND * gate_N[:, None]
    return out_ND
