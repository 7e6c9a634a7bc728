"""The grouped products with FP8 operands: rows in e4m3 with a scale each, products added up in float32; the
maths is in README.md.

Forward and input gradient are FP8, the weights' gradient stays in the dtype of the rows. P rows sorted by
expert, E experts, K and N the widths of a product, R rows and C columns of a matrix.
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

from hybridtrain.kernels.grouped_mlp.kernel import launch_product, weight_gradient
from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes
from hybridtrain.kernels.swiglu.kernel import swiglu

FP8 = torch.float8_e4m3fn


@triton.jit
def _quantise_kernel(
    x_ptr, out_ptr, scale_ptr, R, C, stride_e, stride_r, stride_c, MOST: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Rows of a matrix of a stack in FP8, each divided by its scale: its greatest magnitude is MOST, FP8's
    own.
    """
    matrix = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    x_at = x_ptr + matrix * stride_e + rows[:, None] * stride_r
    greatest = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = (rows < R)[:, None] & (start + cols < C)[None, :]
        x = tl.load(x_at + (start + cols)[None, :] * stride_c, mask=inside, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.abs(x))
    greatest = tl.max(greatest, 1)
    scale = tl.where(greatest > 0, greatest / MOST, 1.0)
    tl.store(scale_ptr + matrix * R + rows, scale, mask=rows < R)
    for start in range(0, C, BLOCK_C):
        inside = (rows < R)[:, None] & (start + cols < C)[None, :]
        x = tl.load(x_at + (start + cols)[None, :] * stride_c, mask=inside, other=0.0).to(tl.float32)
        out_at = out_ptr + (matrix * R + rows)[:, None] * C + (start + cols)[None, :]
        tl.store(out_at, tl.math.div_rn(x, scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def quantise(x_ERC: Tensor, columns: bool = False) -> tuple[Tensor, Tensor]:
    """The rows of each matrix, or its columns as rows, in FP8 [E, R, C], and the scales [E, R] they are to be
    multiplied by.
    """
    x_ERC = x_ERC.transpose(1, 2) if columns else x_ERC
    E, R, C = x_ERC.shape
    out, scale = x_ERC.new_empty(E, R, C, dtype=FP8), x_ERC.new_empty(E, R, dtype=torch.float32)
    block = {"BLOCK_R": 64, "BLOCK_C": 64} if columns else {"BLOCK_R": 4, "BLOCK_C": 512}
    launch(
        _quantise_kernel, (ceil_div(R, block["BLOCK_R"]), E), x_ERC, out, scale, R, C, *x_ERC.stride(),
        constants={"MOST": torch.finfo(FP8).max, **block}, traffic=2 * num_bytes(x_ERC) + num_bytes(out,
        scale),
    )  # fmt: skip
    return out, scale


def _quantise_rows(a_PK: Tensor) -> tuple[Tensor, Tensor]:
    """As bytes: opcheck cannot compare FP8."""
    out, scale = quantise(a_PK[None])
    return out[0].view(torch.uint8), scale[0]


def _product(a_PK: Tensor, a8_PK: Tensor, scale_P: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """`a8_PK` and `scale_P` are quantise_rows(a_PK), made once for several products."""
    w8_ENK, scale_EN = quantise(w_EKN, columns=True)
    return launch_product(a8_PK.view(FP8), w8_ENK.transpose(1, 2), counts_E, (scale_P, scale_EN), a_PK.dtype)


def _input_gradient(grad_PN: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    (grad8_PN, scale_P), (w8_EKN, scale_EK) = _quantise_rows(grad_PN), quantise(w_EKN)
    return launch_product(
        grad8_PN.view(FP8), w8_EKN.transpose(1, 2), counts_E, (scale_P, scale_EK), grad_PN.dtype
    )


_op_rows = custom_op("hybridtrain::quantise_rows", _quantise_rows, mutates_args=())
_op = custom_op("hybridtrain::grouped_product_fp8", _product, mutates_args=())
_op_backward = custom_op("hybridtrain::grouped_product_fp8_input_gradient", _input_gradient, mutates_args=())


@_op_rows.register_fake
def _(a_PK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a_PK, dtype=torch.uint8), a_PK.new_empty(a_PK.size(0), dtype=torch.float32)


@_op.register_fake
def _(a_PK: Tensor, a8_PK: Tensor, scale_P: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    return a_PK.new_empty(a_PK.size(0), w_EKN.size(2))


@_op_backward.register_fake
def _(grad_PN: Tensor, w_EKN: Tensor, counts_E: Tensor) -> Tensor:
    return grad_PN.new_empty(grad_PN.size(0), w_EKN.size(1))


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    a_PK, _, _, w_EKN, counts_E = inputs
    ctx.save_for_backward(a_PK, w_EKN, counts_E)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a_PK, w_EKN, counts_E = ctx.saved_tensors
    grad = grad.contiguous()
    return _op_backward(grad, w_EKN, counts_E), None, None, weight_gradient(a_PK, grad, counts_E), None


_op.register_autograd(_gradients, setup_context=_setup)


def grouped_swiglu(
    x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor
) -> Tensor:
    """As op.grouped_swiglu, for widths of any size; the error is bounded in README.md."""

    def products(a: Tensor, *weights: Tensor) -> list[Tensor]:
        a = a.contiguous()
        rows = _op_rows(a.detach())
        return [_op(a, *rows, w.contiguous(), counts_E) for w in weights]

    (down,) = products(swiglu(*products(x_PD, w_gate_EDF, w_up_EDF)), w_down_EFD)
    return down


def cases() -> Iterator[Case]:
    """As kernel.cases, and what makes the operands: rows of activations, and columns of weights."""
    E, D, F, targets = 64, 2048, 1408, ("sm_90", "sm_100")
    w, counts = (
        torch.empty(E, D, F, dtype=torch.bfloat16, device="meta"),
        torch.empty(E, dtype=torch.int64, device="meta"),
    )
    w8, scale = torch.empty(E, F, D, dtype=FP8, device="meta"), torch.empty(E, F, device="meta")
    for P in (65536, 2048):
        x8, scale_P = w8.new_empty(P, D), scale.new_empty(P)
        run = partial(launch_product, x8, w8.transpose(1, 2), counts, (scale_P, scale), torch.bfloat16)
        least = num_bytes(x8, w8, scale, scale_P) + 2 * P * F
        yield Case(
            "grouped_mlp",
            f"product P={P} E={E} D={D} F={F} fp8",
            run,
            least,
            2 * P * D * F,
            "matrix",
            targets,
            8,
        )
    x = w.new_empty(65536, D)
    yield Case(
        "grouped_mlp",
        f"rows to fp8 P=65536 D={D}",
        partial(_quantise_rows, x),
        num_bytes(x) * 3 // 2,
        targets=targets,
    )
    columns = partial(quantise, w, columns=True)
    yield Case(
        "grouped_mlp", f"columns to fp8 E={E} D={D} F={F}", columns, num_bytes(w) * 3 // 2, targets=targets
    )
