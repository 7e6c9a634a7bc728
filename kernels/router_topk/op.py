"""The routing of tokens to experts: the definition itself, which on the CPU is a few passes over a small
matrix, or Triton in one pass. N tokens, E experts, K experts per token, G groups of experts; float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op

ROUTER_TOPK = Op("router_topk", "torch topk", sources=("router_topk.kernel",))


class Rule(NamedTuple):
    """How logits become experts and gates."""

    top_k: int
    score: str  # softmax or sigmoid
    normalize: bool  # the gates of a token sum to one,
    scale: float  # times this
    num_groups: int = 1  # equal groups of neighbouring experts,
    top_groups: int = 1  # of which a token may choose from so many
    shares: bool = True  # whether `shares_E` is asked for,
    z: bool = True  # and `z`


class Routing(NamedTuple):
    """The chosen experts with their gates, and what balance and metrics need, summed over the tokens."""

    experts_NK: Tensor  # int64
    gates_NK: Tensor
    counts_E: Tensor  # int64, tokens of each expert
    shares_E: Tensor | None  # sum of the scores as shares of one, where asked for
    z: Tensor | None  # sum of squared log-sum-exps, where asked for
    entropy: Tensor  # sum of the shares' entropies, in nats; without gradient


def router_topk(logits_NE: Tensor, bias_E: Tensor, rule: Rule, backends: Backends = TORCH) -> Routing:
    """Experts and gates of every token, and the sums over the tokens; logits and bias float32.

    Scores are a softmax or sigmoids of the logits; the bias shifts the selection alone (arXiv 2408.15664).
    """
    if backends.of(ROUTER_TOPK, logits_NE) == "triton":
        from hybridtrain.kernels.router_topk.kernel import router_topk as fused

        return fused(logits_NE, bias_E, rule)
    scores_NE = logits_NE.softmax(-1) if rule.score == "softmax" else logits_NE.sigmoid()
    experts_NK = select(scores_NE.detach() + bias_E, rule)
    gates_NK = scores_NE.gather(1, experts_NK)
    if rule.normalize:
        gates_NK = gates_NK / torch.threshold(gates_NK.sum(-1, keepdim=True), 1e-20, 1e-20)
    shares_NE = scores_NE if rule.score == "softmax" else scores_NE / scores_NE.sum(-1, keepdim=True)
    sizes_NE, chosen_P = shares_NE.detach(), experts_NK.reshape(-1)
    return Routing(
        experts_NK,
        gates_NK if rule.scale == 1 else gates_NK * rule.scale,
        # not bincount: on a GPU the host waits for its least and its greatest number
        experts_NK.new_zeros(logits_NE.size(1)).scatter_add_(0, chosen_P, torch.ones_like(chosen_P)),
        shares_NE.sum(0) if rule.shares else None,
        logits_NE.logsumexp(-1).square().sum() if rule.z else None,
        -(sizes_NE * sizes_NE.clamp_min(torch.finfo(sizes_NE.dtype).tiny).log()).sum(),
    )


def select(biased_NE: Tensor, rule: Rule) -> Tensor:
    """The experts of the highest biased scores, within the best groups (DeepSeek-V3, arXiv 2412.19437): those
    with the greatest sums of their two highest biased scores."""
    if rule.num_groups > 1:
        grouped_NGX = biased_NE.unflatten(1, (rule.num_groups, -1))
        score_NG = grouped_NGX.topk(min(2, grouped_NGX.size(2)), -1).values.sum(-1)
        best_NG = score_NG.topk(rule.top_groups, -1).indices
        barred_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter_(1, best_NG, False)
        biased_NE = grouped_NGX.masked_fill(barred_NG[:, :, None], -torch.inf).flatten(1)
    return biased_NE.topk(rule.top_k, -1).indices
