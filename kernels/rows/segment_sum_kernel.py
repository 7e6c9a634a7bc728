"""The segment sum in Triton: a stable sort, then one lane of a tile per segment and column that adds its rows
in their order.

No atomics: the sum has one order, that of reference.py. N rows, D width, S segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, row_tile


@triton.jit
def _sum_kernel(
    values_ptr, order_ptr, ends_ptr, out_ptr, S, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    segments = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    first = tl.load(ends_ptr + segments, mask=segments < S, other=0)
    count = tl.load(ends_ptr + segments + 1, mask=segments < S, other=0) - first
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for i in range(tl.max(count, 0)):
        rows = tl.load(order_ptr + first + i, mask=i < count, other=0)
        inside = (i < count)[:, None] & (cols < D)[None, :]
        total += tl.load(values_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    at = segments[:, None] * D + cols[None, :]
    tl.store(
        out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=(segments < S)[:, None] & (cols < D)[None, :]
    )


def _sum(values_ND: Tensor, order_N: Tensor, ends: Tensor) -> Tensor:
    S, D = len(ends) - 1, values_ND.size(1)
    out = values_ND.new_empty(S, D)
    tile, warps = row_tile(D, elements=1024)
    launch(
        _sum_kernel, (ceil_div(S, tile["BLOCK_N"]),), values_ND, order_N, ends, out, S, D,
        values_ND.stride(0),
        constants=tile, num_warps=min(16, 2 * warps),
    )  # fmt: skip
    return out


def _forward(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    sorted_N, order_N = torch.sort(segment_N, stable=True)
    ends = torch.searchsorted(sorted_N, torch.arange(num_segments + 1, device=segment_N.device))
    return _sum(values_ND, order_N, ends)


_op = custom_op("hybridtrain::segment_sum", _forward, mutates_args=())


@_op.register_fake
def _(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    return values_ND.new_empty(num_segments, values_ND.size(1))


def segment_sum(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """As op.segment_sum for float32 and narrower; values' rows may lie any distance apart. Raises ValueError
    as it does.
    """
    if values_ND.ndim != 2 or segment_N.shape != values_ND.shape[:1]:
        raise ValueError(
            f"values {list(values_ND.shape)} and segment {list(segment_N.shape)} must be [N, D] and [N]"
        )
    values_ND = values_ND if values_ND.stride(1) == 1 else values_ND.contiguous()
    out: Tensor = _op(values_ND.detach(), segment_N, num_segments)
    return out


def cases() -> Iterator[Case]:
    """Gradients of rows at their owner: about two per row, float32 (sorting not counted)."""
    for D in (80, 256):
        values = torch.empty(400_000, D, device="meta")
        order, ends = (
            values.new_empty(400_000, dtype=torch.int64),
            values.new_empty(200_001, dtype=torch.int64),
        )
        least = num_bytes(values, order, ends) + 200_000 * D * 4
        yield Case("segment_sum", f"N=400000 S=200000 D={D}", partial(_sum, values, order, ends), least)
