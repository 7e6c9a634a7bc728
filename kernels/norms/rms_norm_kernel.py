"""RMSNorm in Triton, with the residual addition before it where there is one; the maths is in README.md.

N rows, D width. One tile of whole rows in registers; sums in float32. The weight's gradient is summed in
registers and leaves one partial row per program, which torch adds up: no atomics, one order.
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

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, partials, row_tile


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, scale_ptr, N, D, eps,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)).to(
            sum_ptr.dtype.element_ty
        )
        tl.store(sum_ptr + at, x, mask=inside)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * scale[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < N)


@triton.jit
def _backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, scale_ptr, grad_x_ptr, partial_ptr, N, D, tiles,
    RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
        grad_weight += grad * normed
        grad *= weight[None, :]
        along = tl.sum(grad * normed, 1) / D
        grad_x = (grad - normed * along[:, None]) * scale[:, None]
        if RESIDUAL:
            grad_x += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * D + cols, tl.sum(grad_weight, 0), mask=cols < D)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    N, D = scale.numel(), x.size(-1)
    tile, warps = row_tile(D)
    launch(
        _forward_kernel, (ceil_div(N, tile["BLOCK_N"]),), x, residual, weight, out, total, scale, N, D, eps,
        constants={"RESIDUAL": residual is not None, **tile}, num_warps=warps,
    )  # fmt: skip
    return out, total, scale


def _backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    N, D = scale.numel(), x.size(-1)
    tile, warps = row_tile(D, elements=1024)
    programs, tiles = partials(ceil_div(N, tile["BLOCK_N"]))
    partial = x.new_empty(programs, D, dtype=torch.float32)
    launch(
        _backward_kernel, (programs,), grad, grad_sum, x, weight, scale, grad_x, partial, N, D, tiles,
        constants={"RESIDUAL": grad_sum is not None, **tile}, num_warps=min(16, 2 * warps),
    )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


_op = custom_op("hybridtrain::rms_norm", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::rms_norm_backward", _backward, mutates_args=())


@_op.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    return torch.empty_like(x), total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@_op_backward.register_fake
def _(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.with_residual = residual is not None
    ctx.mark_non_differentiable(scale)
    ctx.save_for_backward(total if ctx.with_residual else x, weight, scale)


def _gradients(ctx: Any, grad: Tensor, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    grad_x, grad_weight = _op_backward(
        grad.contiguous(), grad_sum.contiguous() if ctx.with_residual else None, x, weight, scale
    )
    return grad_x, grad_x if ctx.with_residual else None, grad_weight, None


_op.register_autograd(_gradients, setup_context=_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised over the last dimension and scaled by `weight` [D], in the dtype of x."""
    out: Tensor = _op(x.contiguous(), None, weight, eps)[0]
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + residual, x + residual)."""
    out, total, _ = _op(x.contiguous(), residual.contiguous(), weight, eps)
    return out, total


def cases() -> Iterator[Case]:
    """Forward and backward, alone and with a residual, at the widths of heads and of models."""
    for N, D in ((524288, 128), (16384, 4096)):
        x, scale = (
            torch.empty(s, dtype=d, device="meta")
            for s, d in (((N, D), torch.bfloat16), ((N,), torch.float32))
        )
        weight = x.new_empty(D)
        size = num_bytes(x)
        yield Case("rms_norm", f"forward N={N} D={D}", partial(_forward, x, None, weight, 1e-6), 2 * size)
        yield Case(
            "rms_norm", f"backward N={N} D={D}", partial(_backward, x, None, x, weight, scale), 3 * size
        )
        if D == 4096:
            yield Case(
                "rms_norm", f"forward + residual N={N} D={D}", partial(_forward, x, x, weight, 1e-6), 4 * size
            )
            yield Case(
                "rms_norm",
                f"backward + residual N={N} D={D}",
                partial(_backward, x, x, x, weight, scale),
                4 * size,
            )
