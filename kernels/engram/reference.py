"""The definitions of the Engram layer's gate (arXiv 2601.07372) and of its short convolution.

N tokens, M branches of the hidden state, D width; B batch, T tokens, J taps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def engram_gate(
    h_NMD: Tensor,
    k_NMD: Tensor,
    v_ND: Tensor,
    h_weight_MD: Tensor,
    k_weight_MD: Tensor,
    *eps_and_floor: float,
) -> tuple[Tensor, Tensor]:
    """(gated values [N, M, D], gates [N, M]).

    g = sigmoid(sign(s) sqrt(max(|s|, floor))) with s = <h, k> / sqrt(D), both RMS-normed.
    """

    eps, floor = eps_and_floor

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    s_NM = (norm(h_NMD, h_weight_MD) * norm(k_NMD, k_weight_MD)).sum(-1) / math.sqrt(h_NMD.size(-1))
    g_NM = torch.sigmoid(s_NM.sign() * s_NM.abs().clamp_min(floor).sqrt())
    return g_NM[:, :, None] * v_ND[:, None], g_NM.detach()


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
