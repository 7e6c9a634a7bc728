"""The memory's gate: Triton in one pass each way, or torch in several, with the norms that `rms_norm`
chooses.

D width of the last dimension, … all others. See reference.py for the definition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.rms_norm.op import rms_norm


def engram_gate(
    h: Tensor, k: Tensor, v: Tensor, h_weight: Tensor, k_weight: Tensor, eps: float, floor: float
) -> tuple[Tensor, Tensor]:
    """(gated values like h, gates float32 [..., 1] without gradient) of hidden states h and keys k not yet
    normed, and values v.

    All [..., D] and the weights [D]; or with M branches of the hidden state h and k [..., M, D] and the
    weights [M, D].
    """
    if chosen("engram_gate", h) == "triton":
        return _fused(h, k, v, h_weight, k_weight, eps, floor)
    if h_weight.ndim == 2:
        v = v.unsqueeze(-2)
    h, k = _norm(h, h_weight, eps), _norm(k, k_weight, eps)
    s = (h.float() * k.float()).sum(-1, keepdim=True) / math.sqrt(h.size(-1))
    gate = torch.sigmoid(s.sign() * s.abs().clamp_min(floor).sqrt())
    return gate.to(v.dtype) * v, gate.detach()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm; with weights [M, D] a weight for each branch."""
    return (
        rms_norm(x, weight, eps)
        if weight.ndim == 1
        else rms_norm(x, torch.ones_like(weight[0]), eps) * weight
    )


def _fused(
    h: Tensor, k: Tensor, v: Tensor, h_weight: Tensor, k_weight: Tensor, eps: float, floor: float
) -> tuple[Tensor, Tensor]:
    from hybridtrain.kernels.engram_gate.kernel import engram_gate as fused

    weights = h_weight.view(-1, h.size(-1)), k_weight.view(-1, h.size(-1))
    branches = (-1, len(weights[0]), h.size(-1))
    out, gate = fused(
        h.reshape(branches), k.reshape(branches), v.reshape(-1, h.size(-1)), *weights, eps, floor
    )
    return out.view(h.shape), gate.view(*h.shape[:-1], 1)
