"""What an Engram layer makes of keys and values of its rows: the gated value, and the convolution behind it.

Triton has each in one pass forward; torch has several, with the norms that `rms_norm` chooses.
B batch, T tokens, D width, J taps; … any dimensions. See reference.py for the definitions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.norms.op import rms_norm

ENGRAM_GATE = Op("engram_gate", "torch, around rms_norm", sources=("engram.engram_gate_kernel",))
SHORT_CONV = Op("short_conv", "torch tap by tap", sources=("engram.short_conv_kernel",))


class GateNorms(NamedTuple):
    """Weights of the norms of hidden states and keys, [D], or [M, D] of M branches of the hidden state; what
    is added to mean squares, and the floor of the agreement's magnitude."""

    h_weight: Tensor
    k_weight: Tensor
    eps: float
    floor: float


def engram_gate(
    h: Tensor, k: Tensor, v: Tensor, norms: GateNorms, backends: Backends = TORCH
) -> tuple[Tensor, Tensor]:
    """(gated values like h, gates float32 [..., 1] without gradient) of hidden states h and keys k not yet
    normed, and values v.

    All [..., D]; or with M branches h and k [..., M, D].
    """
    h_weight, k_weight, eps, floor = norms
    if backends.of(ENGRAM_GATE, h) == "triton":
        from hybridtrain.kernels.engram.engram_gate_kernel import of_any_shape

        return of_any_shape(h, k, v, h_weight, k_weight, eps, floor)
    if h_weight.ndim == 2:
        v = v.unsqueeze(-2)
    h, k = _norm(h, h_weight, eps, backends), _norm(k, k_weight, eps, backends)
    s = (h.float() * k.float()).sum(-1, keepdim=True) / math.sqrt(h.size(-1))
    gate = torch.sigmoid(s.sign() * s.abs().clamp_min(floor).sqrt())
    return gate.to(v.dtype) * v, gate.detach()


def _norm(x: Tensor, weight: Tensor, eps: float, backends: Backends) -> Tensor:
    """RMSNorm; with weights [M, D] a weight for each branch."""
    if weight.ndim == 1:
        return rms_norm(x, weight, eps, backends)
    return rms_norm(x, torch.ones_like(weight[0]), eps, backends) * weight


class ConvRule(NamedTuple):
    """How far apart the taps are, in tokens, and what the norm before them adds to mean squares."""

    dilation: int
    eps: float


def short_conv(
    u_BTD: Tensor,
    weight_D: Tensor,
    kernel_JD: Tensor,
    documents_BT: Tensor | None,
    rule: ConvRule,
    backends: Backends = TORCH,
) -> Tensor:
    """SiLU(conv(RMSNorm(u))) + u; tap j reads (J-1-j)*dilation tokens back, never across a document start.

    `documents_BT` numbers the documents of a sequence; None: one each.
    """
    if backends.of(SHORT_CONV, u_BTD) == "triton":
        from hybridtrain.kernels.engram.short_conv_kernel import short_conv as fused

        return fused(u_BTD, weight_D, kernel_JD, documents_BT, *rule)
    normed_BTD = rms_norm(u_BTD, weight_D, rule.eps, backends)
    return F.silu(_convolve(normed_BTD, kernel_JD, documents_BT, rule.dilation)) + u_BTD


def _convolve(x_BTD: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int) -> Tensor:
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
