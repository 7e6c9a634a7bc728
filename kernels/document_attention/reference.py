"""The definition of attention inside documents, by a mask of all pairs. B sequences, T queries, S keys, H
heads, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(documents_BS: Tensor | None, first: int, tokens: int, keys: int) -> Tensor:
    """[B or 1, 1, T, S], True where the query `first + t` may read the key s: in its document, and not after
    it.
    """
    device = documents_BS.device if documents_BS is not None else None
    place_T = torch.arange(first, first + tokens, device=device)
    mask = (place_T[:, None] >= torch.arange(keys, device=device))[None]
    if documents_BS is not None:
        mask = mask & (documents_BS[:, first : first + tokens, None] == documents_BS[:, None, :keys])
    return mask[:, None]


def document_attention(
    q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, documents_BS: Tensor | None, first: int = 0
) -> Tensor:
    """[B, T, H, C]: softmax attention of the tokens `first` to `first + T - 1` of each sequence; k and v may
    have fewer heads.
    """
    mask = document_mask(documents_BS, first, q_BTHC.size(1), k_BSHC.size(1)).to(q_BTHC.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BSHC, v_BSHC))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=k.size(1) != q.size(1)
    ).transpose(1, 2)
