"""RMSNorm, dilated causal depthwise convolution, SiLU and addition in Triton; the maths is in README.md.

N = B*T tokens, D width, J taps. Forward is one pass: a tap's row is read and normed again, out of the cache.
Backward is two: the first makes the gradient of the convolution's output and of the taps, the second turns it
back along the taps and the norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, partials, row_tile


@triton.jit
def _seen(rows, others, inside, times, T, documents_ptr, DOCUMENTS: tl.constexpr):
    """Whether `others`, which stand at `times` of the sequences of `rows`, are there and of the same
    document.
    """
    seen = inside & (times >= 0) & (times < T)
    if DOCUMENTS:
        here = tl.load(documents_ptr + rows, mask=inside, other=0)
        seen = seen & (here == tl.load(documents_ptr + others, mask=seen, other=-1))
    return seen


@triton.jit
def _normed(u_ptr, rows, seen, cols, D, weight, eps):
    """RMSNorm of rows of u; zero where not seen."""
    u = tl.load(
        u_ptr + rows[:, None] * D + cols[None, :], mask=seen[:, None] & (cols < D)[None, :], other=0.0
    ).to(tl.float32)
    return u * tl.rsqrt(tl.sum(u * u, 1) / D + eps)[:, None] * weight[None, :]


@triton.jit
def _forward_kernel(
    u_ptr, weight_ptr, taps_ptr, documents_ptr, out_ptr, N, T, D, dilation, eps,
    TAPS: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    real = rows < N
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for j in range(TAPS):
        back = (TAPS - 1 - j) * dilation
        seen = _seen(rows, rows - back, real, rows % T - back, T, documents_ptr, DOCUMENTS)
        tap = tl.load(taps_ptr + j * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        total += _normed(u_ptr, rows - back, seen, cols, D, weight, eps) * tap[None, :]
    at = rows[:, None] * D + cols[None, :]
    inside = real[:, None] & (cols < D)[None, :]
    out = total * tl.sigmoid(total) + tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _taps_kernel(
    grad_ptr, u_ptr, weight_ptr, taps_ptr, documents_ptr, grad_total_ptr, partial_ptr, N, T, D, dilation,
    eps, tiles,
    TAPS: tl.constexpr, BLOCK_J: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    places = tl.arange(0, BLOCK_J)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    grad_taps = tl.zeros([BLOCK_J, BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        real = rows < N
        total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for j in range(TAPS):
            back = (TAPS - 1 - j) * dilation
            seen = _seen(rows, rows - back, real, rows % T - back, T, documents_ptr, DOCUMENTS)
            tap = tl.load(taps_ptr + j * D + cols, mask=cols < D, other=0.0).to(tl.float32)
            total += _normed(u_ptr, rows - back, seen, cols, D, weight, eps) * tap[None, :]
        at = rows[:, None] * D + cols[None, :]
        inside = real[:, None] & (cols < D)[None, :]
        share = tl.sigmoid(total)
        grad = (
            tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            * share
            * (1.0 + total * (1.0 - share))
        )
        tl.store(grad_total_ptr + at, grad.to(grad_total_ptr.dtype.element_ty), mask=inside)
        for j in range(TAPS):
            back = (TAPS - 1 - j) * dilation
            seen = _seen(rows, rows - back, real, rows % T - back, T, documents_ptr, DOCUMENTS)
            along = tl.sum(grad * _normed(u_ptr, rows - back, seen, cols, D, weight, eps), 0)
            grad_taps += tl.where((places == j)[:, None], along[None, :], 0.0)
    at = (program.to(tl.int64) * TAPS + places)[:, None] * D + cols[None, :]
    tl.store(partial_ptr + at, grad_taps, mask=(places < TAPS)[:, None] & (cols < D)[None, :])


@triton.jit
def _input_kernel(
    grad_ptr, grad_total_ptr, u_ptr, weight_ptr, taps_ptr, documents_ptr, grad_u_ptr, partial_ptr, N, T, D,
    dilation, eps, tiles,
    TAPS: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        real = rows < N
        normed_grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        for j in range(TAPS):
            ahead = (TAPS - 1 - j) * dilation
            seen = _seen(rows, rows + ahead, real, rows % T + ahead, T, documents_ptr, DOCUMENTS)
            tap = tl.load(taps_ptr + j * D + cols, mask=cols < D, other=0.0).to(tl.float32)
            there = seen[:, None] & (cols < D)[None, :]
            grad = tl.load(
                grad_total_ptr + (rows + ahead)[:, None] * D + cols[None, :], mask=there, other=0.0
            )
            normed_grad += grad.to(tl.float32) * tap[None, :]
        at = rows[:, None] * D + cols[None, :]
        inside = real[:, None] & (cols < D)[None, :]
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(u * u, 1) / D + eps)[:, None]
        u *= scale
        grad_weight += normed_grad * u
        normed_grad *= weight[None, :]
        grad_u = (normed_grad - u * (tl.sum(normed_grad * u, 1) / D)[:, None]) * scale
        grad_u += tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program.to(tl.int64) * D + cols, tl.sum(grad_weight, 0), mask=cols < D)


def _forward(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    out = torch.empty_like(u_BTD)
    B, T, D = u_BTD.shape
    tile, warps = row_tile(D)
    launch(
        _forward_kernel, (ceil_div(B * T, tile["BLOCK_N"]),), u_BTD, weight_D, kernel_JD, documents_BT, out,
        B * T, T, D, dilation, eps, constants={"TAPS": len(kernel_JD),
        "DOCUMENTS": documents_BT is not None, **tile},
        num_warps=warps,
    )  # fmt: skip
    return out


def _backward(
    grad: Tensor,
    u_BTD: Tensor,
    weight_D: Tensor,
    kernel_JD: Tensor,
    documents_BT: Tensor | None,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = u_BTD.shape
    taps = len(kernel_JD)
    tile, warps = row_tile(D, elements=1024)
    warps = min(16, 2 * warps)
    programs, tiles = partials(ceil_div(B * T, tile["BLOCK_N"]))
    grad_total, grad_u = torch.empty_like(u_BTD), torch.empty_like(u_BTD)
    partial_taps = u_BTD.new_empty(programs, taps, D, dtype=torch.float32)
    partial_weight = u_BTD.new_empty(programs, D, dtype=torch.float32)
    shared = (u_BTD, weight_D, kernel_JD, documents_BT)
    constants = {"TAPS": taps, "DOCUMENTS": documents_BT is not None, **tile}
    launch(
        _taps_kernel, (programs,), grad, *shared, grad_total, partial_taps, B * T, T, D, dilation, eps, tiles,
        constants=constants | {"BLOCK_J": triton.next_power_of_2(taps)}, num_warps=warps,
    )  # fmt: skip
    launch(
        _input_kernel, (programs,), grad, grad_total, *shared, grad_u, partial_weight, B * T, T, D,
        dilation, eps, tiles,
        constants=constants, num_warps=warps,
    )  # fmt: skip
    return grad_u, partial_weight.sum(0).to(weight_D.dtype), partial_taps.sum(0).to(kernel_JD.dtype)


_op = custom_op("hybridtrain::short_conv", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::short_conv_backward", _backward, mutates_args=())


@_op.register_fake
def _(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    return torch.empty_like(u_BTD)


@_op_backward.register_fake
def _(
    grad: Tensor,
    u_BTD: Tensor,
    weight_D: Tensor,
    kernel_JD: Tensor,
    documents_BT: Tensor | None,
    dilation: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(u_BTD), torch.empty_like(weight_D), torch.empty_like(kernel_JD)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _op_backward(grad.contiguous(), *ctx.saved_tensors, ctx.dilation, ctx.eps)
    return *gradients, None, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def short_conv(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    """SiLU(conv(RMSNorm(u))) + u, [B, T, D]; documents_BT int numbers the documents, None: one a sequence."""
    documents_BT = None if documents_BT is None else documents_BT.contiguous()
    out: Tensor = _op(u_BTD.contiguous(), weight_D, kernel_JD.contiguous(), documents_BT, dilation, eps)
    return out


def cases() -> Iterator[Case]:
    """Four taps, three apart, over packed documents at a width of 4096."""
    u = torch.empty(4, 4096, 4096, dtype=torch.bfloat16, device="meta")
    weight, taps, documents = u.new_empty(4096), u.new_empty(4, 4096), u.new_empty(4, 4096, dtype=torch.int64)
    shape, size = "B=4 T=4096 D=4096 J=4", num_bytes(u)
    yield Case(
        "short_conv", f"forward {shape}", lambda: _forward(u, weight, taps, documents, 3, 1e-6), 2 * size
    )
    yield Case(
        "short_conv", f"backward {shape}", lambda: _backward(u, u, weight, taps, documents, 3, 1e-6), 3 * size
    )
