"""The definition of the memory's short convolution. B batch, T tokens, D width, J taps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    """SiLU(conv(RMSNorm(u))) + u; tap j reads (J-1-j)*dilation tokens back, never across a document start."""
    normed_BTD = u_BTD * (u_BTD.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D
    total_BTD = torch.zeros_like(u_BTD)
    T, taps = u_BTD.size(1), len(kernel_JD)
    for j in range(taps):
        back = min((taps - 1 - j) * dilation, T)
        term_BTD = normed_BTD[:, : T - back] * kernel_JD[j]
        if documents_BT is not None:
            term_BTD = term_BTD * (documents_BT[:, back:] == documents_BT[:, : T - back])[:, :, None]
        total_BTD = total_BTD + F.pad(term_BTD, (0, 0, back, 0))
    return total_BTD * total_BTD.sigmoid() + u_BTD
