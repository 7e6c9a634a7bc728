"""The training loss. B batch, T tokens, V vocabulary."""

from __future__ import annotations

from torch import Tensor

from hybridtrain.kernels.cross_entropy.op import cross_entropy_sum

IGNORED = -100


def token_losses_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, float32 scalar; targets of -100 do not count."""
    return cross_entropy_sum(logits_BTV.flatten(0, -2), targets_BT.flatten(), IGNORED)
