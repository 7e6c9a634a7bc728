"""Rows of a table by their numbers, with a gradient whose sums have one order; and rows as they travel
between ranks.

R rows, D width, U rows asked for. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.row_gather import reference
from hybridtrain.kernels.segment_sum import segment_sum


def row_gather(table_RD: Tensor, rows: Tensor) -> Tensor:
    """[*rows.shape, D]: the rows, int64 in [0, R), in the order asked for.

    The table's gradient is that of a small one, [R, D]; equal rows' gradients are added in the order in which
    they were asked for.
    """
    if chosen("row_gather", table_RD) == "triton":
        from hybridtrain.kernels.row_gather.kernel import row_gather as fused

        out = fused(table_RD, rows.flatten())
    else:
        out = _gather(table_RD, rows.flatten())
    return out.view(*rows.shape, table_RD.size(1))


def pack(table_RD: Tensor, rows_U: Tensor | None, wire: str) -> Tensor:
    """The rows (None: all, as they stand) as they travel: [U, …] in the table's own type ("exact"),
    "bfloat16", or "float8".
    """
    if wire == "float8" and chosen("row_gather", table_RD) == "triton":
        from hybridtrain.kernels.row_gather.kernel import pack as fused

        return fused(table_RD, rows_U)
    rows_UD = table_RD if rows_U is None else row_gather(table_RD, rows_U)
    if wire == "float8":
        return reference.pack(rows_UD)
    return rows_UD.bfloat16() if wire == "bfloat16" else rows_UD


def unpack(payload: Tensor, width: int, wire: str) -> Tensor:
    """[U, width] of what `pack` made, float32 or, of a wider table, as wide."""
    if wire != "float8":
        return payload.to(torch.promote_types(payload.dtype, torch.float32))
    if chosen("row_gather", payload) == "triton":
        from hybridtrain.kernels.row_gather.kernel import unpack as fused

        return fused(payload, width)
    return reference.unpack(payload, width)


class _Gather(torch.autograd.Function):
    """index_select; its own gradient has no order on CUDA, and that of an embedding takes twice as long on
    the CPU.
    """

    @staticmethod
    def forward(ctx: Any, table_RD: Tensor, rows_U: Tensor) -> Tensor:
        ctx.num_rows = len(table_RD)
        ctx.save_for_backward(rows_U)
        return table_RD.index_select(0, rows_U)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows_U,) = ctx.saved_tensors
        return segment_sum(grads[0], rows_U, ctx.num_rows), None


_gather: Callable[[Tensor, Tensor], Tensor] = _Gather.apply
