"""Rotary positions, after an RMSNorm where one is asked for: one complex product in torch, or Triton's one
pass.

See reference.py for the definition.

B batch, T tokens, H heads, C head width, R = C/2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.rms_norm.op import rms_norm


def rope(x_BTHC: Tensor, rotation_TR: Tensor, weight_C: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """Neighbours (2r, 2r + 1) of every head times the complex rotation_TR of their position; float32 inside.

    With a weight, every head goes through an RMSNorm before. Neighbours, as in the RoPE paper, and not (r, r
    + C/2): one complex product each way is a quarter of the time.
    """
    if chosen("rope", x_BTHC) == "triton":
        from hybridtrain.kernels.rope.kernel import rope as fused

        return fused(x_BTHC, torch.view_as_real(rotation_TR).flatten(1), weight_C, eps)
    if weight_C is not None:
        x_BTHC = rms_norm(x_BTHC, weight_C, eps)
    complex_BTHR = torch.view_as_complex(x_BTHC.float().view(*x_BTHC.shape[:-1], -1, 2))
    rotation_THR = rotation_TR[:, None].expand(complex_BTHR.shape[1:]).contiguous()  # one long inner loop
    return torch.view_as_real(complex_BTHR * rotation_THR).flatten(-2).to(x_BTHC.dtype)
