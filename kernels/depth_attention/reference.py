"""The definition of attention over depth: a token's queries look at what earlier layers wrote there (MoDA,
arXiv 2603.15619).

N tokens, H query heads, G key/value heads (H a multiple of G), S depth slots, C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def depth_attention(q_NHC: Tensor, k_NSGC: Tensor, v_NSGC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output [N, H, C], natural log-sum-exp [N, H] of the scaled scores); query head h reads key head h //
    (H / G).
    """
    repeat = q_NHC.size(1) // k_NSGC.size(2)
    k_NSHC, v_NSHC = k_NSGC.repeat_interleave(repeat, 2), v_NSGC.repeat_interleave(repeat, 2)
    scores_NHS = torch.einsum("nhc,nshc->nhs", q_NHC, k_NSHC) * scale
    return torch.einsum("nhs,nshc->nhc", scores_NHS.softmax(-1), v_NSHC), scores_NHS.logsumexp(-1)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two attentions of the same queries over different keys as one softmax over all of them."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp()[..., None].to(out_a.dtype) + out_b * (lse_b - lse).exp()[..., None].to(
        out_b.dtype
    )
    return out, lse
