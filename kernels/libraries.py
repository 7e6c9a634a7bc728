"""Operations as installed libraries have them fused: liger-kernel and apex."""

from __future__ import annotations

from torch import Tensor


def _liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    out: Tensor = liger_rms_norm(x, weight, eps, in_place=False)
    return out


def _apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    out: Tensor = fused_rms_norm_affine(x, weight, weight.shape, eps)
    return out


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from liger_kernel.transformers.functional import liger_swiglu as fused

    out: Tensor = fused(gate, up)
    return out


RMS_NORMS = {"liger": _liger_rms_norm, "apex": _apex_rms_norm}
"""By the word in `kernels.rms_norm`: (x, weight, eps) → x normalised over the last dimension, scaled."""
