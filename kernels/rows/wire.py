"""Rows of a table as they travel between ranks. R rows of a table, D width, U rows asked for.

See eight_bits.py for the definition of rows in 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.rows import eight_bits
from hybridtrain.kernels.rows.op import ROW_GATHER, row_gather


def pack(table_RD: Tensor, rows_U: Tensor | None, wire: str, backends: Backends = TORCH) -> Tensor:
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


def unpack(payload: Tensor, width: int, wire: str, backends: Backends = TORCH) -> Tensor:
    """[U, width] of what `pack` made, float32 or, of a wider table, as wide."""
    if wire != "float8":
        return payload.to(torch.promote_types(payload.dtype, torch.float32))
    if backends.of(ROW_GATHER, payload) == "triton":
        from hybridtrain.kernels.rows.row_gather_kernel import unpack as fused

        return fused(payload, width)
    return eight_bits.unpack(payload, width)
