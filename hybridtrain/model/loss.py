"""The training loss, from logits or from the hidden state. B batch, T tokens, D model width, V vocabulary."""

from __future__ import annotations

from torch import Tensor

from hybridtrain.kernels.cross_entropy.op import cross_entropy_sum
from hybridtrain.kernels.linear_cross_entropy.op import linear_cross_entropy_sum

IGNORED = -100


def token_losses_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, float32 scalar; targets of -100 do not count."""
    return cross_entropy_sum(logits_BTV.flatten(0, -2), targets_BT.flatten(), IGNORED)


def head_losses_sum(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    """`token_losses_sum` of the logits h @ weight^T, which are never held all at once on the CPU."""
    return linear_cross_entropy_sum(h_BTD.flatten(0, -2), weight_VD, targets_BT.flatten(), IGNORED)
