"""One step of row-wise Adam or Adagrad on the touched rows, in Triton: read, replay of decay, update,
rounding, write.

R rows, D width, N touched rows. bfloat16 rows are rounded stochastically: a step smaller than half a unit of
the last place then moves the row by its right amount on average instead of never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, row_tile
from hybridtrain.kernels.rowwise_adam.op import RowState, Step


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _step_kernel(
    table_ptr, v_ptr, last_ptr, rows_ptr, grad_ptr, decay_ptr, N, D, step, lr, eps, log2_high, log2_low,
    gain, correction, seed,
    first_row, DECAY: tl.constexpr, ROUND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    real = places < N
    inside = real[:, None] & (cols < D)[None, :]
    rows = tl.load(rows_ptr + places, mask=real, other=0)
    last = tl.load(last_ptr + rows, mask=real, other=0)
    grad = tl.load(grad_ptr + places[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    # float64 by the row, because the gap may be as long as the run
    gap = (step - last).to(tl.float64)
    kept = tl.exp2(gap * log2_high + gap * log2_low).to(tl.float32)
    v = tl.load(v_ptr + rows, mask=real, other=0.0) * kept + gain * (tl.sum(grad * grad, 1) / D)
    at = rows[:, None] * D + cols[None, :]
    weights = tl.load(table_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DECAY:
        owed = tl.load(decay_ptr + step) - tl.load(decay_ptr + last, mask=real, other=0.0)
        weights *= tl.exp(owed).to(tl.float32)[:, None]
    weights -= (lr / (tl.sqrt(v / correction) + eps))[:, None] * grad
    if ROUND:
        key = ((first_row + rows) * D).to(tl.uint32)[:, None] + cols.to(tl.uint32)[None, :]
        noise = _mix(_mix(key) ^ seed) >> 16
        bits = (weights.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
        weights = tl.where(weights == weights, bits.to(tl.float32, bitcast=True), weights)
    tl.store(table_ptr + at, weights.to(table_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + rows, v, mask=real)
    tl.store(last_ptr + rows, tl.zeros([BLOCK_N], dtype=tl.int32) + step, mask=real)


def _step(
    table_RD: Tensor, v_R: Tensor, last_R: Tensor, rows_N: Tensor, grad_ND: Tensor, decay: Tensor | None,
    step: int, lr: float, eps: float, beta2: float, gain: float, correction: float, seed: int, first_row: int,
) -> None:  # fmt: skip
    N, D = grad_ND.shape
    tile, warps = row_tile(D, elements=1024)
    log2 = math.log2(beta2) if beta2 > 0 else -math.inf
    high = float(torch.tensor(log2, dtype=torch.float32))  # arguments are float32; two of them carry 48 bits
    touched = N * (2 * D * table_RD.element_size() + 2 * 8)
    launch(
        _step_kernel, (ceil_div(N, tile["BLOCK_N"]),), table_RD, v_R, last_R, rows_N, grad_ND, decay,
        N, D, step, lr, eps, high, log2 - high if math.isfinite(log2) else 0.0, gain, correction, seed,
        first_row,
        constants={"DECAY": decay is not None, "ROUND": table_RD.dtype == torch.bfloat16, **tile},
        num_warps=warps,
        traffic=touched + num_bytes(grad_ND, rows_N) + (8 * N if decay is not None else 0),
    )  # fmt: skip


_op = custom_op("hybridtrain::rowwise_adam", _step, mutates_args=("table_RD", "v_R", "last_R"))


@_op.register_fake
def _(
    table_RD: Tensor, v_R: Tensor, last_R: Tensor, rows_N: Tensor, grad_ND: Tensor, decay: Tensor | None,
    step: int, lr: float, eps: float, beta2: float, gain: float, correction: float, seed: int, first_row: int,
) -> None:  # fmt: skip
    return None


def rowwise_adam(state: RowState, rows_N: Tensor, grad_ND: Tensor, decay: Tensor | None, step: Step) -> None:
    """As op.rowwise_adam; grad_ND any float."""
    _op(*state, rows_N.contiguous(), grad_ND.contiguous(), decay, *step)


def cases() -> Iterator[Case]:
    """200,000 touched rows of a step, bf16 with decay and float32 without."""
    for D, dtype, decayed in ((256, torch.bfloat16, True), (80, torch.float32, False)):
        table = torch.empty(16_000_000, D, dtype=dtype, device="meta")
        v, last = (
            table.new_empty(16_000_000, dtype=torch.float32),
            table.new_empty(16_000_000, dtype=torch.int32),
        )
        rows, grad = (
            table.new_empty(200_000, dtype=torch.int64),
            table.new_empty(200_000, D, dtype=torch.float32),
        )
        decay = table.new_empty(100_000, dtype=torch.float64) if decayed else None
        state = (table, v, last, rows, grad, decay)
        least = 200_000 * (2 * D * dtype.itemsize + 16 + 8 * decayed) + num_bytes(grad, rows)
        name = f"N=200000 D={D} {str(dtype).removeprefix('torch.')}{' with decay' if decayed else ''}"
        run = partial(_step, *state, 777, 1e-3, 1e-8, 0.95, 0.05, 0.9, 12345, 3_000_000_000)
        yield Case("rowwise_adam", name, run, least)
