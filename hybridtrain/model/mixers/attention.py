"""Causal attention with grouped key/value heads, rotary positions and document masks.

B batch, T tokens, D model width, H heads, C head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.kernels.document_attention.op import document_attention
from hybridtrain.kernels.norms.op import rope
from hybridtrain.model.common import HeadNorm, SequenceContext
from hybridtrain.settings.tree import Settings


class Attention(nn.Module):
    """`attend` does the attention proper on [B, T, H, C] tensors; a parallel layout may hand in another."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        a, dim = settings.model.attention, settings.model.dim
        self.head_dim = a.head_dim
        self.wq = nn.Linear(dim, a.num_heads * a.head_dim, bias=False)
        self.wk = nn.Linear(dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wv = nn.Linear(dim, a.num_kv_heads * a.head_dim, bias=False)
        self.wo = nn.Linear(a.num_heads * a.head_dim, dim, bias=False)
        self.q_norm = HeadNorm(a.head_dim, settings.model.norm_eps) if a.qk_norm else None
        self.k_norm = HeadNorm(a.head_dim, settings.model.norm_eps) if a.qk_norm else None
        self.attend = attend

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        q_BTHC, k_BTHC, v_BTHC = (
            w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv)
        )
        turn_q, turn_k = self.q_norm or rope, self.k_norm or rope
        q_BTHC, k_BTHC = turn_q(q_BTHC, context.rotation_TR), turn_k(k_BTHC, context.rotation_TR)
        out_BTD: Tensor = self.wo(self.attend(q_BTHC, k_BTHC, v_BTHC, context).flatten(-2))
        return out_BTD


def attend(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, context: SequenceContext) -> Tensor:
    """Softmax attention of whole sequences on this device: [B, T, H, C]."""
    if context.spans is not None:
        return document_attention(q_BTHC, k_BTHC, v_BTHC, context.documents_BT, context.spans)
    out_BHTC = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BTHC.transpose(1, 2),
        v_BTHC.transpose(1, 2),
        attn_mask=context.mask_B1TT,
        is_causal=context.mask_B1TT is None,
        enable_gqa=k_BTHC.size(2) != q_BTHC.size(2),
    )
    return out_BHTC.transpose(1, 2)
