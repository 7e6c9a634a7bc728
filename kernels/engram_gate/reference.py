"""The definition of the memory's gate (Engram, arXiv 2601.07372). N tokens, M branches of the hidden state, D
width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def engram_gate(
    h_NMD: Tensor,
    k_NMD: Tensor,
    v_ND: Tensor,
    h_weight_MD: Tensor,
    k_weight_MD: Tensor,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """(gated values [N, M, D], gates [N, M]).

    g = sigmoid(sign(s) sqrt(max(|s|, floor))) with s = <h, k> / sqrt(D), both RMS-normed.
    """

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    s_NM = (norm(h_NMD, h_weight_MD) * norm(k_NMD, k_weight_MD)).sum(-1) / math.sqrt(h_NMD.size(-1))
    g_NM = torch.sigmoid(s_NM.sign() * s_NM.abs().clamp_min(floor).sqrt())
    return g_NM[:, :, None] * v_ND[:, None], g_NM.detach()
