"""The definition of the head with its summed cross-entropy. N tokens, D width, V vocabulary."""

from __future__ import annotations

from torch import Tensor

from hybridtrain.kernels.cross_entropy.reference import cross_entropy_sum


def linear_cross_entropy_sum(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int) -> Tensor:
    """Sum of -log softmax(weight @ h)[target] in nats over the tokens whose target is not `ignored`."""
    return cross_entropy_sum(h_ND @ weight_VD.t(), targets_N, ignored)
