"""The definition of the summed cross-entropy. N tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor


def cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor, ignored: int) -> Tensor:
    """Sum of -log softmax(logits)[target] in nats over the tokens whose target is not `ignored`."""
    keep_N = targets_N != ignored
    return -logits_NV[keep_N].log_softmax(-1).gather(1, targets_N[keep_N, None]).sum()
