"""RMSNorm, and rotary positions after an optional RMSNorm of each head.

On CUDA the norm is torch's fused kernel unless another is chosen; on the CPU, where torch composes it of many
passes, it has a hand-written gradient. The rotation is one complex product.

D width of the last dimension, N all others; B batch, T tokens, H heads, C head width, R = C/2 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op

RMS_NORM = Op(
    "rms_norm",
    "torch, own backward",
    ("torch", "triton", "liger", "apex"),
    on_gpu="torch",  # fused there
    torch_on_gpu="torch rms_norm",
    sources=("norms.rms_norm_kernel",),
)
ROPE = Op("rope", "torch complex product", sources=("norms.rope_kernel",))


def rms_norm(x: Tensor, weight: Tensor, eps: float, backends: Backends = TORCH) -> Tensor:
    """Normalised over the last dimension and scaled by `weight` [D]."""
    how = backends.of(RMS_NORM, x)
    if how == "triton":
        from hybridtrain.kernels.norms.rms_norm_kernel import rms_norm as fused

        return fused(x, weight, eps)
    if how != "torch":
        from hybridtrain.kernels.libraries import RMS_NORMS

        return RMS_NORMS[how](x, weight, eps)
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not hasattr(x, "to_local"):
        return _rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def rope(
    x_BTHC: Tensor,
    rotation_TR: Tensor,
    weight_C: Tensor | None = None,
    eps: float = 0.0,
    backends: Backends = TORCH,
) -> Tensor:
    """Neighbours (2r, 2r + 1) of every head times the complex rotation_TR of their position; float32 inside.

    With a weight, every head goes through an RMSNorm before. Neighbours, as in the RoPE paper, and not (r, r
    + C/2): one complex product each way is a quarter of the time.
    """
    if backends.of(ROPE, x_BTHC) == "triton":
        from hybridtrain.kernels.norms.rope_kernel import rope as fused

        return fused(x_BTHC, torch.view_as_real(rotation_TR).flatten(1), weight_C, eps)
    if weight_C is not None:
        x_BTHC = rms_norm(x_BTHC, weight_C, eps, backends)
    complex_BTHR = torch.view_as_complex(x_BTHC.float().view(*x_BTHC.shape[:-1], -1, 2))
    rotation_THR = rotation_TR[:, None]
    if x_BTHC.device.type == "cpu":  # one long inner loop
        rotation_THR = rotation_THR.expand(complex_BTHR.shape[1:]).contiguous()
    return torch.view_as_real(complex_BTHR * rotation_THR).flatten(-2).to(x_BTHC.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (x * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product_ND = (grad * x).flatten(0, -2)
        grad_weight = torch.mv(product_ND.t(), scale.flatten())
        along = torch.mv(product_ND, weight).view_as(scale).mul_(scale.pow(3)).div_(-x.size(-1))
        return (grad * weight).mul_(scale).addcmul_(x, along), grad_weight, None


_rms_norm: Callable[[Tensor, Tensor, float], Tensor] = _RMSNorm.apply
