"""Sums of rows by segment, deterministic on CPU and CUDA; adds in the order of reference.py.

Shapes: N rows, D width, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen


def segment_sum(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """[S, D]: row s is the sum of the rows of values_ND whose segment is s, added in order of appearance; 0
    without any.

    segment_N int64 in [0, num_segments), sorted or not. float16 and bfloat16 are added up in float32 and
    rounded once. Raises ValueError for shapes that do not fit; a segment out of range raises RuntimeError on
    CPU and is not noticed on CUDA, where noticing would synchronise.
    """
    if values_ND.ndim != 2 or segment_N.shape != values_ND.shape[:1]:
        raise ValueError(
            f"values {list(values_ND.shape)} and segment {list(segment_N.shape)} must be [N, D] and [N]"
        )
    if chosen("segment_sum", values_ND) == "triton" and values_ND.dtype != torch.float64:
        from hybridtrain.kernels.segment_sum.kernel import segment_sum as fused

        return fused(values_ND, segment_N, num_segments)
    wide_ND = values_ND.to(torch.promote_types(values_ND.dtype, torch.float32))
    if wide_ND.is_cuda:
        return _by_bags(wide_ND, segment_N, num_segments).to(values_ND.dtype)
    # On CPU index_add_ walks the rows of a segment in order and shares out segments, not rows, among threads.
    return (
        wide_ND.new_zeros(num_segments, wide_ND.shape[1])
        .index_add_(0, segment_N, wide_ND)
        .to(values_ND.dtype)
    )


def _by_bags(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """The sum by a stable sort and one embedding bag a segment, whose sum is one thread's loop; CUDA's
    index_add_ is atomic.
    """
    if len(segment_N) == 0:
        return values_ND.new_zeros(num_segments, values_ND.shape[1])
    sorted_N, order_N = torch.sort(segment_N, stable=True)
    ends = torch.searchsorted(sorted_N, torch.arange(num_segments + 1, device=segment_N.device))
    return F.embedding_bag(order_N, values_ND, ends, mode="sum", include_last_offset=True)
