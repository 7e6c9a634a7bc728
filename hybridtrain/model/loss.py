"""The training loss. N tokens, V vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def token_losses_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, float32 scalar; targets of -100 do not count."""
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
