"""The definition of rows on the wire in 8 bits. D width, U rows.

A packed row is D bytes e4m3 (4 bits of exponent, 3 of fraction, greatest 448; arXiv 2209.05433), zeros, and
in its last 4 bytes the float32 scale by which they are multiplied: 16-byte multiples, so that every access
may be 128 bits wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

GREATEST = 448.0  # of e4m3
# a row of smaller elements than this is scaled as if it had one: the inverse of its scale is a float32
LEAST = 1e-30


def packed_width(width: int) -> int:
    """Bytes of a packed row of `width` elements."""
    return -(-(width + 4) // 16) * 16


def pack(rows_UD: Tensor) -> Tensor:
    """uint8 [U, packed_width(D)]: x / scale rounded to the nearest e4m3, scale = max |x| / 448.

    An element comes back within 2^-4 of itself or, near zero, 2^-10 of the scale, and two float32 roundings.
    """
    rows_UD = rows_UD.float()
    scale_U1 = rows_UD.abs().amax(-1, keepdim=True).clamp_min(LEAST) / GREATEST
    out = rows_UD.new_zeros(len(rows_UD), packed_width(rows_UD.size(1)), dtype=torch.uint8)
    out[:, : rows_UD.size(1)] = (rows_UD * scale_U1.reciprocal()).to(torch.float8_e4m3fn).view(torch.uint8)
    out.view(torch.float32)[:, -1:] = scale_U1
    return out


def unpack(packed: Tensor, width: int) -> Tensor:
    """float32 [U, width] out of packed rows."""
    codes_UD = packed[:, :width].contiguous().view(torch.float8_e4m3fn)
    return codes_UD.float() * packed.view(torch.float32)[:, -1:]
