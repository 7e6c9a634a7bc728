"""Rows of a table by their numbers and sums of rows by segment, both with one order of summation; and rows as
they travel.

R rows, D width; U rows asked for; N values, S segments. See reference.py and eight_bits.py for definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.rows import eight_bits

Wire = Literal["exact", "bfloat16", "float8"]  # the format of rows while they travel
ROW_GATHER = Op("row_gather", "torch index_select", sources=("rows.row_gather_kernel",))
SEGMENT_SUM = Op(
    "segment_sum",
    "torch index_add",
    torch_on_gpu="torch sort + embedding_bag",
    sources=("rows.segment_sum_kernel",),
)


def row_gather(table_RD: Tensor, rows: Tensor, backends: Backends = TORCH) -> Tensor:
    """[*rows.shape, D]: the rows, int64 in [0, R), in the order asked for.

    The table's gradient is that of a small one, [R, D]; equal rows' gradients are added in the order in which
    they were asked for.
    """
    if backends.of(ROW_GATHER, table_RD) == "triton":
        from hybridtrain.kernels.rows.row_gather_kernel import row_gather as fused

        out = fused(table_RD, rows.flatten())
    else:
        out = _gather(table_RD, rows.flatten(), backends)
    return out.view(*rows.shape, table_RD.size(1))


def segment_sum(
    values_ND: Tensor, segment_N: Tensor, num_segments: int, backends: Backends = TORCH
) -> Tensor:
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
    if backends.of(SEGMENT_SUM, values_ND) == "triton" and values_ND.dtype != torch.float64:
        from hybridtrain.kernels.rows.segment_sum_kernel import segment_sum as fused

        return fused(values_ND, segment_N, num_segments)
    wide_ND = values_ND.to(torch.promote_types(values_ND.dtype, torch.float32))
    if wide_ND.is_cuda:
        return _by_bags(wide_ND, segment_N, num_segments).to(values_ND.dtype)
    # On CPU index_add_ walks the rows of a segment in order and shares out segments, not rows, among threads.
    out_SD = wide_ND.new_zeros(num_segments, wide_ND.shape[1])
    return out_SD.index_add_(0, segment_N, wide_ND).to(values_ND.dtype)


def pack(table_RD: Tensor, rows_U: Tensor | None, wire: Wire, backends: Backends = TORCH) -> Tensor:
    """The rows (None: all, as they stand) as they travel: [U, …] in the table's own type ("exact"),
    "bfloat16", or "float8".
    """
    if wire == "float8" and backends.of(ROW_GATHER, table_RD) == "triton":
        from hybridtrain.kernels.rows.row_gather_kernel import pack as fused

        return fused(table_RD, rows_U)
    rows_UD = table_RD if rows_U is None else row_gather(table_RD, rows_U, backends)
    if wire == "float8":
        return eight_bits.pack(rows_UD)
    return rows_UD.bfloat16() if wire == "bfloat16" else rows_UD


def unpack(payload: Tensor, width: int, wire: Wire, backends: Backends = TORCH) -> Tensor:
    """[U, width] of what `pack` made, float32 or, of a wider table, as wide."""
    if wire != "float8":
        return payload.to(torch.promote_types(payload.dtype, torch.float32))
    if backends.of(ROW_GATHER, payload) == "triton":
        from hybridtrain.kernels.rows.row_gather_kernel import unpack as fused

        return fused(payload, width)
    return eight_bits.unpack(payload, width)


def _by_bags(values_ND: Tensor, segment_N: Tensor, num_segments: int) -> Tensor:
    """The sum by a stable sort and one embedding bag a segment, whose sum is one thread's loop; CUDA's
    index_add_ is atomic.
    """
    if len(segment_N) == 0:
        return values_ND.new_zeros(num_segments, values_ND.shape[1])
    sorted_N, order_N = torch.sort(segment_N, stable=True)
    ends = torch.searchsorted(sorted_N, torch.arange(num_segments + 1, device=segment_N.device))
    return F.embedding_bag(order_N, values_ND, ends, mode="sum", include_last_offset=True)


class _Gather(torch.autograd.Function):
    """index_select; its own gradient has no order on CUDA, and that of an embedding takes twice as long on
    the CPU.
    """

    @staticmethod
    def forward(ctx: Any, table_RD: Tensor, rows_U: Tensor, backends: Backends) -> Tensor:
        ctx.num_rows, ctx.backends = len(table_RD), backends
        ctx.save_for_backward(rows_U)
        return table_RD.index_select(0, rows_U)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_U,) = ctx.saved_tensors
        return segment_sum(grads[0], rows_U, ctx.num_rows, ctx.backends), None, None


_gather: Callable[[Tensor, Tensor, Backends], Tensor] = _Gather.apply
