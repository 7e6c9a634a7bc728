"""The gather of table rows in Triton, int64 addresses, so tables of more than 2^31 elements; and rows packed
in 8 bits.

R rows of a table, D width, U rows asked for. e4m3 is made and read by integer arithmetic, which every GPU
has.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, row_tile
from hybridtrain.kernels.rows.eight_bits import GREATEST, LEAST, packed_width
from hybridtrain.kernels.rows.segment_sum_kernel import segment_sum


@triton.jit
def _gather_kernel(table_ptr, rows_ptr, out_ptr, U, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (places < U)[:, None] & (cols < D)[None, :]
    rows = tl.load(rows_ptr + places, mask=places < U, other=0).to(tl.int64)
    values = tl.load(table_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + places[:, None] * D + cols[None, :], values, mask=inside)


@triton.jit
def _e4m3(x):
    """The e4m3 nearest to x, ties to even, as a number from 0 to 255; what is no number stays none."""
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.abs(x)
    plain = size.to(tl.uint32, bitcast=True)
    normal = (
        (plain + 0x7FFFF + ((plain >> 20) & 1)) >> 20
    ) - 960  # 20 bits of fraction less, the exponent's bias 120 less
    small = (size + 16384.0).to(
        tl.uint32, bitcast=True
    ) - 0x46800000  # 2^14: the last place of the sum is e4m3's, 2^-9
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, tl.minimum(code, 0x7E), 0x7F)
    return code | ((bits >> 31) << 7)


@triton.jit
def _of_e4m3(code):
    size = code & 0x7F
    normal = ((size + 960) << 20).to(tl.float32, bitcast=True)
    x = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    x = tl.where(size == 0x7F, float("nan"), x)
    return tl.where(code >= 0x80, -x, x)


@triton.jit
def _pack_kernel(
    table_ptr, rows_ptr, out_ptr, U, D, stride, width, greatest, least,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    rows = places
    if ROWS:
        rows = tl.load(rows_ptr + places, mask=places < U, other=0).to(tl.int64)
    inside = (places < U)[:, None] & (cols < D)[None, :]
    x = tl.load(table_ptr + rows[:, None] * stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), least) / greatest
    code = _e4m3(x * (1.0 / scale)[:, None])
    scale_bytes = scale.to(tl.uint32, bitcast=True)[:, None] >> (cols % 4 * 8)[None, :] & 0xFF
    code = tl.where((cols < width - 4)[None, :], code, scale_bytes)
    there = (places < U)[:, None] & (cols < width)[None, :]
    tl.store(out_ptr + places[:, None] * width + cols[None, :], code.to(tl.uint8), mask=there)


@triton.jit
def _unpack_kernel(packed_ptr, scale_ptr, out_ptr, U, D, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (places < U)[:, None] & (cols < D)[None, :]
    code = tl.load(packed_ptr + places[:, None] * width + cols[None, :], mask=inside, other=0).to(tl.uint32)
    scale = tl.load(scale_ptr + (places + 1) * (width // 4) - 1, mask=places < U, other=0.0)
    tl.store(out_ptr + places[:, None] * D + cols[None, :], _of_e4m3(code) * scale[:, None], mask=inside)


def _forward(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    U, D = len(rows_U), table_RD.size(1)
    out = table_RD.new_empty(U, D)
    tile, warps = row_tile(D)
    launch(
        _gather_kernel, (ceil_div(U, tile["BLOCK_N"]),), table_RD, rows_U, out, U, D, table_RD.stride(0),
        constants=tile, num_warps=warps, traffic=2 * num_bytes(out) + num_bytes(rows_U),
    )  # fmt: skip
    return out


def _pack(table_RD: Tensor, rows_U: Tensor | None) -> Tensor:
    U, D = len(table_RD if rows_U is None else rows_U), table_RD.size(1)
    out = table_RD.new_empty(U, packed_width(D), dtype=torch.uint8)
    tile, warps = row_tile(out.size(1))
    launch(
        _pack_kernel, (ceil_div(U, tile["BLOCK_N"]),), table_RD, rows_U, out, U, D, table_RD.stride(0),
        out.size(1), GREATEST, LEAST, constants={"ROWS": rows_U is not None, **tile}, num_warps=warps,
        traffic=U * D * table_RD.element_size() + num_bytes(out) + (8 * U if rows_U is not None else 0),
    )  # fmt: skip
    return out


def _unpack(packed: Tensor, width: int) -> Tensor:
    U = len(packed)
    out = packed.new_empty(U, width, dtype=torch.float32)
    tile, warps = row_tile(width)
    launch(
        _unpack_kernel, (ceil_div(U, tile["BLOCK_N"]),), packed, packed.view(torch.float32), out, U, width,
        packed.size(1),
        constants=tile, num_warps=warps, traffic=num_bytes(out) + U * (width + 4),
    )  # fmt: skip
    return out


_op = custom_op("hybridtrain::row_gather", _forward, mutates_args=())
_op_pack = custom_op("hybridtrain::row_pack", _pack, mutates_args=())
_op_unpack = custom_op("hybridtrain::row_unpack", _unpack, mutates_args=())


@_op.register_fake
def _(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    return table_RD.new_empty(rows_U.shape[0], table_RD.size(1))


@_op_pack.register_fake
def _(table_RD: Tensor, rows_U: Tensor | None) -> Tensor:
    return table_RD.new_empty(
        (table_RD if rows_U is None else rows_U).shape[0], packed_width(table_RD.size(1)), dtype=torch.uint8
    )


@_op_unpack.register_fake
def _(packed: Tensor, width: int) -> Tensor:
    return packed.new_empty(packed.shape[0], width, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.num_rows = len(inputs[0])
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rows_U,) = ctx.saved_tensors
    return segment_sum(grad, rows_U, ctx.num_rows), None


_op.register_autograd(_gradients, setup_context=_setup)


def row_gather(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    """[U, D]: the rows int64 in the order asked for; its gradient is a segment sum.

    The table's rows may lie any distance apart, each in one piece. Raises ValueError for shapes that do not
    fit.
    """
    _check(table_RD, rows_U)
    out: Tensor = _op(table_RD, rows_U.contiguous())
    return out


def pack(table_RD: Tensor, rows_U: Tensor | None) -> Tensor:
    """As eight_bits.pack of the rows asked for, or of all. Raises ValueError as `row_gather`."""
    _check(table_RD, rows_U)
    out: Tensor = _op_pack(table_RD.detach(), None if rows_U is None else rows_U.contiguous())
    return out


def unpack(packed: Tensor, width: int) -> Tensor:
    """As eight_bits.unpack."""
    out: Tensor = _op_unpack(packed.contiguous(), width)
    return out


def _check(table_RD: Tensor, rows_U: Tensor | None) -> None:
    if table_RD.ndim != 2 or table_RD.stride(1) != 1 or (rows_U is not None and rows_U.ndim != 1):
        shapes = f"table {list(table_RD.shape)} and rows {None if rows_U is None else list(rows_U.shape)}"
        raise ValueError(f"{shapes} must be [R, D] with whole rows, and [U]")


def cases() -> Iterator[Case]:
    """Unique rows of a step, of the widths of published models: bf16 as they are, and float32 in 8 bits there
    and back.
    """
    for D in (80, 256):
        U, width = 200_000, packed_width(D)
        table = torch.empty(16_000_000, D, dtype=torch.bfloat16, device="meta")
        rows, packed = table.new_empty(U, dtype=torch.int64), table.new_empty(U, width, dtype=torch.uint8)
        yield Case(
            "row_gather", f"U={U} D={D}", partial(_forward, table, rows), 2 * U * D * 2 + num_bytes(rows)
        )
        run, wide = partial(_pack, table.float(), rows), 4 * U * D
        yield Case("row_gather", f"pack U={U} D={D} float32", run, wide + num_bytes(packed, rows))
        yield Case("row_gather", f"unpack U={U} D={D}", partial(_unpack, packed, D), wide + U * (D + 4))
