"""The definition of the memory's short convolution. B batch, T tokens, D width, J taps."""

from __future__ import annotations

import torch
from torch import Tensor


def short_conv(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    """SiLU(conv(RMSNorm(u))) + u; tap j reads (J-1-j)*dilation tokens back, never across a document start."""
    normed_BTD = u_BTD * (u_BTD.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D
    total_BTD = torch.zeros_like(u_BTD)
    T, taps = u_BTD.size(1), len(kernel_JD)
    for t in range(T):
        for j in range(taps):
            back = t - (taps - 1 - j) * dilation
            if back >= 0:
                seen_B1 = torch.ones(len(u_BTD), 1) if documents_BT is None else documents_BT[:, [t]] == documents_BT[:, [back]]
                total_BTD[:, t] = total_BTD[:, t] + normed_BTD[:, back] * kernel_JD[j] * seen_B1.to(u_BTD.dtype)
    return total_BTD * total_BTD.sigmoid() + u_BTD
