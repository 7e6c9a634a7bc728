"""Grouped matrix products on tensor cores in Triton, and the grouped SwiGLU made of them; the maths is in
README.md.

P rows sorted by expert, E experts, K and N the widths of a product. Which expert a tile of rows belongs to is
found on the device, so nothing waits for the counts; the grid is as large as the counts could ask for, and
tiles too many end at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes
from hybridtrain.kernels.swiglu.kernel import swiglu


@triton.jit
def _product_kernel(
    a_ptr, w_ptr, counts_ptr, a_scale_ptr, w_scale_ptr, out_ptr, E, K, N, stride_e, stride_k, stride_n,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[rows of e] = a[rows of e] @ w[e], one tile of one expert's rows; FP8 operands have a scale a row
    and a column.
    """
    tile = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert >= E:
        return
    own = experts == expert
    tile -= tl.sum(tl.where(own, tile_ends - tiles, 0), 0)
    first = tl.sum(tl.where(own, tl.cumsum(counts, 0) - counts, 0), 0) + tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    real = rows < tl.sum(tl.where(experts <= expert, counts, 0), 0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_at = a_ptr + rows[:, None] * K + depth[None, :]
    w_at = w_ptr + expert.to(tl.int64) * stride_e + depth[:, None] * stride_k + cols[None, :] * stride_n
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = depth < K - start
        a = tl.load(a_at, mask=real[:, None] & left[None, :], other=0.0)
        w = tl.load(w_at, mask=left[:, None] & (cols < N)[None, :], other=0.0)
        if (
            PRECISION == "fp8"
        ):  # Hopper's tensor cores add FP8 products up in fewer bits than float32's; over one tile only
            total = tl.dot(a, w, total, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(a, w, total, input_precision=PRECISION)
        a_at += BLOCK_K
        w_at += BLOCK_K * stride_k
    if PRECISION == "fp8":
        total *= tl.load(a_scale_ptr + rows, mask=real, other=0.0)[:, None]
        total *= tl.load(w_scale_ptr + expert.to(tl.int64) * N + cols, mask=cols < N, other=0.0)[None, :]
    out_at = out_ptr + rows[:, None] * N + cols[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & (cols < N)[None, :])


@triton.jit
def _weight_kernel(
    a_ptr, grad_ptr, counts_ptr, out_ptr, E, K, N, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = a[rows of e]^T @ grad[rows of e]: a tile [BLOCK_M, BLOCK_N] of [K, N], BLOCK_K rows at a time,
    in order.
    """
    expert = tl.program_id(1)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    count = tl.sum(tl.where(experts == expert, counts, 0), 0)
    first = tl.sum(tl.where(experts < expert, counts, 0), 0)
    across = tl.cdiv(N, BLOCK_N)
    ks = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_K)
    a_at = a_ptr + (first + rows)[None, :] * K + ks[:, None]
    grad_at = grad_ptr + (first + rows)[:, None] * N + ns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, count, BLOCK_K):
        real = rows < count - start
        a = tl.load(a_at, mask=real[None, :] & (ks < K)[:, None], other=0.0)
        grad = tl.load(grad_at, mask=real[:, None] & (ns < N)[None, :], other=0.0)
        total = tl.dot(a, grad, total, input_precision=PRECISION)
        a_at += BLOCK_K * K
        grad_at += BLOCK_K * N
    out_at = out_ptr + expert.to(tl.int64) * K * N + ks[:, None] * N + ns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(ks < K)[:, None] & (ns < N)[None, :])


def _options(P: int, E: int, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """(constants, warps, stages): smaller tiles where an expert's rows would not fill the large ones.

    float32 is multiplied in three tf32 products, which keeps its accuracy on tensor cores; AMD's multiply it
    as it is.
    """
    small = P < 96 * E
    half = dtype.itemsize <= 2
    constants = {
        "PRECISION": "fp8"
        if dtype == torch.float8_e4m3fn
        else "ieee"
        if half or torch.version.hip
        else "tf32x3",
        "BLOCK_E": triton.next_power_of_2(E),
        "BLOCK_M": 64 if small or not half else 128,
        "BLOCK_N": 128 if half else 64,
        "BLOCK_K": 128 // dtype.itemsize,
    }
    return constants, 4 if small or not half else 8, 3


def launch_product(
    a_PK: Tensor, w_EKN: Tensor, counts_E: Tensor, scales: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """a @ w of each row's expert in `dtype`; `scales` [P] and [E, N] are those of FP8 operands."""
    P, (E, K, N) = len(a_PK), w_EKN.shape
    out = a_PK.new_empty(P, N, dtype=dtype)
    constants, warps, stages = _options(P, E, a_PK.dtype)
    tiles = ceil_div(P, constants["BLOCK_M"]) + E if P else 0
    launch(
        _product_kernel, (tiles, ceil_div(N, constants["BLOCK_N"])), a_PK, w_EKN, counts_E,
        *(scales or (None, None)), out,
        E, K, N, *w_EKN.stride(), constants=constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _product(a_PK: Tensor, w_EKN: Tensor, counts_E: Tensor, transposed: bool) -> Tensor:
    """a @ w of each row's expert; transposed: w is [E, N, K]."""
    return launch_product(a_PK, w_EKN.transpose(1, 2) if transposed else w_EKN, counts_E, None, a_PK.dtype)


def _weight(a_PK: Tensor, grad_PN: Tensor, counts_E: Tensor) -> Tensor:
    """[E, K, N]: a^T @ grad of each expert's rows; zero without any."""
    (P, K), N, E = a_PK.shape, grad_PN.size(1), len(counts_E)
    out = a_PK.new_empty(E, K, N)
    constants, warps, stages = _options(P, E, a_PK.dtype)
    grid = (ceil_div(K, constants["BLOCK_M"]) * ceil_div(N, constants["BLOCK_N"]), E)
    launch(
        _weight_kernel, grid, a_PK, grad_PN, counts_E, out, E, K, N, constants=constants, num_warps=warps,
        num_stages=stages
    )  # fmt: skip
    return out


_op = custom_op("hybridtrain::grouped_product", _product, mutates_args=())
weight_gradient = custom_op("hybridtrain::grouped_weight_gradient", _weight, mutates_args=())


@_op.register_fake
def _(a_PK: Tensor, w_EKN: Tensor, counts_E: Tensor, transposed: bool) -> Tensor:
    return a_PK.new_empty(a_PK.size(0), w_EKN.size(1 if transposed else 2))


@weight_gradient.register_fake
def _(a_PK: Tensor, grad_PN: Tensor, counts_E: Tensor) -> Tensor:
    return a_PK.new_empty(counts_E.size(0), a_PK.size(1), grad_PN.size(1))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, w, counts = ctx.saved_tensors
    grad = grad.contiguous()
    pair = (grad, a) if ctx.transposed else (a, grad)
    return _op(grad, w, counts, not ctx.transposed), weight_gradient(*pair, counts), None, None


_op.register_autograd(_gradients, setup_context=_setup)


def grouped_product(a_PK: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """The first counts[0] rows times w[0], the next counts[1] times w[1], and so on: [P, N]; `counts_E` int64
    sums to P.
    """
    out: Tensor = _op(a_PK.contiguous(), w_EKN.contiguous(), counts_E, False)
    return out


def grouped_swiglu(
    x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor
) -> Tensor:
    """As op.grouped_swiglu, for widths of any size."""
    hidden_PF = swiglu(grouped_product(x_PD, w_gate_EDF, counts_E), grouped_product(x_PD, w_up_EDF, counts_E))
    return grouped_product(hidden_PF, w_down_EFD, counts_E)


def cases() -> Iterator[Case]:
    """64 experts of width 1408 at a model width of 2048: full groups, and few rows a group; then float32."""
    E, D, F = 64, 2048, 1408
    for P, dtype in ((65536, torch.bfloat16), (2048, torch.bfloat16), (65536, torch.float32)):
        x, counts = (
            torch.empty(P, D, dtype=dtype, device="meta"),
            torch.empty(E, dtype=torch.int64, device="meta"),
        )
        w, grad = x.new_empty(E, D, F), x.new_empty(P, F)
        shape, least, flops = (
            f"P={P} E={E} D={D} F={F} {str(dtype).removeprefix('torch.')}",
            num_bytes(x, w, grad),
            2 * P * D * F,
        )
        ways: dict[str, Callable[[], object]] = {
            "product": partial(_product, x, w, counts, False),
            "input gradient": partial(_product, grad, w, counts, True),
            "weight gradient": partial(_weight, x, grad, counts),
        }
        for name, run in ways.items():
            yield Case("grouped_mlp", f"{name} {shape}", run, least, flops, "matrix", bits=8 * dtype.itemsize)
