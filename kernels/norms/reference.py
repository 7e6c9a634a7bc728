"""The definitions of RMSNorm (arXiv 1910.07467) over the last dimension, and of rotary positions (arXiv
2104.09864) after an optional RMSNorm of each head.

B batch, T tokens, H heads, C head width; neighbours (2r, 2r + 1) turn by the angle of their position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rope(x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    """rotation_TC holds cosine and sine of angle r at 2r and 2r + 1; weight_C None leaves the norm out."""
    if weight_C is not None:
        x_BTHC = rms_norm(x_BTHC, weight_C, eps)
    rotation_T1C = rotation_TC[:, None].to(x_BTHC.dtype)
    cos_T1R, sin_T1R = rotation_T1C[..., 0::2], rotation_T1C[..., 1::2]
    even, odd = x_BTHC[..., 0::2], x_BTHC[..., 1::2]
    return torch.stack([even * cos_T1R - odd * sin_T1R, even * sin_T1R + odd * cos_T1R], -1).flatten(-2)
