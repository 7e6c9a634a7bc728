"""The definition of rotary positions (arXiv 2104.09864) after an optional RMSNorm of each head.

B batch, T tokens, H heads, C head width; neighbours (2r, 2r + 1) turn by the angle of their position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    """rotation_TC holds cosine and sine of angle r at 2r and 2r + 1; weight_C None leaves the norm out."""
    if weight_C is not None:
        x_BTHC = x_BTHC * (x_BTHC.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_C
    cos_T1R, sin_T1R = (
        rotation_TC[:, None, 0::2].to(x_BTHC.dtype),
        rotation_TC[:, None, 1::2].to(x_BTHC.dtype),
    )
    even, odd = x_BTHC[..., 0::2], x_BTHC[..., 1::2]
    return torch.stack([even * cos_T1R - odd * sin_T1R, even * sin_T1R + odd * cos_T1R], -1).flatten(-2)
