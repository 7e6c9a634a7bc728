"""The definitions of the gather, and of the segment sum: one addition at a time, in order of appearance."""

from __future__ import annotations

import torch
from torch import Tensor


def row_gather(table_RD: Tensor, rows: Tensor) -> Tensor:
    """[*rows.shape, D]: the rows in the order asked for."""
    return table_RD[rows]


def segment_sum(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """[S, D]: row s is the sum of the rows of values_ND whose segment is s, added from first to last.

    float16 and bfloat16 are added up in float32 and rounded once.
    """
    wide = torch.promote_types(values_ND.dtype, torch.float32)
    out_SD = torch.zeros(num_segments, values_ND.shape[1], dtype=wide, device=values_ND.device)
    for row, segment in zip(values_ND, segment_N.tolist(), strict=True):
        out_SD[segment] += row.to(wide)
    return out_SD.to(values_ND.dtype)
