"""The lookup memory's gate and fusion (Engram, arXiv 2601.07372). Rows come from outside; see rows.py.

B batch, T tokens, D model width, S slots (orders * heads), C row width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridtrain.kernels.engram_gate.op import engram_gate
from hybridtrain.kernels.short_conv.op import short_conv
from hybridtrain.model.counters import Counters
from hybridtrain.model.norm import RMSNorm
from hybridtrain.settings import Settings


class EngramMemory(nn.Module):
    """y = SiLU(conv(RMSNorm(u))) + u with u = g * W_V e, where g says how far the hidden state agrees with W_K e.

    g = sigmoid(sign(s) sqrt(max(|s|, floor))) of s = <h, W_K e> / sqrt(D), both RMS-normed. The square root is in every released
    code, with the floor 1e-6; the paper's text has sigmoid(s). Its slope is 1 / (2 sqrt(|s|)), up to 1 / (2 sqrt(floor)): single
    tokens near s = 0 can dominate a step's gradient.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        dim, eps, memory = settings.model.dim, settings.model.norm_eps, settings.memory
        width = len(memory.orders) * memory.heads * memory.head_dim
        self.counters = Counters()
        self.eps, self.gate_floor = eps, memory.gate_floor
        self.dilation = memory.orders[-1]
        self.wk = nn.Linear(width, dim, bias=False)
        self.wv = nn.Linear(width, dim, bias=False)
        self.h_norm = RMSNorm(dim, eps)
        self.k_norm = RMSNorm(dim, eps)
        self.conv_norm = RMSNorm(dim, eps) if memory.conv else None
        self.convolve = short_conv  # a parallel layout may hand in another
        self.conv = nn.Parameter(torch.empty(memory.conv_kernel, dim)) if memory.conv else None

    def forward(self, h_BTD: Tensor, rows_BTSC: Tensor, documents_BT: Tensor | None) -> Tensor:
        """What the memory adds to the hidden state: [B, T, D]. `documents_BT` None: one document per sequence."""
        e_BTX = rows_BTSC.flatten(-2)
        k_BTD, v_BTD = self.wk(e_BTX), self.wv(e_BTX)
        u_BTD, g_BT1 = engram_gate(h_BTD, k_BTD, v_BTD, self.h_norm.weight, self.k_norm.weight, self.eps, self.gate_floor)
        if self.training:
            self.counters.add("gate_sum", g_BT1.sum())
            self.counters.add("gate_count", torch.full((), float(g_BT1.numel()), device=g_BT1.device))
        if self.conv is None or self.conv_norm is None:
            return u_BTD
        return self.convolve(u_BTD, self.conv_norm.weight, self.conv, documents_BT, self.dilation, self.eps)
