"""RMSNorm: torch's fused kernel on CUDA unless another is chosen; on the CPU, where torch composes it of many
passes, a hand-written gradient.

D width of the last dimension, N all others. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalised over the last dimension and scaled by `weight` [D]."""
    match chosen("rms_norm", x):
        case "triton":
            from hybridtrain.kernels.rms_norm.kernel import rms_norm as fused

            return fused(x, weight, eps)
        case "liger":
            from liger_kernel.transformers.functional import liger_rms_norm

            out: Tensor = liger_rms_norm(x, weight, eps, in_place=False)
            return out
        case "apex":
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            out = fused_rms_norm_affine(x, weight, weight.shape, eps)
            return out
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not hasattr(x, "to_local"):
        return _rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        )
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
