"""Head and summed cross-entropy: on the CPU block by block of tokens, forward and gradient together, so that
logits stay in cache and memory holds one block of them; elsewhere the product followed by the cross-entropy
op.

N tokens, D width, V vocabulary, M tokens of a block. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.cross_entropy.op import CROSS_ENTROPY, cross_entropy_sum

BLOCK_ELEMENTS = 1 << 19  # logits per block: 2 MiB of float32
MIN_ROWS = 64  # fewer would starve the products of large vocabularies


def linear_cross_entropy_sum(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, backends: Backends = TORCH
) -> Tensor:
    """Float32 scalar, in nats; tokens whose target is `ignored` do not count."""
    plain = not hasattr(weight_VD, "to_local") and not hasattr(h_ND, "to_local")
    if plain and backends.of(CROSS_ENTROPY, h_ND) == "triton":
        from hybridtrain.kernels.cross_entropy.kernel import linear_cross_entropy_sum as fused

        return fused(h_ND, weight_VD.to(h_ND.dtype), targets_N, ignored)
    if plain and h_ND.device.type == "cpu" and h_ND.dtype == weight_VD.dtype == torch.float32:
        with_grad = torch.is_grad_enabled() and (h_ND.requires_grad or weight_VD.requires_grad)
        return _linear_cross_entropy(h_ND, weight_VD, targets_N, ignored, with_grad)
    return cross_entropy_sum(F.linear(h_ND, weight_VD), targets_N, ignored, backends)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, with_grad: bool
    ) -> Tensor:
        rows = max(MIN_ROWS, BLOCK_ELEMENTS // len(weight_VD))
        keep_N1 = (targets_N != ignored)[:, None]
        index_N1 = targets_N[:, None].where(keep_N1, 0)
        loss = h_ND.new_zeros(())
        buffer_MV = h_ND.new_empty(min(rows, len(h_ND)), len(weight_VD))
        grad_h, grad_weight = torch.empty_like(h_ND), torch.zeros_like(weight_VD)
        for start in range(0, len(h_ND), rows):
            block = slice(start, start + rows)
            h, keep, index = h_ND[block], keep_N1[block], index_N1[block]
            logits = torch.mm(h, weight_VD.t(), out=buffer_MV[: len(h)])
            highest, picked = logits.amax(-1, keepdim=True), logits.gather(1, index)
            softmax = torch.softmax(logits, -1, out=logits)
            # The greatest probability is at least 1/V, so its logarithm is exact where a target's could
            # underflow.
            loss += (highest - softmax.amax(-1, keepdim=True).log_() - picked).mul_(keep).sum()
            if with_grad:
                softmax.scatter_add_(1, index, softmax.new_full((1, 1), -1.0).expand_as(index))
                torch.mm(softmax, weight_VD, out=grad_h[block]).mul_(keep)
                grad_weight.addmm_(softmax.t(), h * keep)
        ctx.save_for_backward(grad_h, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_h, grad_weight = ctx.saved_tensors
        return grad_h * grad, grad_weight * grad, None, None, None


_linear_cross_entropy: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor] = _LinearCrossEntropy.apply
