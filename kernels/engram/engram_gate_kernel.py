"""The gate of an Engram layer in Triton: both norms, product, root, sigmoid and gated value in one pass each
way; the maths is in README.md.

N tokens, M branches of the hidden state, D width. Nothing is saved but the inputs and the gates. Sums over
tokens leave one partial row per program, which torch adds up: no atomics, one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, partials, row_tile


@triton.jit
def _forward_kernel(
    h_ptr, k_ptr, v_ptr, h_weight_ptr, k_weight_ptr, out_ptr, gate_ptr, N, M, D, eps, floor, root,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    branch = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    at = (rows * M + branch)[:, None] * D + cols[None, :]
    h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(h_weight_ptr + branch * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    weight *= tl.load(k_weight_ptr + branch * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    scales = tl.rsqrt(tl.sum(h * h, 1) / D + eps) * tl.rsqrt(tl.sum(k * k, 1) / D + eps)
    s = tl.sum(h * k * weight[None, :], 1) * scales * root
    size = tl.sqrt(tl.maximum(tl.abs(s), floor))
    gate = tl.sigmoid(tl.where(s < 0, -size, tl.where(s > 0, size, 0.0)))
    v = tl.load(v_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate[:, None] * v).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(gate_ptr + rows * M + branch, gate, mask=rows < N)


@triton.jit
def _backward_kernel(
    grad_ptr, h_ptr, k_ptr, v_ptr, h_weight_ptr, k_weight_ptr, gate_ptr, grad_h_ptr, grad_k_ptr, grad_v_ptr,
    partial_ptr,
    N, M, D, eps, floor, root, tiles, SINGLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program, branch = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(h_weight_ptr + branch * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    weight *= tl.load(k_weight_ptr + branch * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        at = (rows * M + branch)[:, None] * D + cols[None, :]
        v_at = rows[:, None] * D + cols[None, :]
        gate = tl.load(gate_ptr + rows * M + branch, mask=rows < N, other=0.5)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        slope = (
            tl.sum(grad * tl.load(v_ptr + v_at, mask=inside, other=0.0).to(tl.float32), 1)
            * gate
            * (1.0 - gate)
        )
        if SINGLE:
            tl.store(grad_v_ptr + v_at, (gate[:, None] * grad).to(grad_v_ptr.dtype.element_ty), mask=inside)
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h_scale, k_scale = tl.rsqrt(tl.sum(h * h, 1) / D + eps), tl.rsqrt(tl.sum(k * k, 1) / D + eps)
        s = tl.sum(h * k * weight[None, :], 1) * h_scale * k_scale * root
        size = tl.maximum(tl.abs(s), floor)
        slope = tl.where((tl.abs(s) >= floor) & (s != 0), slope * 0.5 / tl.sqrt(size), 0.0)
        along = slope * h_scale * k_scale * root
        total += along[:, None] * h * k
        grad_h = along[:, None] * weight[None, :] * k - (slope * s * h_scale * h_scale / D)[:, None] * h
        grad_k = along[:, None] * weight[None, :] * h - (slope * s * k_scale * k_scale / D)[:, None] * k
        tl.store(grad_h_ptr + at, grad_h.to(grad_h_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_k_ptr + at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + (program.to(tl.int64) * M + branch) * D + cols, tl.sum(total, 0), mask=cols < D)


@triton.jit
def _value_kernel(grad_ptr, gate_ptr, grad_v_ptr, N, M, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for branch in range(M):
        grad = tl.load(
            grad_ptr + (rows * M + branch)[:, None] * D + cols[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        total += tl.load(gate_ptr + rows * M + branch, mask=rows < N, other=0.0)[:, None] * grad
    tl.store(
        grad_v_ptr + rows[:, None] * D + cols[None, :], total.to(grad_v_ptr.dtype.element_ty), mask=inside
    )


def _forward(
    h_NMD: Tensor,
    k_NMD: Tensor,
    v_ND: Tensor,
    h_weight_MD: Tensor,
    k_weight_MD: Tensor,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    out, gate = torch.empty_like(h_NMD), h_NMD.new_empty(h_NMD.shape[:2], dtype=torch.float32)
    N, M, D = h_NMD.shape
    tile, warps = row_tile(D)
    launch(
        _forward_kernel, (ceil_div(N, tile["BLOCK_N"]), M), h_NMD, k_NMD, v_ND, h_weight_MD, k_weight_MD,
        out, gate,
        N, M, D, eps, floor, 1 / math.sqrt(D), constants=tile, num_warps=warps,
    )  # fmt: skip
    return out, gate


def _backward(
    grad: Tensor, h_NMD: Tensor, k_NMD: Tensor, v_ND: Tensor, h_weight_MD: Tensor, k_weight_MD: Tensor,
    gate_NM: Tensor,
    eps: float, floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of h, k, v, and the sum [M, D] that both weights' gradients are made of."""
    grad_h, grad_k, grad_v = torch.empty_like(h_NMD), torch.empty_like(k_NMD), torch.empty_like(v_ND)
    N, M, D = h_NMD.shape
    tile, warps = row_tile(D, elements=1024)
    programs, tiles = partials(ceil_div(N, tile["BLOCK_N"]))
    partial = h_NMD.new_empty(programs, M, D, dtype=torch.float32)
    launch(
        _backward_kernel, (programs, M), grad, h_NMD, k_NMD, v_ND, h_weight_MD, k_weight_MD, gate_NM,
        grad_h, grad_k, grad_v if M == 1 else None, partial, N, M, D, eps, floor, 1 / math.sqrt(D), tiles,
        constants={"SINGLE": M == 1, **tile}, num_warps=min(16, 2 * warps),
    )  # fmt: skip
    if M > 1:
        tile, warps = row_tile(D)
        launch(
            _value_kernel, (ceil_div(N, tile["BLOCK_N"]),), grad, gate_NM, grad_v, N, M, D, constants=tile,
            num_warps=warps
        )  # fmt: skip
    return grad_h, grad_k, grad_v, partial.sum(0)


_op = custom_op("hybridtrain::engram_gate", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::engram_gate_backward", _backward, mutates_args=())


@_op.register_fake
def _(
    h_NMD: Tensor,
    k_NMD: Tensor,
    v_ND: Tensor,
    h_weight_MD: Tensor,
    k_weight_MD: Tensor,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h_NMD), h_NMD.new_empty(h_NMD.shape[:2], dtype=torch.float32)


@_op_backward.register_fake
def _(
    grad: Tensor, h_NMD: Tensor, k_NMD: Tensor, v_ND: Tensor, h_weight_MD: Tensor, k_weight_MD: Tensor,
    gate_NM: Tensor,
    eps: float, floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total = h_NMD.new_empty(h_NMD.shape[1:], dtype=torch.float32)
    return torch.empty_like(h_NMD), torch.empty_like(k_NMD), torch.empty_like(v_ND), total


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.floor = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    h, k, v, h_weight, k_weight, gate = ctx.saved_tensors
    grad_h, grad_k, grad_v, total = _op_backward(
        grad.contiguous(), h, k, v, h_weight, k_weight, gate, ctx.eps, ctx.floor
    )
    grad_h_weight, grad_k_weight = (
        (total * k_weight).to(h_weight.dtype),
        (total * h_weight).to(k_weight.dtype),
    )
    return grad_h, grad_k, grad_v, grad_h_weight, grad_k_weight, None, None


_op.register_autograd(_gradients, setup_context=_setup)


def engram_gate(
    h_NMD: Tensor,
    k_NMD: Tensor,
    v_ND: Tensor,
    h_weight_MD: Tensor,
    k_weight_MD: Tensor,
    eps: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """(gated values [N, M, D], gates float32 [N, M] without gradient) of hidden states, keys and values not
    yet normed.

    Raises ValueError for shapes that do not fit.
    """
    N, M, D = h_NMD.shape
    if (
        k_NMD.shape != (N, M, D)
        or v_ND.shape != (N, D)
        or h_weight_MD.shape != (M, D)
        or k_weight_MD.shape != (M, D)
    ):
        shapes = [list(x.shape) for x in (h_NMD, k_NMD, v_ND, h_weight_MD, k_weight_MD)]
        raise ValueError(
            f"h, k, v and the weights are {shapes}, must be [N, M, D] twice, [N, D] and [M, D] twice"
        )
    tensors = (x.contiguous() for x in (h_NMD, k_NMD, v_ND, h_weight_MD, k_weight_MD))
    out: tuple[Tensor, Tensor] = _op(*tensors, eps, floor)
    return out


def of_any_shape(h: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """As op.engram_gate, with weights, eps and floor one after the other."""
    h_weight, k_weight, eps, floor = others
    weights = h_weight.view(-1, h.size(-1)), k_weight.view(-1, h.size(-1))
    branches = (-1, len(weights[0]), h.size(-1))
    flat = h.reshape(branches), k.reshape(branches), v.reshape(-1, h.size(-1))
    out, gate = engram_gate(*flat, *weights, eps, floor)
    return out.view(h.shape), gate.view(*h.shape[:-1], 1)


def cases() -> Iterator[Case]:
    """One branch and four, at a width of 4096."""
    for N, M in ((16384, 1), (8192, 4)):
        D = 4096
        h = torch.empty(N, M, D, dtype=torch.bfloat16, device="meta")
        v, weight, gate = h.new_empty(N, D), h.new_empty(M, D), h.new_empty(N, M, dtype=torch.float32)
        big, small = num_bytes(h), num_bytes(v)
        run = lambda h=h, v=v, w=weight: _forward(h, h, v, w, w, 1e-6, 1e-6)  # noqa: E731
        back = lambda h=h, v=v, w=weight, g=gate: _backward(h, h, h, v, w, w, g, 1e-6, 1e-6)  # noqa: E731
        yield Case("engram_gate", f"forward N={N} M={M} D={D}", run, 3 * big + small)
        yield Case("engram_gate", f"backward N={N} M={M} D={D}", back, 5 * big + 2 * small)
