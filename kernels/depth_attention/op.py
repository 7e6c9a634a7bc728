"""Attention over depth, and its merge with any other attention of the same queries under one softmax.

N tokens, H query heads, G key/value heads, S depth slots, C head width. See reference.py for the definition.
"""

from __future__ import annotations

from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.depth_attention.reference import merge

DEPTH_ATTENTION = Op(
    "depth_attention", "torch, scores in float32", sources=("depth_attention.kernel",), has_key=False
)

__all__ = ["DEPTH_ATTENTION", "depth_attention", "merge"]


def depth_attention(
    q_NHC: Tensor, k_NSGC: Tensor, v_NSGC: Tensor, scale: float, backends: Backends = TORCH
) -> tuple[Tensor, Tensor]:
    """(output [N, H, C], float32 log-sum-exp [N, H]), both with gradients, so that `merge` may follow.

    Keys and values may be a slice of a preallocated buffer, slots and heads any distance apart. Raises
    ValueError where shapes do not fit.
    """
    N, H, C = q_NHC.shape
    if (
        k_NSGC.shape != v_NSGC.shape
        or k_NSGC.shape[::3] != (N, C)
        or not k_NSGC.size(1)
        or H % k_NSGC.size(2)
    ):
        raise ValueError(
            f"q {list(q_NHC.shape)}, k {list(k_NSGC.shape)} and v {list(v_NSGC.shape)} must be [N, H, C] and "
            "twice [N, S, G, C] with S at least 1 and H a multiple of G"
        )
    if backends.of(DEPTH_ATTENTION, q_NHC) == "triton":
        from hybridtrain.kernels.depth_attention.kernel import depth_attention as fused

        return fused(q_NHC, k_NSGC, v_NSGC, scale)
    grouped_NGRC = q_NHC.unflatten(1, (k_NSGC.size(2), -1)) * scale
    k_NGCS, v_NGSC = k_NSGC.permute(0, 2, 3, 1), v_NSGC.transpose(1, 2)
    scores_NGRS = (grouped_NGRC @ k_NGCS).float()
    out_NGRC = scores_NGRS.softmax(-1).to(v_NSGC.dtype) @ v_NGSC
    return out_NGRC.flatten(1, 2), scores_NGRS.logsumexp(-1).flatten(1, 2)
