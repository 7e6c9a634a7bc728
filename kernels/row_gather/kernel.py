"""The gather of table rows in Triton: int64 addresses, so tables of more than 2^31 elements; its gradient is segment_sum's.

R rows of a table, D width, U rows asked for.
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
def _gather_kernel(table_ptr, rows_ptr, out_ptr, U, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (places < U)[:, None] & (cols < D)[None, :]
    rows = tl.load(rows_ptr + places, mask=places < U, other=-1).to(tl.int64)
    values = tl.load(table_ptr + rows[:, None] * stride + cols[None, :], mask=inside & (rows >= 0)[:, None], other=0.0)
    tl.store(out_ptr + places[:, None] * D + cols[None, :], values, mask=inside)


def _forward(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    U, D = len(rows_U), table_RD.size(1)
    out = table_RD.new_empty(U, D)
    tile, warps = row_tile(D)
    launch(
        _gather_kernel, (ceil_div(U, tile["BLOCK_N"]),), table_RD, rows_U, out, U, D, table_RD.stride(0),
        constants=tile, num_warps=warps, traffic=2 * num_bytes(out) + num_bytes(rows_U),
    )  # fmt: skip
    return out


_op = custom_op("hybridtrain::row_gather", _forward, mutates_args=())


@_op.register_fake
def _(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    return table_RD.new_empty(rows_U.shape[0], table_RD.size(1))


def row_gather(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    """[U, D]: the rows int64 in the order asked for; row -1 comes out zero. No gradient: a table's goes by rows, see segment_sum.

    The table's rows may lie any distance apart, each in one piece. Raises ValueError for shapes that do not fit.
    """
    if table_RD.ndim != 2 or rows_U.ndim != 1 or table_RD.stride(1) != 1:
        raise ValueError(f"table {list(table_RD.shape)} and rows {list(rows_U.shape)} must be [R, D] with whole rows, and [U]")
    out: Tensor = _op(table_RD.detach(), rows_U)
    return out


def cases() -> Iterator[Case]:
    """Unique rows of a step, bf16, of the widths of published models."""
    for D in (80, 256):
        table = torch.empty(16_000_000, D, dtype=torch.bfloat16, device="meta")
        rows = table.new_empty(200_000, dtype=torch.int64)
        least = 2 * 200_000 * D * 2 + num_bytes(rows)
        yield Case("row_gather", f"U=200000 D={D}", partial(_forward, table, rows), least)
