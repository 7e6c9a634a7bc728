"""The lookup memory's gate and fusion (Engram, arXiv 2601.07372). Rows come from outside; see rows.py.

B batch, T tokens, D model width, S slots (orders * heads), C row width, J kernel taps.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridtrain.model.counters import Counters
from hybridtrain.model.norm import RMSNorm
from hybridtrain.settings import Settings


class EngramMemory(nn.Module):
    """y = SiLU(conv(RMSNorm(u))) + u with u = g * W_V e, where g says how far the hidden state agrees with W_K e."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        dim, eps, memory = settings.model.dim, settings.model.norm_eps, settings.memory
        width = len(memory.orders) * memory.heads * memory.head_dim
        self.counters = Counters()
        self.gate_floor = memory.gate_floor
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
        g_BT1 = gate(self.h_norm(h_BTD), self.k_norm(self.wk(e_BTX)), self.gate_floor)
        if self.training:
            self.counters.add("gate_sum", g_BT1.sum())
            self.counters.add("gate_count", torch.tensor(float(g_BT1.numel()), device=g_BT1.device))
        v_BTD = self.wv(e_BTX)
        u_BTD: Tensor = g_BT1.to(v_BTD.dtype) * v_BTD
        if self.conv is None or self.conv_norm is None:
            return u_BTD
        return F.silu(self.convolve(self.conv_norm(u_BTD), self.conv, self.dilation, documents_BT)) + u_BTD


def gate(h_BTD: Tensor, k_BTD: Tensor, floor: float = 1e-6) -> Tensor:
    """sigmoid(sign(s) sqrt(max(|s|, floor))) of s = <h, k> / sqrt(D), both normalised: float32 [B, T, 1].

    The square root is in every released code, with the floor 1e-6; the paper's text has sigmoid(s). Its slope is
    1 / (2 sqrt(|s|)), up to 1 / (2 sqrt(floor)): single tokens near s = 0 can dominate a step's gradient.
    """
    s_BT1 = (h_BTD.float() * k_BTD.float()).sum(-1, keepdim=True) / math.sqrt(h_BTD.size(-1))
    return torch.sigmoid(s_BT1.sign() * s_BT1.abs().clamp_min(floor).sqrt())


def short_conv(x_BTD: Tensor, kernel_JD: Tensor, dilation: int, documents_BT: Tensor | None) -> Tensor:
    """Depthwise causal convolution; tap j reads (J-1-j)*dilation tokens back, never across a document start."""
    taps, seq_len = kernel_JD.size(0), x_BTD.size(1)
    out_BTD = x_BTD * kernel_JD[-1]
    for j in range(taps - 1):
        back = (taps - 1 - j) * dilation
        if back >= seq_len:
            continue
        term_BTD = x_BTD[:, :-back] * kernel_JD[j]
        if documents_BT is not None:
            term_BTD = term_BTD * (documents_BT[:, back:] == documents_BT[:, :-back])[:, :, None]
        out_BTD = out_BTD + F.pad(term_BTD, (0, 0, back, 0))
    return out_BTD
