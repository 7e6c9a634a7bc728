"""The definition of the routing of tokens to experts. N tokens, E experts, K experts per token; float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """The chosen experts with their gates, and what balance and metrics are made of, summed over the tokens."""

    experts_NK: Tensor  # int64
    gates_NK: Tensor
    counts_E: Tensor  # int64, tokens of each expert
    shares_E: Tensor  # sum of the scores as shares of one
    z: Tensor  # sum of squared log-sum-exps
    entropy: Tensor  # sum of the shares' entropies, in nats; without gradient


def router_topk(logits_NE: Tensor, bias_E: Tensor, k: int, score: str, normalize: bool, scale: float) -> Routing:
    """Scores are a softmax or sigmoids of the logits; the bias shifts the selection and never the gates (arXiv 2408.15664)."""
    scores_NE = logits_NE.softmax(-1) if score == "softmax" else logits_NE.sigmoid()
    experts_NK = (scores_NE.detach() + bias_E).topk(k, -1).indices
    gates_NK = scores_NE.gather(1, experts_NK)
    if normalize:
        gates_NK = gates_NK / gates_NK.sum(-1, keepdim=True).clamp_min(1e-20)
    shares_NE = scores_NE if score == "softmax" else scores_NE / scores_NE.sum(-1, keepdim=True)
    return Routing(
        experts_NK,
        gates_NK * scale,
        torch.bincount(experts_NK.reshape(-1), minlength=logits_NE.size(1)),
        shares_NE.sum(0),
        logits_NE.logsumexp(-1).square().sum(),
        torch.special.entr(shares_NE.detach()).sum(),
    )
