"""Rotary positions and the RMSNorm before them, in one pass each way; the maths is in README.md.

N = B*T*H heads, C head width, R = C/2 pairs. The scale of the norm is computed again in the backward pass:
the row is there anyway.
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
def _turn(x, rotation, SIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Neighbours times (cos + SIGN i sin)."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_N, BLOCK_D // 2, 2]))
    cos, sin = tl.split(tl.reshape(rotation, [BLOCK_N, BLOCK_D // 2, 2]))
    sin *= SIGN
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_N, BLOCK_D])


@triton.jit
def _forward_kernel(
    x_ptr, rotation_ptr, weight_ptr, out_ptr, N, T, H, C, eps,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None] * weight[None, :]
    turn_at = ((rows // H) % T)[:, None] * C + cols[None, :]
    out = _turn(x, tl.load(rotation_ptr + turn_at, mask=inside, other=0.0), 1.0, BLOCK_N, BLOCK_D)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, rotation_ptr, weight_ptr, grad_x_ptr, partial_ptr, N, T, H, C, eps, tiles,
    NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    if NORM:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        grad_weight = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        turn_at = ((rows // H) % T)[:, None] * C + cols[None, :]
        rotation = tl.load(rotation_ptr + turn_at, mask=inside, other=0.0)
        grad = _turn(
            tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32), rotation, -1.0, BLOCK_N, BLOCK_D
        )
        if NORM:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
            grad_weight += grad * x * scale
            grad *= weight[None, :]
            grad = (grad - x * scale * scale * (tl.sum(grad * x, 1) / C)[:, None]) * scale
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(partial_ptr + program.to(tl.int64) * C + cols, tl.sum(grad_weight, 0), mask=cols < C)


def _sizes(x_BTHC: Tensor) -> tuple[int, int, int, int]:
    """(heads of all tokens, T, H, C)."""
    _, T, H, C = x_BTHC.shape
    return x_BTHC.numel() // max(C, 1), T, H, C


def _forward(x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x_BTHC)
    N, T, H, C = _sizes(x_BTHC)
    tile, warps = row_tile(C)
    launch(
        _forward_kernel, (ceil_div(N, tile["BLOCK_N"]),), x_BTHC, rotation_TC, weight_C, out, N, T, H, C, eps,
        constants={"NORM": weight_C is not None, **tile}, num_warps=warps,
    )  # fmt: skip
    return out


def _backward(
    grad: Tensor, x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x_BTHC)
    N, T, H, C = _sizes(x_BTHC)
    tile, warps = row_tile(C)
    programs, tiles = partials(ceil_div(N, tile["BLOCK_N"]))
    partial = x_BTHC.new_empty(programs if weight_C is not None else 0, C, dtype=torch.float32)
    launch(
        _backward_kernel, (programs,), grad, x_BTHC if weight_C is not None else None, rotation_TC,
        weight_C, grad_x, partial,
        N, T, H, C, eps, tiles, constants={"NORM": weight_C is not None, **tile}, num_warps=warps,
    )  # fmt: skip
    if weight_C is None:
        return grad_x, x_BTHC.new_empty(0)
    return grad_x, partial.sum(0).to(weight_C.dtype)


_op = custom_op("hybridtrain::rope", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::rope_backward", _backward, mutates_args=())


@_op.register_fake
def _(x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x_BTHC)


@_op_backward.register_fake
def _(
    grad: Tensor, x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_BTHC), x_BTHC.new_empty(0) if weight_C is None else torch.empty_like(weight_C)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_BTHC, rotation_TC, weight_C, ctx.eps = inputs
    ctx.norm = weight_C is not None
    ctx.save_for_backward(x_BTHC, rotation_TC, weight_C)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = _op_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return grad_x, None, grad_weight if ctx.norm else None, None


_op.register_autograd(_gradients, setup_context=_setup)


def rope(x_BTHC: Tensor, rotation_TC: Tensor, weight_C: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Each head normalised with `weight_C` where it is given, then turned by its position, in the dtype of x.

    rotation_TC float32: cosine and sine of angle r at 2r and 2r + 1; no gradient goes to it. Raises
    ValueError for odd C.
    """
    if x_BTHC.size(-1) % 2 or rotation_TC.shape != (x_BTHC.size(1), x_BTHC.size(-1)):
        raise ValueError(
            f"x {list(x_BTHC.shape)} and rotation {list(rotation_TC.shape)} must be [B, T, H, C] and [T, C], "
            "C even"
        )
    out: Tensor = _op(x_BTHC.contiguous(), rotation_TC.contiguous(), weight_C, eps)
    return out


def cases() -> Iterator[Case]:
    """Queries of a layer: 4 x 4096 tokens, 32 heads of 128."""
    x = torch.empty(4, 4096, 32, 128, dtype=torch.bfloat16, device="meta")
    rotation, weight = x.new_empty(4096, 128, dtype=torch.float32), x.new_empty(128)
    shape = "B=4 T=4096 H=32 C=128"
    size, extra = num_bytes(x), num_bytes(rotation)
    yield Case(
        "rope", f"forward, normed {shape}", lambda: _forward(x, rotation, weight, 1e-6), 2 * size + extra
    )
    yield Case(
        "rope", f"backward, normed {shape}", lambda: _backward(x, x, rotation, weight, 1e-6), 3 * size + extra
    )
    yield Case(
        "rope", f"backward, plain {shape}", lambda: _backward(x, x, rotation, None, 1e-6), 2 * size + extra
    )
