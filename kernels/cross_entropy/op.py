"""Summed cross-entropy: torch's kernel on CUDA; on the CPU one pass in cache-sized blocks that makes the
gradient too.

N tokens, V vocabulary. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op

CROSS_ENTROPY = Op(
    "cross_entropy",
    "blocked over tokens, own backward",
    torch_on_gpu="torch product, then cross_entropy",
    sources=("cross_entropy.kernel",),
)

BLOCK_ELEMENTS = 1 << 18  # logits per block: 1 MiB of float32 stays in the second-level cache


def cross_entropy_sum(
    logits_NV: Tensor, targets_N: Tensor, ignored: int, backends: Backends = TORCH
) -> Tensor:
    """Float32 scalar, in nats; tokens whose target is `ignored` do not count.

    On the CPU its backward runs once: it hands out the buffer that the forward pass made.
    """
    if backends.of(CROSS_ENTROPY, logits_NV) == "triton":
        from hybridtrain.kernels.cross_entropy.kernel import cross_entropy_sum as fused

        return fused(logits_NV, targets_N, ignored)
    logits_NV = logits_NV.float()
    if logits_NV.device.type == "cpu" and not hasattr(logits_NV, "to_local"):
        return _cross_entropy(
            logits_NV, targets_N, ignored, torch.is_grad_enabled() and logits_NV.requires_grad
        )
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignored, reduction="sum")


def partial_sums(
    logits_NW: Tensor, targets_N: Tensor, first: int, backends: Backends = TORCH
) -> tuple[Tensor, Tensor, Tensor]:
    """What the entries `first` to first+W-1 of a vocabulary add to the loss, float32 [N]: (m, s, picked).

    Their log-sum-exp is m + log s, and m no less than the greatest logit less log W; `picked` is the target's
    logit, 0 where the target is not among them.
    """
    if backends.of(CROSS_ENTROPY, logits_NW) == "triton":
        from hybridtrain.kernels.cross_entropy.kernel import partial

        lse_N, picked_N = partial(logits_NW, targets_N, first)
        return lse_N, torch.ones_like(lse_N), picked_N
    logits_NW = logits_NW.float()
    index_N, inside_N = _places(targets_N, first, logits_NW.size(1))
    highest_N = logits_NW.amax(-1)
    summed_N = logits_NW.sub(highest_N[:, None]).exp_().sum(-1)
    return highest_N, summed_N, logits_NW.gather(1, index_N[:, None])[:, 0] * inside_N


def partial_gradient(
    logits_NW: Tensor,
    targets_N: Tensor,
    first: int,
    normalizer_N: Tensor,
    scale_N: Tensor,
    backends: Backends = TORCH,
) -> Tensor:
    """scale * (softmax - [column = target]) of those entries [N, W], in the dtype of the logits; may
    overwrite the logits.

    `normalizer_N` is the log-sum-exp over the whole vocabulary.
    """
    if backends.of(CROSS_ENTROPY, logits_NW) == "triton":
        from hybridtrain.kernels.cross_entropy.kernel import gradient

        grad_NW: Tensor = gradient(scale_N, -scale_N, logits_NW, targets_N, normalizer_N, first)
        return grad_NW
    index_N, inside_N = _places(targets_N, first, logits_NW.size(1))
    softmax_NW = logits_NW.float().sub_(normalizer_N[:, None]).exp_()
    softmax_NW.scatter_add_(1, index_N[:, None], -inside_N[:, None].to(softmax_NW))
    return softmax_NW.mul_(scale_N[:, None]).to(logits_NW.dtype)


def wide_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b [M, N] as it is added up, in float32 of bfloat16 operands: a sum over blocks would carry every
    block's rounding.
    """
    wide = torch.promote_types(a_MK.dtype, torch.float32)
    if a_MK.is_cuda and a_MK.dtype != wide:
        return torch.mm(a_MK, b_KN, out_dtype=wide)
    return a_MK.to(wide) @ b_KN.to(wide)


def _places(targets_N: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(column of the target, or 0; whether it is here)."""
    local_N = targets_N - first
    inside_N = (local_N >= 0) & (local_N < width)
    return local_N.where(inside_N, 0), inside_N


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, ignored: int, with_grad: bool) -> Tensor:
        rows = max(1, BLOCK_ELEMENTS // logits_NV.size(1))
        normalizer_N1 = logits_NV.new_empty(len(logits_NV), 1)
        grad_NV = torch.empty_like(logits_NV) if with_grad else None
        for start in range(0, len(logits_NV), rows):
            block = logits_NV[start : start + rows]
            if grad_NV is None:
                normalizer_N1[start : start + rows] = block.logsumexp(-1, keepdim=True)
            else:
                softmax = torch.softmax(block, -1, out=grad_NV[start : start + rows])
                # The greatest probability is at least 1/V, so its logarithm is exact where a target's could
                # underflow.
                highest = block.amax(-1, keepdim=True)
                normalizer_N1[start : start + rows] = highest - softmax.amax(-1, keepdim=True).log_()
        keep_N1 = (targets_N != ignored)[:, None]
        index_N1 = targets_N[:, None].where(keep_N1, 0)
        if grad_NV is not None:
            grad_NV.scatter_add_(1, index_N1, grad_NV.new_full((1, 1), -1.0).expand_as(index_N1))
        ctx.buffers = grad_NV, keep_N1
        return (normalizer_N1 - logits_NV.gather(1, index_N1)).mul_(keep_N1).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.buffers is None:
            raise RuntimeError(
                "the backward pass of cross_entropy_sum runs once; its buffer has been handed out"
            )
        (grad_NV, keep_N1), ctx.buffers = ctx.buffers, None
        return grad_NV.mul_(grad * keep_N1), None, None, None


_cross_entropy: Callable[[Tensor, Tensor, int, bool], Tensor] = _CrossEntropy.apply
